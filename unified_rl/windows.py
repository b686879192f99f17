"""What one optimiser step trains on, cut into windows of (rows x steps): one forward and backward each.

Advantages, masks and aggregation weights are made for whole trajectories first, with denominators that are counted over
all processes. A window is then only a slice of them, so that neither its size nor the number of processes changes the
gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from unified_rl.batching import spans
from unified_rl.engine import distributed
from unified_rl.imports import load_import
from unified_rl.metrics import StepMetrics
from unified_rl.objectives import aggregate
from unified_rl.objectives.correction import entropy_threshold, importance_weights
from unified_rl.objectives.policy_gradient import LossFunction
from unified_rl.prepare import Prepared
from unified_rl.protocols import Policy
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.schema import Recipe
from unified_rl.types import Rows, Segment
from unified_rl.valuation import Valued


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One segment of a rollout with everything that its loss needs, all [N, S]."""

    name: str
    segment: Segment
    objective: Objective
    loss: str | LossFunction
    """A name of ours, or the function that the recipe imports."""
    kl_coef: float
    entropy_coef: float
    """Of this update: fixed, or as their controllers have them now."""
    advantages: Tensor
    old_log_probs: Tensor
    """The ratio's denominator."""
    old_means: Tensor | None
    """[N, S, ...] of Gaussian steps, for the losses that compare them."""
    scale: Tensor | None
    """Factor of each step's policy loss (importance correction, entropy mask), which no denominator counts; None: 1."""
    loss_mask: Tensor
    """bool: the trained steps of this optimiser step."""
    weights: Tensor
    """Share of each step in the loss; the sum over all processes carries the global denominator."""
    valued: Valued | None
    """With a critic: what it is trained towards, ..."""
    value_weights: Tensor | None
    """... and the share of each step in its loss, a mean over the steps whose value is trained."""


T = TypeVar("T")


class WindowLoss(Protocol):
    """The share of the loss of one window, [] with gradients; adds what it saw to the metrics."""

    def __call__(self, policy: Policy, window: Any, metrics: StepMetrics, *, first_update: bool) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(Generic[T]):
    """The rows and steps of one forward."""

    target: T
    rows: Rows
    steps: slice
    loss: WindowLoss


def make_target(
    prepared: Prepared, *, rows: range, steps: Sequence[int], max_steps: int, kl_coef: float, entropy_coef: float
) -> Target:
    """Mask and weights of one segment for one optimiser step.

    Args:
        rows, steps: what this optimiser step trains.
        max_steps: the most steps that a trajectory can have, for the constant aggregation.
        kl_coef, entropy_coef: of this optimiser step.
    """
    segment, objective, anchor = prepared.segment, prepared.objective, prepared.anchor
    chosen = torch.zeros_like(segment.loss_mask)
    chosen[rows.start : rows.stop : rows.step] = True
    in_steps = torch.zeros(segment.loss_mask.shape[1], dtype=torch.bool)
    in_steps[list(steps)] = True
    mask = segment.loss_mask & chosen & in_steps & prepared.valid[:, None]
    num_steps, num_sequences = distributed.sum_over_ranks(aggregate.counts(mask))
    limit = max_steps if objective.train_steps is None else min(max_steps, objective.train_steps)
    weights = aggregate.weights(
        mask, objective.aggregation, num_steps=num_steps, num_sequences=num_sequences, max_length=limit
    )
    advantages = prepared.advantages
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(mask.shape)
    recomputed = anchor is not None and objective.old_log_probs == "recompute"
    return Target(
        name=prepared.name,
        segment=segment,
        objective=objective,
        loss=load_import(objective.loss, "objective.loss") if ":" in objective.loss else objective.loss,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        advantages=advantages,
        old_log_probs=anchor.log_probs if anchor is not None and recomputed else segment.rollout_log_probs,
        old_means=anchor.means if anchor is not None else None,
        scale=_scale(prepared, mask),
        loss_mask=mask,
        weights=weights,
        valued=prepared.valued,
        value_weights=None if prepared.valued is None else _mean_weights(prepared.valued.mask & mask),
    )


def _mean_weights(mask: Tensor) -> Tensor:
    """[N, S]: of a mean over the unmasked steps of all processes."""
    return mask / max(distributed.sum_over_ranks([float(mask.sum())])[0], 1.0)


def _scale(prepared: Prepared, mask: Tensor) -> Tensor | None:
    """[N, S] factor of the policy loss from the anchor, or None where nothing asks for one.

    Args:
        mask: [N, S] bool: the trained steps.
    """
    objective, anchor = prepared.objective, prepared.anchor
    scale = None
    if anchor is None:
        return None
    if objective.correction.mode != "none":
        # Of the whole sequence, also where this update trains only some of its steps.
        scale = importance_weights(
            anchor.log_probs,
            prepared.segment.rollout_log_probs,
            prepared.segment.loss_mask,
            **objective.correction.model_dump(),
        )
    if objective.top_entropy < 1 and anchor.entropy is not None:
        entropy = anchor.entropy.masked_fill(~mask, torch.nan)
        width = int(distributed.max_over_ranks([float(entropy.shape[1])])[0])
        padded = torch.nn.functional.pad(entropy, (0, width - entropy.shape[1]), value=torch.nan)
        threshold = entropy_threshold(distributed.gather_rows(padded).flatten(), objective.top_entropy)
        kept = (anchor.entropy.double() >= threshold).to(anchor.entropy.dtype)
        scale = kept if scale is None else scale * kept
    return scale


def cut(
    target: Target, policy: Policy, recipe: Recipe, rows: range, steps: Sequence[int], loss: WindowLoss
) -> list[Window]:
    """The windows of a target, each with its loss; see `spans`. Every process cuts the same number of them."""
    parts = spans(target.segment, rows, steps, recipe.engine, steps_per_forward=policy.steps_per_forward[target.name])
    return [Window(target=target, rows=part, steps=run, loss=loss) for part, run in parts]

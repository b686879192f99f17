"""What one optimiser step trains on, cut into windows of (rows x steps): one forward and backward each.

Advantages, masks and aggregation weights are made for whole trajectories first, with denominators that are counted over
all processes. A window is then only a slice of them, so that neither its size nor the number of processes changes the
gradient.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.engine import distributed
from unified_rl.objectives import aggregate
from unified_rl.protocols import Policy
from unified_rl.recipe import Objective, Recipe
from unified_rl.types import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One segment of a rollout with everything that its loss needs, all [N, S]."""

    name: str
    segment: Segment
    objective: Objective
    advantages: Tensor
    """[N]."""
    loss_mask: Tensor
    """bool: the trained steps of this optimiser step."""
    weights: Tensor
    """Share of each step in the loss; the sum over all processes carries the global denominator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The rows and steps of one forward."""

    target: Target
    rows: slice
    steps: slice


def trained_rows(num_rows: int, minibatch: int, minibatches: int) -> range:
    """The rows of one minibatch: every `minibatches`-th, so that each holds members of every group."""
    return range(minibatch, num_rows, minibatches)


def chosen_steps(segment: Segment, objective: Objective, rng: random.Random) -> list[int]:
    """The steps of an update: those with a random decision in any row, or `train_steps` of them drawn by `rng`.

    With several processes, `rng` is seeded alike everywhere and only fixed-length segments may draw.
    """
    stochastic = segment.loss_mask.any(0).nonzero().flatten().tolist()
    if objective.train_steps is None or objective.train_steps >= len(stochastic):
        return stochastic
    return sorted(rng.sample(stochastic, objective.train_steps))


def make_target(
    name: str, segment: Segment, objective: Objective, advantages: Tensor, valid: Tensor, *, rows: range,
    steps: Sequence[int], max_steps: int,
) -> Target:  # fmt: skip
    """Mask and weights of one segment for one optimiser step.

    Args:
        advantages: [N].
        valid: [N] bool: rows whose reward counts; the others carry no loss at all.
        rows, steps: what this optimiser step trains.
        max_steps: the most steps that a trajectory can have, for the constant aggregation.
    """
    chosen = torch.zeros_like(segment.loss_mask)
    chosen[rows.start : rows.stop : rows.step] = True
    in_steps = torch.zeros(segment.loss_mask.shape[1], dtype=torch.bool)
    in_steps[list(steps)] = True
    mask = segment.loss_mask & chosen & in_steps & valid[:, None]
    num_steps, num_sequences = distributed.sum_over_ranks(aggregate.counts(mask))
    limit = max_steps if objective.train_steps is None else min(max_steps, objective.train_steps)
    weights = aggregate.weights(
        mask, objective.aggregation, num_steps=num_steps, num_sequences=num_sequences, max_length=limit
    )
    return Target(
        name=name, segment=segment, objective=objective, advantages=advantages, loss_mask=mask, weights=weights
    )


def cut(target: Target, policy: Policy, recipe: Recipe, rows: range, steps: Sequence[int]) -> list[Window]:
    """The windows of a target: rows by `engine.micro_batch`, steps as many as the policy evaluates in one forward.

    Every process cuts the same number of windows: its rows are as many as every other's.
    """
    size = recipe.engine.micro_batch
    at_once = policy.steps_per_forward[target.name]
    runs = [slice(None)] if at_once is None else [slice(step, step + 1) for step in steps]
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [
        Window(target=target, rows=slice(chunk.start, chunk.stop, chunk.step), steps=run)
        for run in runs
        for chunk in chunks
    ]

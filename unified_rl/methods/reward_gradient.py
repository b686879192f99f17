"""Gradients of differentiable rewards through the picture and the last steps (ReFL, DRaFT, AlignProp).

The rollout's states are the part of the chain without gradients: a window goes on from them with the same weights and
noise, so that its pictures are the rollout's own.
"""

import random
from dataclasses import dataclass

from torch import Tensor

from unified_rl.assemble import Parts
from unified_rl.batching import spans
from unified_rl.errors import RecipeError
from unified_rl.methods.planning import Planned, noise_seeds, prompts_of, row_weights, rows_of, trained_mask
from unified_rl.metrics import StepMetrics
from unified_rl.prepare import Prepared
from unified_rl.protocols import DifferentiablePolicy, Policy
from unified_rl.windows import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureTarget:
    """The pictures of one optimiser step."""

    parts: Parts
    prepared: Prepared
    planned: Planned
    step: int
    """The first step with gradients."""
    copy: int
    """Of how many times a sample is noised again; its number."""
    mask: Tensor
    """[N] bool."""
    weights: Tensor
    """[N]."""


def plan(parts: Parts, prepared: Prepared, planned: Planned) -> list[Window]:
    """One window for each chunk of rows, and for each copy of them.

    Raises:
        RecipeError: if the policy's pictures, or none of the rewards, can be differentiated.
    """
    policy, settings = parts.policy, prepared.objective.reward_gradient
    if not isinstance(policy, DifferentiablePolicy):
        raise RecipeError(f"objective.method: {planned.method} needs pictures that this policy can differentiate")
    num_steps = policy.num_levels(prepared.name, prepared.segment)
    fewest, most = (min(count, num_steps) for count in settings.steps)
    rng = random.Random(f"{parts.recipe.seed}/{planned.index}/{planned.number}/{prepared.name}/truncation")
    step = num_steps - rng.randint(fewest, most)
    num_copies = settings.copies if settings.kind == "renoised" else 1
    mask = trained_mask(parts.recipe, prepared, planned)
    weights = row_weights(mask) * planned.coef / num_copies
    rows = rows_of(parts.recipe, prepared, planned)
    windows = []
    for copy in range(num_copies):
        target = PictureTarget(
            parts=parts, prepared=prepared, planned=planned, step=step, copy=copy, mask=mask, weights=weights
        )
        for part, run in spans(prepared.segment, rows, [step], parts.recipe.engine, steps_per_forward=1):
            windows.append(Window(target=target, rows=part, steps=run, loss=picture_loss))
    return windows


def picture_loss(policy: Policy, window: Window[PictureTarget], metrics: StepMetrics, *, first_update: bool) -> Tensor:
    """The window's share of the loss, [] with gradients: minus the weighted sum of the differentiable rewards."""
    target = window.target
    settings = target.prepared.objective.reward_gradient
    assert isinstance(policy, DifferentiablePolicy), "the plan has asked"
    prompts = prompts_of(target.prepared, window.rows)
    names = [prompt.seed for prompt in prompts]
    pictures = policy.sample_with_grad(
        target.prepared.name,
        target.prepared.segment.rows(window.rows),
        kind=settings.kind,
        step=target.step,
        seeds=noise_seeds(target.parts.recipe, target.planned, target.copy, names),
    )
    mask = target.mask[window.rows].to(pictures.device)
    loss = pictures.new_zeros(len(prompts))
    for reward in target.parts.differentiable:
        values = reward.of(prompts, pictures)
        metrics.add(f"rewards/{reward.name}/with_grad", values, mask)
        short = -values if settings.margin is None else (settings.margin - values).clamp(min=0.0)
        loss = loss + reward.weight * short
    metrics.num_steps += float(mask.sum())
    total = (loss.masked_fill(~mask, 0.0) * target.weights[window.rows].to(loss)).sum()
    metrics.loss += float(total.detach())
    return total

"""Losses of single noised samples (DiffusionNFT, AWM, your own): one prediction a row and noise level."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.assemble import Parts
from unified_rl.batching import spans
from unified_rl.methods.planning import (
    Planned,
    denoiser,
    levels_of,
    loss_of,
    noise_seeds,
    prompts_of,
    row_weights,
    rows_of,
    trained_mask,
)
from unified_rl.metrics import StepMetrics
from unified_rl.objectives.forward_process import (
    AWM_WEIGHT,
    FORWARD_LOSSES,
    ForwardLoss,
    ForwardTerms,
    squared_error,
)
from unified_rl.prepare import Prepared
from unified_rl.protocols import DenoisingPolicy, Policy
from unified_rl.types import Denoised
from unified_rl.windows import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedTarget:
    """The noised samples of one optimiser step."""

    parts: Parts
    prepared: Prepared
    planned: Planned
    loss: ForwardLoss
    kl_coef: float
    mask: Tensor
    """[N] bool."""
    weights: Tensor
    """[N] share of a row in the loss, at each level."""


def plan(parts: Parts, prepared: Prepared, planned: Planned) -> list[Window]:
    """One window for each chunk of rows and noise level."""
    policy = denoiser(parts.policy, planned.method)
    levels = levels_of(parts, policy, prepared, planned)
    mask = trained_mask(parts.recipe, prepared, planned)
    target = NoisedTarget(
        parts=parts,
        prepared=prepared,
        planned=planned,
        loss=loss_of(planned.method, FORWARD_LOSSES),
        kl_coef=parts.memory.kl_coef(prepared.name, prepared.objective),
        mask=mask,
        weights=row_weights(mask) * planned.coef / len(levels),
    )
    rows = rows_of(parts.recipe, prepared, planned)
    return [
        Window(target=target, rows=part, steps=step, loss=noised_loss)
        for part, step in spans(prepared.segment, rows, levels, parts.recipe.engine, steps_per_forward=1)
    ]


def noised_loss(policy: Policy, window: Window[NoisedTarget], metrics: StepMetrics, *, first_update: bool) -> Tensor:
    """The window's share of the loss, [] with gradients."""
    target = window.target
    prepared, objective = target.prepared, target.prepared.objective
    model = denoiser(policy, target.planned.method)
    seeds = [prompt.seed for prompt in prompts_of(prepared, window.rows)]
    old = None
    if objective.old_weights != "trained":
        old = predict(target.parts, model, prepared, target.planned, window, seeds, weights=objective.old_weights)
    ref = None
    if target.kl_coef > 0:
        ref = predict(target.parts, model, prepared, target.planned, window, seeds, weights="reference")
    now = predict(target.parts, model, prepared, target.planned, window, seeds)
    mask = target.mask[window.rows].to(now.output.device)
    terms = ForwardTerms(
        output=now.output,
        target=now.target,
        old_output=now.output.detach() if old is None else old.output,
        clean_scale=now.clean_scale,
        level=now.level,
        advantages=prepared.advantages[window.rows].to(now.output),
        advantage_scale=objective.advantage_clip or 5.0,
        mix_coef=objective.mix_coef,
        error_weight=objective.error_weight or AWM_WEIGHT,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )
    per_row = target.loss(terms)
    metrics.add("denoising_error", squared_error(now.output, now.target), mask)
    if ref is not None:
        distance = squared_error(now.output, ref.output)
        per_row = per_row + target.kl_coef * distance
        metrics.add("kl", distance, mask)
    metrics.num_steps += float(mask.sum())
    loss = (per_row.masked_fill(~mask, 0.0) * target.weights[window.rows].to(per_row)).sum()
    metrics.loss += float(loss.detach())
    return loss


def predict(
    parts: Parts,
    policy: DenoisingPolicy,
    prepared: Prepared,
    planned: Planned,
    window: Window,
    names: list[int],
    *,
    weights: str = "",
) -> Denoised:
    """The prediction for a window's rows at its level, with gradients unless other `weights` are asked: "reference",
    or a name of snapshots."""
    step = window.steps.start
    seeds = noise_seeds(parts.recipe, planned, step, names)
    segment = prepared.segment.rows(window.rows)
    with ExitStack() as stack:
        if weights:
            stack.enter_context(torch.no_grad())
            stack.enter_context(policy.reference() if weights == "reference" else parts.snapshots.use(weights))
        return policy.predict(prepared.name, segment, step, seeds)

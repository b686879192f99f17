"""One optimiser step: the loss of each window, its backward, and the engine's step. It knows log-probs, masks and
advantages, and nothing of what a step of the policy is."""

import torch
from torch import Tensor

from unified_rl.metrics import StepMetrics
from unified_rl.objectives import kl as divergence
from unified_rl.objectives.policy_gradient import clip_fractions, policy_loss
from unified_rl.protocols import Engine, Policy
from unified_rl.transitions import gaussian
from unified_rl.types import StepStats
from unified_rl.windows import Window


def window_loss(policy: Policy, window: Window, metrics: StepMetrics, *, first_update: bool) -> Tensor:
    """The window's share of the loss, [] with gradients; adds what it saw to `metrics`.

    Args:
        first_update: nothing was trained since the rollout, so that replay must give the rollout's log-probs.
    """
    target, objective = window.target, window.target.objective
    segment = target.segment.rows(window.rows)
    mask = target.loss_mask[window.rows, window.steps]
    reference = _reference_stats(policy, window) if objective.kl.coef > 0 else None
    stats = policy.log_prob(target.name, segment, window.steps)
    device = stats.log_probs.device
    mask = mask.to(device)
    rollout_log_probs = segment.rollout_log_probs[:, window.steps].to(device)
    advantages = target.advantages[window.rows].to(stats.log_probs)[:, None].expand_as(stats.log_probs)
    result = policy_loss(
        stats.log_probs,
        rollout_log_probs,
        advantages,
        mask,
        loss=objective.loss,
        ratio_level=objective.ratio,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        delta=objective.delta,
    )
    per_step = result.per_step
    if reference is not None:
        kl = _kl(stats, reference, objective.kl.estimator, mask)
        per_step = per_step + objective.kl.coef * kl
        metrics.add("kl", kl, mask)
    if stats.entropy is not None:
        if objective.entropy_coef > 0:
            per_step = per_step - objective.entropy_coef * stats.entropy.masked_fill(~mask, 0.0)
        metrics.add("entropy", stats.entropy, mask)
    num_steps = float(mask.sum())
    metrics.num_steps += num_steps
    if objective.loss == "clip":
        low, high = clip_fractions(result.ratio, advantages, mask, objective.clip_low, objective.clip_high)
        metrics.sums["clip_fraction/low"] += float(low) * num_steps
        metrics.sums["clip_fraction/high"] += float(high) * num_steps
    metrics.add("ratio/mean", result.ratio, mask)
    if first_update and num_steps:
        gap = (stats.log_probs.detach() - rollout_log_probs).abs()[mask].max()
        metrics.replay_gap = max(metrics.replay_gap, float(gap))
    loss = (per_step * target.weights[window.rows, window.steps].to(per_step)).sum()
    metrics.loss += float(loss.detach())
    return loss


def update(policy: Policy, engine: Engine, windows: list[Window], *, first_update: bool) -> dict[str, float]:
    """Accumulate all windows and take one optimiser step; returns its metrics, equal on every process."""
    metrics = StepMetrics()
    lr = engine.lr
    for window in windows:
        with engine.window():
            engine.backward(window_loss(policy, window, metrics, first_update=first_update))
    grad_norm = engine.step()
    policy.version += 1
    return {**metrics.reduce(), "grad_norm": grad_norm, "lr": lr}


@torch.no_grad()
def _reference_stats(policy: Policy, window: Window) -> StepStats:
    with policy.reference():
        return policy.log_prob(window.target.name, window.target.segment.rows(window.rows), window.steps)


def _kl(stats: StepStats, reference: StepStats, estimator: str, mask: Tensor) -> Tensor:
    """[B, s] divergence from the reference, 0 where masked."""
    if estimator == "gaussian":
        if stats.mean is None or stats.std is None or reference.mean is None:
            raise ValueError("the gaussian KL needs a policy with Gaussian steps; use k3")
        columns = [
            gaussian.kl(stats.mean[:, step], reference.mean[:, step], stats.std[:, step])
            for step in range(stats.mean.shape[1])
        ]
        return torch.stack(columns, dim=1).masked_fill(~mask, 0.0)
    now = stats.log_probs.masked_fill(~mask, 0.0)
    then = reference.log_probs.masked_fill(~mask, 0.0)
    return divergence.estimate(now, then, estimator)  # type: ignore[arg-type]

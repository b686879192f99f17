"""One optimiser step: the loss of each window, its backward, and the engine's step. It knows log-probs, masks and
advantages, and nothing of what a step of the policy is."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unified_rl.metrics import StepMetrics, slowest
from unified_rl.objectives import kl as divergence
from unified_rl.objectives.correction import off_policy_keep
from unified_rl.objectives.policy_gradient import policy_loss
from unified_rl.objectives.thresholds import mean_bounds, mean_divergence
from unified_rl.objectives.value import value_loss
from unified_rl.protocols import Engine, Policy
from unified_rl.types import StepStats
from unified_rl.valuation import Valued
from unified_rl.windows import Target, Window


def window_loss(policy: Policy, window: Window[Target], metrics: StepMetrics, *, first_update: bool) -> Tensor:
    """A policy gradient's share of the loss, [] with gradients; adds what it saw to `metrics`.

    Args:
        first_update: nothing was trained since the rollout, so that replay must give the rollout's log-probs.
    """
    target, objective = window.target, window.target.objective
    penalised = objective.kl.coef > 0 and objective.kl.place == "loss"
    reference = _reference_stats(policy, window) if penalised else None
    stats = window_stats(policy, window)
    mask = target.loss_mask[window.rows, window.steps].to(stats.log_probs.device)
    per_step = _policy_loss(stats, window, mask, metrics)
    if reference is not None:
        kl = divergence.between(stats, reference, objective.kl.estimator, mask)
        per_step = per_step + target.kl_coef * kl
        metrics.add("kl", kl, mask)
        if objective.threshold_unit == "nats":
            metrics.add("kl_nats", kl * _num_dims(stats), mask)
    if stats.entropy is not None:
        if target.entropy_coef > 0:
            per_step = per_step - target.entropy_coef * stats.entropy.masked_fill(~mask, 0.0)
        metrics.add("entropy", stats.entropy, mask)
    num_steps = float(mask.sum())
    metrics.num_steps += num_steps
    if first_update:
        metrics.replay_gap = max(metrics.replay_gap, replay_gap(window, stats.log_probs))
    loss = (per_step * target.weights[window.rows, window.steps].to(per_step)).sum()
    if target.valued is not None and target.value_weights is not None:
        valued = _value_loss(stats, window, target.valued, target.value_weights, metrics)
        loss = loss + objective.critic.value_coef * valued
    metrics.loss += float(loss.detach())
    return loss


def window_stats(policy: Policy, window: Window[Target]) -> StepStats:
    """The policy's evaluation of a window."""
    return policy.log_prob(window.target.name, window.target.segment.rows(window.rows), window.steps)


def replay_gap(window: Window[Target], log_probs: Tensor) -> float:
    """Largest distance of the window's trained steps from the rollout's log-probs, in nats; inf for a NaN.

    Args:
        log_probs: [B, s] by the weights that drew the rollout.
    """
    rollout = window.target.segment.rollout_log_probs[window.rows, window.steps]
    return largest_gap(log_probs, rollout, window.target.loss_mask[window.rows, window.steps])


def largest_gap(log_probs: Tensor, others: Tensor, mask: Tensor) -> float:
    """Largest distance of log-probs [B, s] where the mask is set, in nats; inf for a NaN, 0 where nothing is set."""
    # A NaN must fail the check of the gap, not slip through its comparisons.
    apart = (log_probs.detach() - others.to(log_probs.device)).abs()[mask.to(log_probs.device)]
    return float(apart.nan_to_num(nan=torch.inf).max()) if len(apart) else 0.0


def _policy_loss(stats: StepStats, window: Window[Target], mask: Tensor, metrics: StepMetrics) -> Tensor:
    """[B, s] policy loss of a window, before the divergence and the entropy, 0 where masked."""
    target, objective = window.target, window.target.objective
    now = stats.log_probs
    old = target.old_log_probs[window.rows, window.steps].to(now.device)
    advantages = target.advantages[window.rows, window.steps].to(now)
    old_kl = step_std = None
    if target.old_means is not None and stats.mean is not None and stats.std is not None:
        old_means = target.old_means[window.rows, window.steps].to(stats.mean)
        old_kl = divergence.gaussian_steps(stats.mean, old_means, stats.std)
        step_std = stats.std.expand(stats.mean.shape).flatten(2).mean(2)
    clip_low, clip_high, max_divergence = objective.clip_low, objective.clip_high, objective.max_divergence
    if objective.threshold_unit == "nats":
        num_dims = _num_dims(stats)
        clip_low, clip_high = mean_bounds(clip_low, clip_high, num_dims)
        max_divergence = mean_divergence(max_divergence, num_dims)
        if objective.loss == "clip":
            metrics.clip_range = min(metrics.clip_range, clip_low, clip_high)
    result = policy_loss(
        now,
        old,
        advantages,
        mask,
        loss=target.loss,
        ratio_level=objective.ratio,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=objective.dual_clip,
        delta=objective.delta,
        penalty_range=objective.penalty_range,
        max_divergence=max_divergence,
        old_kl=old_kl,
        step_std=step_std,
    )
    per_step = result.per_step
    if objective.off_policy_mask is not None:
        sampled = target.segment.rollout_log_probs[window.rows, window.steps].to(now.device)
        keep = off_policy_keep(now, sampled, advantages, mask, objective.off_policy_mask)
        per_step = per_step.masked_fill(~keep, 0.0)
        metrics.add("off_policy_masked", (~keep).double(), mask)
    if target.scale is not None:
        scale = target.scale[window.rows, window.steps].to(per_step)
        per_step = per_step * scale
        metrics.add("correction/mean", scale, mask)
    if result.bounded is not None:
        low, high = result.bounded
        metrics.sums["clip_fraction/low"] += float(low) * float(mask.sum())
        metrics.sums["clip_fraction/high"] += float(high) * float(mask.sum())
    if old_kl is not None:
        metrics.add("old_kl", old_kl, mask)
    moved = (now.detach() - old).masked_fill(~mask, 0.0)
    metrics.add("update_kl", divergence.estimate(-moved, torch.zeros_like(moved), "k3"), mask)
    metrics.add("ratio/overflow", result.overflow.double(), mask)
    metrics.add("ratio/mean", result.ratio, mask)
    return per_step


def _num_dims(stats: StepStats) -> int:
    """Latent dims of a Gaussian step."""
    assert stats.mean is not None, "thresholds in nats are of Gaussian steps"
    return stats.mean[0, 0].numel()


def _value_loss(stats: StepStats, window: Window, valued: Valued, weights: Tensor, metrics: StepMetrics) -> Tensor:
    """The window's share of the value loss, []."""
    assert stats.values is not None, "a critic's target without a critic"
    at = (window.rows, window.steps)
    old, returns, share = (matrix[at].to(stats.values) for matrix in (valued.values, valued.returns, weights))
    losses, bounded = value_loss(stats.values, old, returns, window.target.objective.critic.value_clip)
    loss = (losses * share).sum()
    metrics.shares["value/loss"] += float(loss.detach())
    metrics.shares["value/clip_fraction"] += float((bounded * share).sum())
    return loss


Judge = Callable[[float, Sequence[float]], None]
"""Is given the replay gap of all processes, and the largest gap up to each of this one's windows; may raise."""


def update(policy: Policy, engine: Engine, windows: list[Window], *, first_update: bool) -> dict[str, float]:
    """Accumulate all windows and take one optimiser step; returns its metrics, equal on every process."""
    metrics = StepMetrics()
    accumulate(policy, engine, windows, metrics, first_update=first_update)
    return finish(policy, engine, metrics)


def accumulate(
    policy: Policy, engine: Engine, windows: list[Window], metrics: StepMetrics, *, first_update: bool
) -> None:
    """Add the gradients of all windows up."""
    started = time.perf_counter()
    for number, window in enumerate(windows):
        with engine.window():
            before = metrics.loss
            engine.backward(window.loss(policy, window, metrics, first_update=first_update))
        # Of a running sum: after the first window that is not finite, none is.
        if math.isfinite(before) and not math.isfinite(metrics.loss):
            metrics.bad.append(number)
        metrics.gaps.append(metrics.replay_gap)
    metrics.seconds = time.perf_counter() - started


def finish(
    policy: Policy, engine: Engine, metrics: StepMetrics, judge: Judge = lambda gap, gaps: None
) -> dict[str, float]:
    """Take the optimiser step of what was accumulated; returns its metrics, equal on every process.

    Args:
        judge: looks at the replay before any weight changes.
    """
    lr = engine.lr
    seen = metrics.reduce()
    judge(seen["replay_gap"], metrics.gaps)
    grad_norm = engine.step()
    policy.version += 1
    return {**seen, **slowest("update", metrics.seconds), "grad_norm": grad_norm, "lr": lr}


@torch.no_grad()
def _reference_stats(policy: Policy, window: Window[Target]) -> StepStats:
    with policy.reference():
        return window_stats(policy, window)

"""Divergence from the reference policy, estimated at the sampled steps.

Gaussian steps have it in closed form: `transitions.gaussian.kl`.
"""

from typing import Literal

import torch
from torch import Tensor

from unified_rl.transitions import gaussian
from unified_rl.types import StepStats

Estimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""k3 is flat beyond this many nats, so that one drifted token cannot overflow the loss."""


def estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: Estimator) -> Tensor:
    """KL(policy || reference) at each step, in nats (Schulman 2020, http://joschu.net/blog/kl-approx.html).

    With d = ref_log_probs - log_probs: k1 = -d (unbiased, any sign; its gradient is 0 in expectation, so it belongs in
    the reward), k2 = d^2 / 2 (biased value, the KL's own gradient on-policy), k3 = exp(d) - 1 - d (unbiased, never
    negative).

    Args:
        log_probs, ref_log_probs: [B, S], finite: fill masked steps first.

    Returns:
        [B, S].

    Raises:
        ValueError: for an unknown estimator.
    """
    assert log_probs.shape == ref_log_probs.shape, f"{tuple(log_probs.shape)} against {tuple(ref_log_probs.shape)}"
    difference = ref_log_probs - log_probs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        # expm1: exp(d) - 1 - d cancels to nothing in float32 where the policies are close.
        return difference.expm1() - difference
    raise ValueError(f"KL estimator {estimator!r}; known: k1, k2, k3")


def between(stats: StepStats, reference: StepStats, estimator: str, loss_mask: Tensor) -> Tensor:
    """Divergence of two evaluations of the same steps.

    Args:
        stats, reference: of B rows and s steps; gradients flow into `stats` and, where they exist, `reference`.
        estimator: one of `Estimator`, or gaussian: exact, from the means (mean over dims).
        loss_mask: [B, s] bool.

    Returns:
        [B, s], 0 where masked.

    Raises:
        ValueError: for the gaussian estimator without means.
    """
    if estimator == "gaussian":
        if stats.mean is None or stats.std is None or reference.mean is None:
            raise ValueError("the gaussian KL needs a policy with Gaussian steps; use k3")
        return gaussian_steps(stats.mean, reference.mean, stats.std).masked_fill(~loss_mask, 0.0)
    now = stats.log_probs.masked_fill(~loss_mask, 0.0)
    then = reference.log_probs.masked_fill(~loss_mask, 0.0)
    return estimate(now, then, estimator)  # type: ignore[arg-type]


def gaussian_steps(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """`gaussian.kl` of each of s steps: [B, s, ...], [B, s, ...] and a std that broadcasts to them, to [B, s]."""
    columns = [gaussian.kl(mean[:, step], ref_mean[:, step], std[:, step]) for step in range(mean.shape[1])]
    return torch.stack(columns, dim=1)

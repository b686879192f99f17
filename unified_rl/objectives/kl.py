"""Divergence from the reference policy, estimated at the sampled steps.

Gaussian steps have it in closed form: `transitions.gaussian.kl`.
"""

from typing import Literal

from torch import Tensor

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

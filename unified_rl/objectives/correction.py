"""Weights of steps that do not come from the policy being trained: importance correction of the rollout, and masks.

The sampler and the trainer may disagree about the same weights (other kernels, lower precision, staleness). With the
old log-probs recomputed by the trainer, w = old policy / rollout policy says by how much.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Mode = Literal["none", "truncate", "mask"]
Level = Literal["token", "sequence", "sequence_mean"]

MAX_LOG_WEIGHT = 20.0


def importance_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    loss_mask: Tensor,
    *,
    mode: Mode,
    level: Level,
    cap: float,
    floor: float = 0.0,
) -> Tensor:
    """exp(old - rollout), bounded: truncated or masked importance sampling (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"; TRL's and verl's rollout correction).

    - token: of each step. sequence: the product over the row's steps, which is the exact weight (TRL, verl).
      sequence_mean: its geometric mean (ms-swift calls this one "sequence").
    - truncate: min(w, cap). mask: 0 where w > cap (TRL) or w < floor (IcePop), else w.

    Args:
        old_log_probs, rollout_log_probs: [N, S], whole rows; constants.
        loss_mask: [N, S] bool.
        cap: above 0. floor: of the mask only.

    Returns:
        [N, S] without gradient; 1 at masked steps.

    Raises:
        ValueError: for an unknown mode or level.
    """
    assert old_log_probs.shape == rollout_log_probs.shape == loss_mask.shape, "all must be [N, S]"
    log_weight = (old_log_probs - rollout_log_probs).detach().masked_fill(~loss_mask, 0.0)
    if level in ("sequence", "sequence_mean"):
        total = log_weight.sum(1, keepdim=True)
        if level == "sequence_mean":
            total = total / loss_mask.sum(1, keepdim=True).clamp(min=1)
        log_weight = total.expand_as(log_weight)
    elif level != "token":
        raise ValueError(f"correction level {level!r}; known: token, sequence, sequence_mean")
    weight = log_weight.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
    if mode == "truncate":
        weight = weight.clamp(max=cap)
    elif mode == "mask":
        weight = weight.masked_fill((weight > cap) | (weight < floor), 0.0)
    elif mode == "none":
        weight = torch.ones_like(weight)
    else:
        raise ValueError(f"correction mode {mode!r}; known: none, truncate, mask")
    return weight.masked_fill(~loss_mask, 1.0)


def off_policy_keep(
    log_probs: Tensor, rollout_log_probs: Tensor, advantages: Tensor, loss_mask: Tensor, threshold: float
) -> Tensor:
    """False for sequences with a negative advantage that the policy has moved away from: mean over the row's steps of
    rollout - now above `threshold` nats (DeepSeek-V3.2, arXiv 2512.02556, off-policy sequence masking).

    Args:
        log_probs, rollout_log_probs, advantages: [B, S], whole rows.
        loss_mask: [B, S] bool.

    Returns:
        [B, S] bool.
    """
    gone = (rollout_log_probs - log_probs).detach().masked_fill(~loss_mask, 0.0)
    drift = gone.sum(1, keepdim=True) / loss_mask.sum(1, keepdim=True).clamp(min=1)
    return (advantages >= 0) | (drift <= threshold)


def entropy_threshold(entropy: Tensor, share: float) -> float:
    """The entropy that `share` of the steps reach: the 80/20 rule trains only the forking tokens (Wang et al. 2025,
    arXiv 2506.01939).

    Args:
        entropy: [M] of all trained steps of an update, in nats; NaN is left out.
        share: in (0, 1].

    Returns:
        The (1 - share) quantile, linearly interpolated; -inf without any step.
    """
    # numpy's, because torch.quantile refuses more than 16 million values, which long texts have.
    present = entropy[~entropy.isnan()].double().cpu().numpy()
    return float(np.quantile(present, 1.0 - share)) if len(present) else float("-inf")

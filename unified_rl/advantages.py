"""How much better than expected each sample was, from its reward and its group's rewards.

The caller gathers whole groups (all processes) first. A NaN reward excludes its sample: it enters no statistic and has
advantage 0. Statistics are computed in float64, with the unbiased std.
"""

from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["group_std", "group_mean", "global_std"]

STD_EPS = 1e-4
"""Added to every std that divides, in reward units (as TRL and flow_grpo do)."""

TIE_TOLERANCE = 1e-6
"""Rewards are tied if their spread is at most this share of the largest one: float32 noise of a reward model must not
be blown up into advantages of +-1."""


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalise: Normalise, clip: float | None = None) -> Tensor:
    """Advantages of N samples over their groups.

    - group_std: (r - mean of the group) / (std of the group + STD_EPS): GRPO (arXiv 2402.03300, section 4.1.2).
    - group_mean: r - mean of the group: Dr.GRPO (arXiv 2503.20783, section 3.2).
    - global_std: (r - mean of the group) / (std of all rewards + STD_EPS): Flow-GRPO's default (arXiv 2505.05470).

    Groups of one, and groups whose rewards are all tied, get exactly 0.

    Args:
        rewards: [N]; NaN excludes the sample.
        group_ids: [N] int64, in any order; groups may differ in size.
        normalise: see above.
        clip: clamp the result to +-clip; None leaves it.

    Returns:
        [N] in the dtype of the rewards, finite.

    Raises:
        ValueError: for an infinite reward or an unknown normalisation.
    """
    groups = _GroupStatistics(rewards, group_ids)
    centred = (groups.rewards - groups.mean[groups.index]).masked_fill(groups.tied[groups.index] | ~groups.valid, 0.0)
    if normalise == "group_std":
        advantages = centred / (groups.std[groups.index] + STD_EPS)
    elif normalise == "group_mean":
        advantages = centred
    elif normalise == "global_std":
        valid = groups.rewards[groups.valid]
        # With fewer than two valid samples every group is tied, and `centred` is 0 already.
        advantages = centred / (valid.std() + STD_EPS) if len(valid) > 1 else centred
    else:
        raise ValueError(f"normalise {normalise!r}; known: group_std, group_mean, global_std")
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages.to(rewards.dtype)


def zero_std_fraction(rewards: Tensor, group_ids: Tensor) -> float:
    """Share of the groups with a valid sample whose valid rewards are all tied, and which therefore teach nothing.

    Args:
        rewards: [N]; NaN excludes the sample.
        group_ids: [N] int64.

    Returns:
        In [0, 1]; 0 if there is no valid sample.
    """
    groups = _GroupStatistics(rewards, group_ids)
    present = groups.count > 0
    return float((groups.tied & present).sum() / present.sum().clamp(min=1))


class _GroupStatistics:
    """Count, mean, std and ties of each of K groups, over the valid samples."""

    def __init__(self, rewards: Tensor, group_ids: Tensor) -> None:
        assert rewards.ndim == 1 and group_ids.shape == rewards.shape, "rewards and group_ids must be [N]"
        if bool(rewards.isinf().any()):
            raise ValueError("a reward is infinite; return None or NaN to exclude a sample")
        self.valid = ~rewards.isnan()
        self.rewards = rewards.double().nan_to_num(nan=0.0)
        unique, self.index = group_ids.unique(return_inverse=True)
        zeros = self.rewards.new_zeros(len(unique))
        self.count = zeros.index_add(0, self.index, self.valid.double())
        self.mean = zeros.index_add(0, self.index, self.rewards) / self.count.clamp(min=1.0)
        squares = (self.rewards - self.mean[self.index]).square().masked_fill(~self.valid, 0.0)
        self.std = (zeros.index_add(0, self.index, squares) / (self.count - 1.0).clamp(min=1.0)).sqrt()
        high = self._extreme(zeros, self.rewards, "amax")
        low = self._extreme(zeros, self.rewards, "amin")
        self.tied = high - low <= TIE_TOLERANCE * torch.maximum(high.abs(), low.abs())

    def _extreme(self, zeros: Tensor, values: Tensor, reduce: str) -> Tensor:
        return zeros.scatter_reduce(0, self.index[self.valid], values[self.valid], reduce, include_self=False)

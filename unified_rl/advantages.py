"""How much better than expected each sample was, from its reward and its group's rewards.

The caller gathers whole groups (all processes) first. A NaN reward excludes its sample: it enters no statistic and has
advantage 0. Statistics are computed in float64, with the unbiased std.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Normalise = Literal["group_std", "group_mean", "global_std", "rloo", "group_whitened"]

STD_EPS = 1e-4
"""Added to every std that divides, in reward units, unless something else is asked for (as TRL and flow_grpo do)."""

TIE_TOLERANCE = 1e-6
"""Rewards are tied if their spread is at most this share of the largest one: float32 noise of a reward model must not
be blown up into advantages of +-1."""


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalise: Normalise,
    clip: float | None = None,
    std_eps: float = STD_EPS,
    population_std: bool = False,
) -> Tensor:
    """Advantages of N samples over their groups.

    - group_std: (r - mean of the group) / (std of the group + STD_EPS): GRPO (arXiv 2402.03300, section 4.1.2).
    - group_mean: r - mean of the group: Dr.GRPO (arXiv 2503.20783, section 3.2).
    - global_std: (r - mean of the group) / (std of all rewards + STD_EPS): Flow-GRPO's default (arXiv 2505.05470).
    - rloo: r - mean of the *other* members, which is G / (G - 1) * (r - mean of the group): RLOO (Ahmadian et al. 2024,
      arXiv 2402.14740, eq. 8).
    - group_whitened: c = r - mean of the group, over the std of all c + STD_EPS: REINFORCE++ with baseline (Hu et al.
      2025, arXiv 2501.03262). Unlike global_std it does not count how groups differ from each other.

    Groups of one, and groups whose rewards are all tied, get exactly 0.

    Args:
        rewards: [N]; NaN excludes the sample.
        group_ids: [N] int64, in any order; groups may differ in size.
        normalise: see above.
        clip: clamp the result to +-clip; None leaves it.
        std_eps: added to every std that divides, in place of STD_EPS.
        population_std: divide squares by their number, not by one less.

    Returns:
        [N] in the dtype of the rewards, finite.

    Raises:
        ValueError: for an infinite reward or an unknown normalisation.
    """
    groups = _GroupStatistics(rewards, group_ids, population_std)
    correction = 0 if population_std else 1
    centred = (groups.rewards - groups.mean[groups.index]).masked_fill(groups.tied[groups.index] | ~groups.valid, 0.0)
    if normalise == "group_std":
        advantages = centred / (groups.std[groups.index] + std_eps)
    elif normalise == "group_mean":
        advantages = centred
    elif normalise == "global_std":
        valid = groups.rewards[groups.valid]
        # With fewer than two valid samples every group is tied, and `centred` is 0 already.
        advantages = centred / (valid.std(correction=correction) + std_eps) if len(valid) > 1 else centred
    elif normalise == "rloo":
        count = groups.count[groups.index]
        advantages = centred * count / (count - 1.0).clamp(min=1.0)
    elif normalise == "group_whitened":
        # The mean of the centred rewards is 0 by construction, so whitening only has to divide.
        kept = centred[groups.valid]
        advantages = centred / (kept.std(correction=correction) + std_eps) if len(kept) > 1 else centred
    else:
        raise ValueError(f"normalise {normalise!r}; known: {', '.join(get_args(Normalise))}")
    return _finish(advantages, clip, rewards)


def batch_advantages(
    rewards: Tensor, *, clip: float | None = None, std_eps: float = STD_EPS, population_std: bool = False
) -> Tensor:
    """(r - mean of all rewards) / (std of all rewards + STD_EPS): REINFORCE++ (Hu et al. 2025, arXiv 2501.03262).

    Without a baseline for each prompt: a prompt that is easier than others has positive advantages only. The paper
    whitens over tokens, which counts long samples more; here every sample counts once.

    Args:
        rewards: [N]; NaN excludes the sample, which gets 0.
        clip, std_eps, population_std: see `group_advantages`.

    Returns:
        [N] in the dtype of the rewards; all 0 if the rewards are tied.
    """
    everyone = _everyone(rewards, population_std)
    return _finish(_whiten(everyone, std_eps), clip, rewards)


def gdpo_advantages(
    breakdown: Mapping[str, Tensor],
    weights: Mapping[str, float],
    valid: Tensor,
    group_ids: Tensor,
    *,
    clip: float | None = None,
    std_eps: float = STD_EPS,
    population_std: bool = False,
) -> Tensor:
    """Each reward normalised in its group, their weighted sum whitened over all samples: GDPO (Liu et al. 2026, arXiv
    2601.05242; TRL's normalize_then_sum).

    A reward with a large scale or a large spread cannot drown the others, as it does in a plain weighted sum.

    Args:
        breakdown: by reward, [N]; NaN where it abstained.
        weights: by reward; those that are missing or 0 are not trained on. All others are in `breakdown`.
        valid: [N] bool; the others get 0 and enter no statistic.
        group_ids: [N] int64.
        clip, std_eps, population_std: see `group_advantages`; of both steps.

    Returns:
        [N] in the dtype of the rewards.
    """
    trained = [name for name, weight in weights.items() if weight != 0.0]
    assert trained and set(trained) <= set(breakdown), "GDPO needs the values of each reward with a weight"
    total = torch.zeros(len(valid), dtype=torch.float64, device=valid.device)
    for name in trained:
        rewards = breakdown[name].double().masked_fill(~valid, torch.nan)
        total += weights[name] * group_advantages(
            rewards, group_ids, normalise="group_std", std_eps=std_eps, population_std=population_std
        )
    everyone = _everyone(total.masked_fill(~valid, torch.nan), population_std)
    return _finish(_whiten(everyone, std_eps), clip, breakdown[trained[0]])


def pass_k_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    clip: float | None = None,
    std_eps: float = STD_EPS,
    population_std: bool = False,
) -> Tensor:
    """(best - second best) / (std of the group + STD_EPS) for the best sample of each group, 0 for all others.

    Trains for the best of G samples and leaves the rest alone, so that diversity is not punished (verl's GRPO_PASSK,
    after Tang et al. 2025, arXiv 2503.19595). A shared first place gets 0, and so does a group of one.

    Args:
        rewards: [N]; NaN excludes the sample.
        group_ids: [N] int64.
        clip, std_eps, population_std: see `group_advantages`.
    """
    groups = _GroupStatistics(rewards, group_ids, population_std)
    advantages = torch.zeros_like(groups.rewards)
    for group in range(len(groups.count)):
        members = ((groups.index == group) & groups.valid).nonzero().flatten()
        if len(members) < 2 or bool(groups.tied[group]):
            continue
        best, second = groups.rewards[members].topk(2).values
        if float(best - second) > TIE_TOLERANCE * float(best.abs()):
            winner = members[groups.rewards[members].argmax()]
            advantages[winner] = (best - second) / (groups.std[group] + std_eps)
    return _finish(advantages, clip, rewards)


class PromptStatistics:
    """Running statistics of each prompt's rewards: DDPO's tracker (Black et al. 2023, arXiv 2305.13301, section 4.3).

    The last `buffer_size` rewards of a prompt, this rollout's included, give its mean and std; a prompt with fewer than
    `min_count` of them uses those of this rollout's whole batch. So a prompt that is seen once in a rollout learns from
    its past.
    """

    def __init__(
        self, buffer_size: int, min_count: int, *, std_eps: float = STD_EPS, population_std: bool = False
    ) -> None:
        """`std_eps` and `population_std` as in `group_advantages`; the authors' code has 1e-6 and numpy's std."""
        self._buffer_size, self._min_count = buffer_size, min_count
        self._std_eps, self._population_std = std_eps, population_std
        self._history: dict[str, deque[float]] = {}

    def advantages(self, rewards: Tensor, keys: Sequence[str], *, clip: float | None = None) -> Tensor:
        """Remember the rewards of one rollout, then compare each with its prompt's history.

        Args:
            rewards: [N] of all processes, in an order that is the same on each; NaN excludes the sample.
            keys: N names of prompts.
            clip: clamp the result to +-clip.

        Returns:
            [N]; 0 where the statistics that apply are tied.
        """
        everyone = _everyone(rewards, self._population_std)
        assert len(keys) == len(rewards), f"{len(keys)} keys for {len(rewards)} rewards"
        for key, reward, valid in zip(keys, everyone.rewards.tolist(), everyone.valid.tolist(), strict=True):
            if valid:
                self._history.setdefault(key, deque(maxlen=self._buffer_size)).append(reward)
        fallback = _whiten(everyone, self._std_eps)
        advantages = torch.zeros_like(fallback)
        for row, key in enumerate(keys):
            if not bool(everyone.valid[row]):
                continue
            past = torch.tensor(self._history[key], dtype=torch.float64)
            if len(past) < self._min_count:
                advantages[row] = fallback[row]
            elif not _tied(past.max(), past.min()):
                std = past.std(correction=0 if self._population_std else 1)
                advantages[row] = (everyone.rewards[row] - past.mean()) / (std + self._std_eps)
        return _finish(advantages, clip, rewards)

    def state(self) -> dict[str, Any]:
        """The history as JSON."""
        return {key: list(values) for key, values in self._history.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._history = {key: deque(values, maxlen=self._buffer_size) for key, values in state.items()}


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


def _finish(advantages: Tensor, clip: float | None, like: Tensor) -> Tensor:
    return (advantages if clip is None else advantages.clamp(-clip, clip)).to(like.dtype)


def _everyone(rewards: Tensor, population_std: bool) -> "_GroupStatistics":
    """All samples as one group."""
    return _GroupStatistics(
        rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device), population_std
    )


def _whiten(everyone: "_GroupStatistics", std_eps: float) -> Tensor:
    """Rewards of one group that holds all samples, minus its mean, over its std; 0 if tied."""
    centred = everyone.rewards - everyone.mean[everyone.index]
    centred = centred.masked_fill(everyone.tied[everyone.index] | ~everyone.valid, 0.0)
    return centred / (everyone.std[everyone.index] + std_eps)


def _tied(high: Tensor, low: Tensor) -> Tensor:
    return high - low <= TIE_TOLERANCE * torch.maximum(high.abs(), low.abs())


class _GroupStatistics:
    """Count, mean, std and ties of each of K groups, over the valid samples."""

    def __init__(self, rewards: Tensor, group_ids: Tensor, population_std: bool = False) -> None:
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
        freedom = self.count if population_std else self.count - 1.0
        self.std = (zeros.index_add(0, self.index, squares) / freedom.clamp(min=1.0)).sqrt()
        high = self._extreme(zeros, self.rewards, "amax")
        low = self._extreme(zeros, self.rewards, "amin")
        self.tied = _tied(high, low)

    def _extreme(self, zeros: Tensor, values: Tensor, reduce: str) -> Tensor:
        return zeros.scatter_reduce(0, self.index[self.valid], values[self.valid], reduce, include_self=False)

"""Advantages of objectives that imitate samples instead of comparing log-probs: how much each sample is imitated.

All take rewards [N] (NaN excludes) and group_ids [N], over all processes, and return [N] float64; excluded samples get
0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def uniform(rewards: Tensor, group_ids: Tensor, temperature: float) -> Tensor:
    """1 for every sample: supervised fine-tuning on what was recorded."""
    return (~rewards.isnan()).double()


def exponential(rewards: Tensor, group_ids: Tensor, temperature: float) -> Tensor:
    """exp(reward / temperature), over its mean in the group.

    Reward-weighted regression (Peters and Schaal 2007; Lee et al. 2023, arXiv 2302.12192). A constant added to all
    rewards of a group changes nothing, which makes it AWR's exp(advantage / temperature) too (Peng et al. 2019, arXiv
    1910.00177). The mean of a group is 1, so that tied groups are imitated as they are.

    Args:
        temperature: in units of the reward, above 0.
    """

    def of_group(values: Tensor) -> Tensor:
        return (values / temperature).softmax(0) * len(values)

    return _by_group(rewards, group_ids, of_group)


def best(rewards: Tensor, group_ids: Tensor, temperature: float) -> Tensor:
    """1 for the best of a group, shared equally among its ties, 0 for the others; tied groups teach nothing."""

    def of_group(values: Tensor) -> Tensor:
        top = values == values.amax()
        return torch.zeros_like(values) if top.all() else top.double() / top.sum()

    return _by_group(rewards, group_ids, of_group)


def best_worst(rewards: Tensor, group_ids: Tensor, temperature: float) -> Tensor:
    """1 for the first best of a group, -1 for its last worst, 0 for the others; tied groups teach nothing."""

    def of_group(values: Tensor) -> Tensor:
        weights = torch.zeros_like(values)
        if values.amax() > values.amin():
            weights[values.argmax()] = 1.0
            weights[(values == values.amin()).nonzero()[-1]] = -1.0
        return weights

    return _by_group(rewards, group_ids, of_group)


def contrast(weights: Tensor, rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Weights minus their group's mean: what a group's samples have in common is not imitated.

    For a sampler that draws from exactly what the loss fits, the mean's gradient is zero in expectation, and this a
    baseline (Williams 1992). A denoiser's few steps draw something else: imitating all of its samples alike then has a
    gradient of its own, that of the sampler's error, which this takes out.

    Args:
        weights: [N], of one of the functions above.
    """

    def of_group(values: Tensor) -> Tensor:
        return values - values.mean()

    return _by_group(weights.masked_fill(rewards.isnan(), torch.nan), group_ids, of_group)


def _by_group(rewards: Tensor, group_ids: Tensor, of_group: Callable[[Tensor], Tensor]) -> Tensor:
    weights = torch.zeros(rewards.shape, dtype=torch.float64)
    for group in group_ids.unique():
        rows = ((group_ids == group) & ~rewards.isnan()).nonzero().flatten()
        if len(rows):
            weights[rows] = of_group(rewards[rows].double())
    return weights


SAMPLE_WEIGHTS: dict[str, Callable[[Tensor, Tensor, float], Any]] = {
    "uniform": uniform,
    "exponential": exponential,
    "best": best,
    "best_worst": best_worst,
}
"""By the name that `objective.advantage` has for them."""

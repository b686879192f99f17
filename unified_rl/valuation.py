"""Advantages from a critic: what a rollout's steps were worth when they were drawn, before its first update."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.engine import distributed
from unified_rl.errors import RecipeError
from unified_rl.objectives.value import gae, gae_over_turns
from unified_rl.protocols import Policy, ValuedPolicy
from unified_rl.recipe.objective import Objective
from unified_rl.types import Segment

STD_EPS = 1e-8
SAME = 1e-6
"""Returns whose std is at most this share of the largest one are all the same but for rounding, and explain nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Valued:
    """What a segment's critic is trained towards, all [N, S]."""

    values: Tensor
    """At the start of the rollout's updates."""
    returns: Tensor
    """Estimates of the reward to come, from advantages and values."""
    mask: Tensor
    """bool: the steps whose value is trained."""


@torch.no_grad()
def step_values(policy: Policy, name: str, segment: Segment, micro_batch: int) -> Tensor:
    """[N, S] the critic's values of a segment, without gradients, on the CPU.

    Raises:
        RecipeError: if the policy has no critic.
    """
    if not isinstance(policy, ValuedPolicy):
        raise RecipeError("objective.advantage: gae needs a critic, which this policy has not; use group_std")
    starts = range(0, segment.num_rows, micro_batch)
    parts = [policy.values(name, segment.rows(slice(at, at + micro_batch)), slice(None)) for at in starts]
    return torch.cat(parts).float().cpu()


def valued_advantages(
    objective: Objective, segment: Segment, values: Tensor, total: Tensor, penalties: Tensor | None
) -> tuple[Tensor, Valued]:
    """Advantages of the steps of this process's rows, and what their critic is trained towards.

    Args:
        values: [N, S].
        total: [N] rewards, which count at the last step of a row; NaN excludes the row.
        penalties: [N, S] taken off the reward of each step (a divergence), or None.

    Returns:
        Advantages [N, S], whitened over all processes if the recipe asks for it, 0 where masked.
    """
    critic = objective.critic
    mask = segment.loss_mask & ~total.isnan()[:, None]
    rewards = _at_last_step(total.nan_to_num(nan=0.0).double(), segment.loss_mask)
    if penalties is not None:
        rewards = rewards - penalties.double()
    discount = {"gamma": critic.gamma, "gae_lambda": critic.gae_lambda}
    if critic.level == "turn":
        advantages, trained = gae_over_turns(rewards, values, segment.loss_mask, segment.turn_ids, **discount)
        trained = trained & mask
    else:
        advantages, trained = gae(rewards, values, segment.loss_mask, **discount), mask
    returns = (advantages + values.double()).masked_fill(~trained, 0.0)
    if critic.whiten:
        mean, std = moments(advantages, mask)
        advantages = (advantages - mean) / (std + STD_EPS)
    if objective.advantage_clip is not None:
        advantages = advantages.clamp(-objective.advantage_clip, objective.advantage_clip)
    advantages = advantages.masked_fill(~mask, 0.0).to(values.dtype)
    return advantages, Valued(values=values, returns=returns.to(values.dtype), mask=trained)


def moments(values: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and unbiased std of the unmasked values of all processes; 0 and 0 without any."""
    chosen = values[mask].double()
    count, total = distributed.sum_over_ranks([float(len(chosen)), float(chosen.sum())])
    mean = total / max(count, 1.0)
    squares = distributed.sum_over_ranks([float((chosen - mean).square().sum())])[0]
    return mean, (squares / max(count - 1.0, 1.0)) ** 0.5


def _at_last_step(total: Tensor, loss_mask: Tensor) -> Tensor:
    """[N] rewards at each row's last unmasked step of [N, S]; a row without any has none."""
    steps = torch.arange(1, loss_mask.shape[1] + 1)
    last = (loss_mask * steps).argmax(1)
    rewards = torch.zeros(loss_mask.shape, dtype=total.dtype)
    return rewards.scatter(1, last[:, None], total[:, None]).masked_fill(~loss_mask, 0.0)


def value_metrics(valued: Sequence[Valued]) -> dict[str, float]:
    """What the critics of a rollout's segments said, all their trained steps together; empty without a critic.

    value/explained_variance: 1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 as good as a constant;
    NaN if the returns do not vary.
    """
    if not valued:
        return {}
    values = torch.cat([part.values.flatten() for part in valued]).double()
    returns = torch.cat([part.returns.flatten() for part in valued]).double()
    mask = torch.cat([part.mask.flatten() for part in valued])
    _, error = moments(returns - values, mask)
    _, spread = moments(returns, mask)
    (largest,) = distributed.max_over_ranks([float(returns.abs().max()) if len(returns) else 0.0])
    explained = 1.0 - (error / spread) ** 2 if spread > SAME * largest else float("nan")
    return {"value/mean": moments(values, mask)[0], "value/explained_variance": explained}

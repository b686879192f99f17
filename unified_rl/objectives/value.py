"""Value functions: advantages by generalised estimation, the value loss, and how much of the returns it explains."""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, loss_mask: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation over the unmasked steps of each row, the last of which ends its episode.

    delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lambda * A_{t+1} (Schulman et al. 2016, arXiv
    1506.02438, eq. 11 and 16). Masked steps (padding, an environment's tokens, deterministic denoising steps) are no
    decisions: they are passed over and take no discount.

    Args:
        rewards, values: [N, S]; values of masked steps are ignored, whatever they are.
        loss_mask: [N, S] bool.
        gamma, gae_lambda: in [0, 1].

    Returns:
        [N, S] in float64, 0 where masked; the returns are advantages + values.
    """
    assert rewards.shape == values.shape == loss_mask.shape and loss_mask.ndim == 2, "all must be [N, S]"
    rewards = rewards.double().masked_fill(~loss_mask, 0.0)
    values = values.double().masked_fill(~loss_mask, 0.0)
    advantages = torch.zeros_like(values)
    following, running = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for step in reversed(range(values.shape[1])):
        decided = loss_mask[:, step]
        delta = rewards[:, step] + gamma * following - values[:, step]
        running = torch.where(decided, delta + gamma * gae_lambda * running, running)
        following = torch.where(decided, values[:, step], following)
        advantages[:, step] = running.masked_fill(~decided, 0.0)
    return advantages


def gae_over_turns(
    rewards: Tensor, values: Tensor, loss_mask: Tensor, turn_ids: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """`gae` with whole turns as decisions: a turn's reward is the sum over its steps, its value that of its first step.

    Args:
        rewards, values: [N, S].
        loss_mask: [N, S] bool.
        turn_ids: [N, S] int64, from 0, not falling along a row.

    Returns:
        Advantages [N, S] in float64, the same for all steps of a turn, 0 where masked; and bool [N, S]: the first
        unmasked step of each turn, the only one whose value the returns are about.
    """
    assert rewards.shape == turn_ids.shape, "all must be [N, S]"
    num_turns = int(turn_ids.max()) + 1 if turn_ids.numel() else 0
    shape = (len(rewards), num_turns)
    turns = turn_ids.masked_fill(~loss_mask, 0)
    earlier = torch.cat([torch.zeros_like(turns[:, :1]) - 1, turns[:, :-1].masked_fill(~loss_mask[:, :-1], -1)], dim=1)
    first = loss_mask & (turns > earlier.cummax(1).values)
    summed = rewards.new_zeros(shape, dtype=torch.float64)
    summed = summed.scatter_add(1, turns, rewards.double().masked_fill(~loss_mask, 0.0))
    starts = summed.new_zeros(shape).scatter_add(1, turns, values.double().masked_fill(~first, 0.0))
    acted = summed.new_zeros(shape).scatter_add(1, turns, first.double()) > 0
    advantages = gae(summed, starts, acted, gamma=gamma, gae_lambda=gae_lambda)
    return advantages.gather(1, turns).masked_fill(~loss_mask, 0.0), first


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """0.5 * max((V - R)^2, (V_old + clip(V - V_old) - R)^2): PPO's clipped value loss (as in TRL, verl, OpenRLHF).

    Args:
        values, old_values, returns: [B, S]; gradients flow into `values`.
        clip: largest trained distance of values from the old ones, in units of the reward; None: plain squared error.

    Returns:
        The loss of each step, and bool: where the bound cut its gradient; both [B, S].
    """
    plain = 0.5 * (values - returns).square()
    if clip is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    clipped = 0.5 * (bounded - returns).square()
    return torch.max(plain, clipped), clipped > plain

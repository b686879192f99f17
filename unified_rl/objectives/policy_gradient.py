"""Policy-gradient losses of single steps, from log-probs, a mask and advantages.

A loss is a function of tensors and one line in `LOSSES`. What differs between published objectives beyond that is the
level of the ratio (`log_ratios`) and the aggregation (`aggregate.weights`); LUSPO, for instance, is the clip loss with
a sequence ratio and the sequence_sum aggregation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RatioLevel = Literal["token", "sequence"]
Loss = Literal["clip", "cispo", "sapo"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this many nats (ratio 2e-9 to 4.9e8), so that exp cannot overflow; beyond it the
gradient is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The policy loss before aggregation."""

    per_step: Tensor
    """[B, S], 0 where masked."""
    ratio: Tensor
    """[B, S] policy over old policy, 1 where masked; at the sequence level all steps of a row have the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """What a loss of single steps may use."""

    log_probs: Tensor
    ratio: Tensor
    advantages: Tensor
    clip_low: float
    clip_high: float
    dual_clip: float | None
    delta: float | None


LOSSES: dict[str, Callable[[StepTerms], Tensor]] = {
    "clip": lambda terms: clip_loss(
        terms.ratio, terms.advantages, terms.clip_low, terms.clip_high, terms.dual_clip, terms.delta
    ),
    "cispo": lambda terms: cispo_loss(terms.log_probs, terms.ratio, terms.advantages, terms.clip_high),
    "sapo": lambda terms: sapo_loss(terms.ratio, terms.advantages),
}


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    loss: Loss,
    ratio_level: RatioLevel,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> PolicyLoss:
    """Policy loss of each step.

    Args:
        log_probs, old_log_probs, advantages: [B, S]; gradients flow into log_probs only. Values at masked steps are
            ignored, whatever they are.
        loss_mask: [B, S] bool.
        loss: a key of LOSSES.
        ratio_level: see `log_ratios`.
        clip_low, clip_high, dual_clip, delta: see the losses; those that a loss has no use for are ignored.

    Raises:
        ValueError: for an unknown loss or ratio level.
    """
    assert log_probs.shape == advantages.shape, f"log_probs {tuple(log_probs.shape)}, advantages {advantages.shape}"
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r}; known: {', '.join(LOSSES)}")
    ratio = log_ratios(log_probs, old_log_probs, loss_mask, ratio_level).exp()
    terms = StepTerms(
        log_probs=log_probs.masked_fill(~loss_mask, 0.0),
        ratio=ratio,
        advantages=advantages.detach().masked_fill(~loss_mask, 0.0),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        delta=delta,
    )
    per_step = LOSSES[loss](terms).masked_fill(~loss_mask, 0.0)
    return PolicyLoss(per_step=per_step, ratio=ratio.masked_fill(~loss_mask, 1.0))


def log_ratios(log_probs: Tensor, old_log_probs: Tensor, loss_mask: Tensor, level: RatioLevel) -> Tensor:
    """log(policy / old policy) of each step, clamped to +-MAX_LOG_RATIO.

    token: of the step alone. sequence: the mean over the row's unmasked steps, the same for all of them (GSPO, Zheng et
    al. 2025, arXiv 2507.18071, eq. 7); the rows must then hold all their steps, not a window of them.

    Args:
        log_probs, old_log_probs: [B, S]; the old ones are taken as constants.
        loss_mask: [B, S] bool.

    Returns:
        [B, S]; 0 at masked steps at the token level.

    Raises:
        ValueError: for an unknown level.
    """
    shape = log_probs.shape
    assert log_probs.ndim == 2 and old_log_probs.shape == shape, f"{tuple(shape)} and {tuple(old_log_probs.shape)}"
    assert loss_mask.shape == shape and loss_mask.dtype == torch.bool, "loss_mask must be a boolean [B, S]"
    log_ratio = (log_probs - old_log_probs.detach()).masked_fill(~loss_mask, 0.0)
    if level == "sequence":
        num_steps = loss_mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / num_steps).expand(shape)
    elif level != "token":
        raise ValueError(f"ratio level {level!r}; known: token, sequence")
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clip_loss(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Args:
        ratio, advantages: [B, S].
        clip_low, clip_high: distance of the bounds from 1.
        dual_clip: where A < 0, bounds the loss by -dual_clip * A (dual-clip PPO, Ye et al. 2020, arXiv 1912.09729).
        delta: upper bound of the ratio in the unclipped term (INTELLECT-2, arXiv 2505.07291).

    Returns:
        [B, S].
    """
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    unclipped = ratio if delta is None else ratio.clamp(max=delta)
    loss = torch.max(-unclipped * advantages, -clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)


def cispo_loss(log_probs: Tensor, ratio: Tensor, advantages: Tensor, clip_high: float) -> Tensor:
    """-min(ratio, clip_high) * A * log_prob, the weight without gradient: CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4).

    Args:
        log_probs, ratio, advantages: [B, S].
        clip_high: the cap itself (5.0, say), not its distance from 1, and there is no lower bound: as in TRL.

    Returns:
        [B, S].
    """
    return -ratio.detach().clamp(max=clip_high) * advantages * log_probs


def sapo_loss(
    ratio: Tensor, advantages: Tensor, temperature_positive: float = 1.0, temperature_negative: float = 1.05
) -> Tensor:
    """-(4 / tau) * sigmoid(tau * (ratio - 1)) * A, a soft clip: SAPO (Gao et al. 2025, arXiv 2511.20347, eq. 5 and 6).

    Args:
        ratio, advantages: [B, S].
        temperature_positive, temperature_negative: tau where A > 0, and elsewhere.

    Returns:
        [B, S].
    """
    temperature = torch.where(advantages > 0, temperature_positive, temperature_negative).to(ratio)
    return -(4.0 / temperature) * torch.sigmoid(temperature * (ratio - 1.0)) * advantages


def clip_fractions(
    ratio: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Share of unmasked steps whose gradient the clip loss cuts off, below and above.

    Below: ratio < 1 - clip_low and A < 0. Above: ratio > 1 + clip_high and A > 0.

    Args:
        ratio, advantages: [B, S].
        loss_mask: [B, S] bool.

    Returns:
        (low, high), 0-d; 0 if no step is unmasked.
    """
    num_steps = loss_mask.sum().clamp(min=1)
    low = (ratio < 1.0 - clip_low) & (advantages < 0) & loss_mask
    high = (ratio > 1.0 + clip_high) & (advantages > 0) & loss_mask
    return low.sum() / num_steps, high.sum() / num_steps

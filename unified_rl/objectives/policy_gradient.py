"""Policy-gradient losses of single steps, from log-probs, a mask and advantages.

A loss is a function of tensors and one line in `LOSSES`. What differs between published objectives beyond that is the
level of the ratio (`log_ratios`) and the aggregation (`aggregate.weights`); LUSPO, for instance, is the clip loss with
a sequence ratio and the sequence_sum aggregation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

RatioLevel = Literal["token", "sequence", "sequence_token", "sequence_product", "none"]

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
    overflow: Tensor
    """[B, S] bool: where the log-ratio, at its level, was beyond MAX_LOG_RATIO and cut."""
    bounded: tuple[Tensor, Tensor] | None
    """Shares of the unmasked steps, 0-d, whose gradient the loss's own bound cut (cispo: capped), where they would go
    on below and above it; None for a loss without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """What a loss of single steps may use; all tensors [B, S], finite at masked steps."""

    log_probs: Tensor
    old_log_probs: Tensor
    """Without gradient."""
    ratio: Tensor
    advantages: Tensor
    """Without gradient."""
    clip_low: float
    clip_high: float
    dual_clip: float | None
    delta: float | None
    penalty_range: float
    max_divergence: float
    old_kl: Tensor | None
    """Exact divergence from the old policy, for Gaussian steps (mean over dims)."""
    step_std: Tensor | None
    """Full standard deviation of Gaussian steps, without gradient."""

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """`old_kl` and `step_std`, for a loss of Gaussian steps.

        Raises:
            ValueError: if the steps are not Gaussian.
        """
        if self.old_kl is None or self.step_std is None:
            raise ValueError("this loss needs Gaussian steps (a denoiser) and the old policy's means")
        return self.old_kl, self.step_std


LossFunction = Callable[[StepTerms], Tensor]
"""Terms to losses [B, S]; values at masked steps are ignored."""

LOSSES: dict[str, LossFunction] = {
    "clip": lambda terms: clip_loss(
        terms.ratio, terms.advantages, terms.clip_low, terms.clip_high, terms.dual_clip, terms.delta
    ),
    "cispo": lambda terms: cispo_loss(terms.log_probs, terms.ratio, terms.advantages, terms.clip_high),
    "sapo": lambda terms: sapo_loss(terms.ratio, terms.advantages),
    "reinforce": lambda terms: -terms.advantages * terms.log_probs,
    "vespo": lambda terms: vespo_loss(terms.log_probs, terms.ratio, terms.advantages),
    "drpo": lambda terms: penalty_loss(
        terms.ratio, terms.advantages, terms.penalty_range, weight=terms.old_log_probs.clamp(max=MAX_LOG_RATIO).exp()
    ),
    "spo": lambda terms: penalty_loss(terms.ratio, terms.advantages, terms.penalty_range),
    "guard": lambda terms: clip_loss(guard_ratio(terms), terms.advantages, terms.clip_low, terms.clip_high),
    "dppo": lambda terms: dppo_loss(terms.ratio, terms.advantages, terms.gaussian()[0], terms.max_divergence),
}


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    loss: str | LossFunction,
    ratio_level: RatioLevel,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    delta: float | None = None,
    penalty_range: float = 0.2,
    max_divergence: float = 1e-5,
    old_kl: Tensor | None = None,
    step_std: Tensor | None = None,
) -> PolicyLoss:
    """Policy loss of each step.

    Args:
        log_probs, old_log_probs, advantages: [B, S]; gradients flow into log_probs only. Values at masked steps are
            ignored, whatever they are.
        loss_mask: [B, S] bool.
        loss: a key of LOSSES, or a function of `StepTerms` from elsewhere.
        ratio_level: see `log_ratios`.
        clip_low, clip_high, dual_clip, delta, penalty_range, max_divergence: see the losses; those that a loss has no
            use for are ignored.
        old_kl, step_std: [B, S], for the losses of Gaussian steps; see `StepTerms`.

    Raises:
        ValueError: for an unknown loss or ratio level.
    """
    assert log_probs.shape == advantages.shape, f"log_probs {tuple(log_probs.shape)}, advantages {advantages.shape}"
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"loss {loss!r}; known: {', '.join(LOSSES)}")
    function = LOSSES[loss] if isinstance(loss, str) else loss
    log_ratio = log_ratios(log_probs, old_log_probs, loss_mask, ratio_level)
    ratio = log_ratio.exp()
    terms = StepTerms(
        log_probs=log_probs.masked_fill(~loss_mask, 0.0),
        old_log_probs=old_log_probs.detach().masked_fill(~loss_mask, 0.0),
        ratio=ratio,
        advantages=advantages.detach().masked_fill(~loss_mask, 0.0),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        delta=delta,
        penalty_range=penalty_range,
        max_divergence=max_divergence,
        old_kl=None if old_kl is None else old_kl.masked_fill(~loss_mask, 0.0),
        step_std=None if step_std is None else step_std.detach().expand_as(ratio).masked_fill(~loss_mask, 1.0),
    )
    per_step = function(terms).masked_fill(~loss_mask, 0.0)
    return PolicyLoss(
        per_step=per_step,
        ratio=ratio.masked_fill(~loss_mask, 1.0),
        overflow=(log_ratio.detach().abs() >= MAX_LOG_RATIO) & loss_mask,
        bounded=bounded_shares(loss, terms, loss_mask),
    )


def log_ratios(log_probs: Tensor, old_log_probs: Tensor, loss_mask: Tensor, level: RatioLevel) -> Tensor:
    """log(policy / old policy) of each step, clamped to +-MAX_LOG_RATIO.

    token: of the step alone. sequence: the mean over the row's unmasked steps, the same for all of them (GSPO, Zheng et
    al. 2025, arXiv 2507.18071, eq. 7); the rows must then hold all their steps, not a window of them. sequence_token:
    the same value, but each step has the gradient of its own log-prob (GSPO-token, eq. 13). sequence_product: the sum
    over the row's steps, which is the sequence's exact ratio (RLOO in TRL). none: 0, a ratio of 1.

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
    if level == "sequence_product":
        log_ratio = log_ratio.sum(1, keepdim=True).expand(shape)
    elif level in ("sequence", "sequence_token"):
        num_steps = loss_mask.sum(1, keepdim=True).clamp(min=1)
        mean = (log_ratio.sum(1, keepdim=True) / num_steps).expand(shape)
        log_ratio = mean if level == "sequence" else mean.detach() + (log_ratio - log_ratio.detach())
    elif level == "none":
        log_ratio = torch.zeros_like(log_ratio).detach()
    elif level != "token":
        raise ValueError(f"ratio level {level!r}; known: {', '.join(get_args(RatioLevel))}")
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


VESPO_SHAPES = ((2.0, 3.0), (3.0, 2.0))
"""(k, lambda) where A >= 0, and where A < 0, as in TRL."""


def vespo_loss(log_probs: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
    """-phi(w) * A * log_prob with phi(w) = w^k * exp(lambda * (1 - w)) of the sequence's exact ratio w, without
    gradient: VESPO (arXiv 2602.10693), which turns a far sequence down instead of cutting it.

    Args:
        log_probs, ratio, advantages: [B, S]; the ratio at the level sequence_product.

    Returns:
        [B, S].
    """
    weight = ratio.detach().clamp(min=1e-8)
    (k, scale), (k_negative, scale_negative) = VESPO_SHAPES
    power = torch.where(advantages >= 0, k, k_negative)
    decay = torch.where(advantages >= 0, scale, scale_negative)
    return -(power * weight.log() + decay * (1.0 - weight)).exp() * advantages * log_probs


def penalty_loss(ratio: Tensor, advantages: Tensor, penalty_range: float, weight: Tensor | None = None) -> Tensor:
    """-ratio * A + weight * |A| * (ratio - 1)^2 / (2 * penalty_range): a quadratic pull to 1 in place of the clip.

    Without a weight: SPO (Xie et al. 2024, arXiv 2401.16025, eq. 11), whose minimum for A > 0 lies at
    1 + penalty_range. With the old policy's probability of the step as the weight the gradient is scaled by
    1 - sign(A) * (probability - old probability) / penalty_range, so that rare tokens may move far: UniRL's DRPO
    (penalty_range 12.5), verl's spo_adaptive_eps.

    Args:
        ratio, advantages: [B, S].
        penalty_range: above 0.
        weight: [B, S] constant, or None for 1.

    Returns:
        [B, S].
    """
    penalty = advantages.abs() * (ratio - 1.0).square() / (2.0 * penalty_range)
    return -ratio * advantages + (penalty if weight is None else penalty * weight)


def guard_ratio(terms: StepTerms) -> Tensor:
    """exp((log ratio + KL(old, now)) * std): the ratio of a Gaussian step with its bias and its scale removed.

    A Gaussian log-ratio has mean -KL under the old policy and shrinks with the step's std, so that a fixed clip range
    cuts early steps more than late ones: GRPO-Guard's RatioNorm (Wang et al. 2025, arXiv 2510.22319). On-policy its
    gradient is std times REINFORCE's. The paper also divides the loss by the step's dt, which is left out here, as
    Flow-Factory does.
    """
    old_kl, step_std = terms.gaussian()
    log_ratio = terms.ratio.log() + old_kl
    return (log_ratio * step_std).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def dppo_loss(ratio: Tensor, advantages: Tensor, old_kl: Tensor, max_divergence: float) -> Tensor:
    """-ratio * A, but 0 where the step has left the trust region and would go on outwards.

    Left: divergence from the old policy of at least `max_divergence`. Outwards: ratio > 1 with A > 0, or ratio < 1 with
    A < 0. Flow-DPPO (Ping et al. 2026, arXiv 2606.11025): the exact divergence in place of a noisy single ratio.

    Args:
        ratio, advantages, old_kl: [B, S].

    Returns:
        [B, S].
    """
    outwards = ((ratio > 1.0) & (advantages > 0)) | ((ratio < 1.0) & (advantages < 0))
    return (-ratio * advantages).masked_fill((old_kl.detach() >= max_divergence) & outwards, 0.0)


@torch.no_grad()
def bounded_shares(loss: str | LossFunction, terms: StepTerms, loss_mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """`PolicyLoss.bounded`; None also for a loss from elsewhere."""
    if loss in ("clip", "guard"):
        ratio = terms.ratio if loss == "clip" else guard_ratio(terms)
        return clip_fractions(ratio, terms.advantages, loss_mask, terms.clip_low, terms.clip_high)
    num_steps = loss_mask.sum().clamp(min=1)
    if loss == "cispo":
        capped = (terms.ratio > terms.clip_high) & loss_mask
        return torch.zeros_like(num_steps), capped.sum() / num_steps
    if loss == "dppo":
        left = (terms.gaussian()[0] >= terms.max_divergence) & loss_mask
        low, high = (terms.ratio < 1.0) & (terms.advantages < 0), (terms.ratio > 1.0) & (terms.advantages > 0)
        return (left & low).sum() / num_steps, (left & high).sum() / num_steps
    return None


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

"""Transitions of masked (absorbing) discrete diffusion, and the masks that its likelihood is estimated with.

A step of a sampler commits some of the masked tokens. Its log-prob is the sum over the committed tokens of the log of
their probability; which of the drawn tokens are kept (the most confident ones) is a rule of the sampler, not a decision
of the policy. The estimators forget the path and mask the finished sample again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.transitions import categorical


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """Log-probs of one state's committed tokens."""

    total: Tensor
    """[B] sum over the tokens, in nats; 0 where none is committed."""
    count: Tensor
    """[B] tokens."""

    @property
    def mean(self) -> Tensor:
        """[B] mean over the tokens."""
        return self.total / self.count.clamp(min=1)


def log_prob(logits: Tensor, tokens: Tensor, committed: Tensor) -> Committed:
    """Log-prob of the tokens that a step commits.

    Args:
        logits: [B, L, V] of the state before the step, as the tokens were drawn from.
        tokens: [B, L] the state after it.
        committed: [B, L] bool.
    """
    chosen = torch.where(committed, tokens, 0)  # elsewhere there may be a mask token, which has no logit
    log_probs = categorical.log_probs(logits, chosen).masked_fill(~committed, 0.0)
    return Committed(total=log_probs.sum(1), count=committed.sum(1))


def random_masks(num: int, length: int, *, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Masks [num, length] of a sample, each with a ratio of its own, uniform in [low, high], and one token at least.

    UniGRPO's estimator: the log-likelihood is the mean over the masked tokens, then over the masks (Yang et al. 2025,
    MMaDA, arXiv 2505.15809, section 3.3).
    """
    ratios = low + (high - low) * torch.rand(num, 1, generator=generator)
    order = torch.rand(num, length, generator=generator)
    count = (ratios * length).round().clamp(min=1, max=length)
    return order.argsort(1).argsort(1) < count


def coupled_masks(num: int, length: int, *, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Pairs of complementary masks [2 num, length]: every token is scored once a pair, so that the estimate varies less
    (Gong et al. 2025, DiffuCoder, arXiv 2506.20639, section 4.2). Both of a pair hold one token at least."""
    if length < 2:
        raise ValueError("complementary masks need two tokens")
    ratios = low + (high - low) * torch.rand(num, 1, generator=generator)
    order = torch.rand(num, length, generator=generator)
    count = (ratios * length).round().clamp(min=1, max=length - 1)
    masks = order.argsort(1).argsort(1) < count
    return torch.stack([masks, ~masks], dim=1).flatten(0, 1)

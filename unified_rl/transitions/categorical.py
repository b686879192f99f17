"""Log-probs and entropy of categorical steps (text, image or action tokens).

Logits are the processed ones that the token was drawn from: temperature, guidance and suppressed tokens (-inf) applied.
"""

from torch import Tensor

from unified_rl.transitions.gaussian import at_least_float32


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-prob of each token, in nats, float32 or better.

    Computed as logit - logsumexp, for which autograd keeps the logits alone and no log-softmax beside them.

    Args:
        logits: [B, S, V]; -inf marks suppressed tokens, at least one of V must be finite.
        tokens: [B, S] int64. A suppressed one has log-prob -inf.

    Returns:
        [B, S]. Gradients are finite, suppressed tokens get 0.
    """
    assert logits.ndim == 3 and tokens.shape == logits.shape[:2], f"{tuple(logits.shape)} and {tuple(tokens.shape)}"
    logits = at_least_float32(logits)
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each distribution, in nats, float32 or better.

    Args:
        logits: [B, S, V]; -inf marks suppressed tokens, at least one of V must be finite.

    Returns:
        [B, S]. Value and gradients are finite: a suppressed token adds 0, the limit of p log p.
    """
    assert logits.ndim == 3, f"logits {tuple(logits.shape)} must be [B, S, V]"
    log_p = at_least_float32(logits).log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)

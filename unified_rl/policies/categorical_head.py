"""The policy head of a language model: its logits processors, drawing from them and scoring under them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from unified_rl.recipe.policy import TokenSampling
from unified_rl.transitions import categorical

CHUNK_ELEMENTS = 1 << 24
"""Logits that are processed at once in scoring: 64 MiB in float32."""


def processors(settings: TokenSampling, suppressed: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """The behaviour policy: what turns the model's logits into the distribution that a token is drawn from."""
    chain = LogitsProcessorList([SuppressTokensLogitsProcessor(list(suppressed), device=str(device))])
    if settings.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k is not None:
        chain.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1.0:
        chain.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        chain.append(MinPLogitsWarper(settings.min_p))
    return chain


def draw(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by inverting the distribution function.

    Args:
        scores: [B, V] processed logits.
        uniforms: [B] float64 in [0, 1).

    Returns:
        Tokens [B] and their log-probs [B] in nats.
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    threshold = uniforms[:, None].to(scores.device) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[-1] - 1)
    return tokens[:, 0], categorical.log_probs(scores[:, None], tokens)[:, 0]


class CategoricalHead(LogitsProcessor):
    """Draws inside `generate`: the last logits processor, after which only the drawn token's score is finite, so that
    greedy decoding takes it."""

    def __init__(self, uniforms: Tensor) -> None:
        self._uniforms = uniforms
        """[B, S] float64 in [0, 1): one number a row and step."""
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, log_probs = draw(scores, self._uniforms[:, len(self.log_probs)])
        self.log_probs.append(log_probs)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


def score(
    logits: Tensor, tokens: Tensor, chain: LogitsProcessorList, temperature: float, *, entropy: str
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy of tokens under the processed distribution, without a processed copy of all logits.

    Rows are processed a chunk at a time, in float32. With gradients a chunk is processed again in the backward pass,
    so that what stays in memory is the model's logits in its own dtype, their gradient, and one chunk.

    Args:
        logits: [B, S, V] as the model gives them.
        tokens: [B, S].
        temperature: of `chain`.
        entropy: "none", "value" (no gradient flows through it) or "gradient".

    Returns:
        Log-probs [B, S] and entropy [B, S] or None, in nats.
    """
    num_vocabulary = logits.shape[-1]
    rows = max(1, CHUNK_ELEMENTS // num_vocabulary)
    # split (not slices): its backward joins the chunks' gradients once, a slice's would allocate all of them each time.
    chunks = zip(logits.flatten(0, 1).split(rows), tokens.flatten().split(rows), strict=True)
    results = []
    for chunk, chosen in chunks:
        if torch.is_grad_enabled() and chunk.requires_grad and logits.numel() > CHUNK_ELEMENTS:
            results.append(checkpoint(_score_chunk, chunk, chosen, chain, temperature, entropy, use_reentrant=False))
        else:
            results.append(_score_chunk(chunk, chosen, chain, temperature, entropy))
    log_probs = torch.cat([log_probs for log_probs, _ in results]).view_as(tokens)
    if entropy == "none":
        return log_probs, None
    return log_probs, torch.cat([values for _, values in results if values is not None]).view_as(tokens)


def _score_chunk(
    logits: Tensor, tokens: Tensor, chain: LogitsProcessorList, temperature: float, entropy: str
) -> tuple[Tensor, Tensor | None]:
    """[R, V] logits and [R] tokens to [R] log-probs and entropy."""
    raw = logits.float()
    chosen = tokens[:, None]
    flat = chain(chosen, raw)  # type: ignore[arg-type]  # annotated as LongTensor
    # At the edge of top-k, top-p or min-p, rounding may drop a token that was drawn; it stays a candidate.
    dropped = flat.gather(-1, chosen).isneginf()
    if dropped.any():
        kept = torch.where(dropped, raw.gather(-1, chosen) / temperature, flat.gather(-1, chosen))
        flat = flat.scatter(-1, chosen, kept)
    log_probs = categorical.log_probs(flat[:, None], chosen)[:, 0]
    if entropy == "none":
        return log_probs, None
    return log_probs, categorical.entropy((flat if entropy == "gradient" else flat.detach())[:, None])[:, 0]

"""Guided drawing of image tokens, and its scoring: the same distribution in both.

With classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) a token is drawn from the softmax of
`unconditional + scale * (conditional - unconditional)`, processed by the behaviour policy's logits processors. That
mixture is the policy: it is what scoring evaluates, with gradients through both rows. Only the image head is evaluated,
and only where a token is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

from unified_rl.policies.categorical_head import draw, score
from unified_rl.policies.image_families import DRAWN, ImageFamily

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt and of its unconditional counterpart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How tokens are drawn."""

    family: ImageFamily
    chain: LogitsProcessorList
    temperature: float
    guidance_scale: float
    pad_id: int

    @property
    def num_tokens(self) -> int:
        """S, the tokens of a picture that are drawn."""
        return self.family.layout.count(DRAWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """Prompts as the language model reads them, conditional ones first, padded on the left."""

    ids: Tensor
    """[R, L]."""
    mask: Tensor
    """[R, L] int64, 0 at padding."""

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def after(self, offsets: Tensor) -> Tensor:
        """Positions of what follows the prompts: [R, S] for offsets [S], [axes, R, S] for [axes, S]."""
        return self.mask.sum(1, keepdim=True) + offsets.to(self.mask.device)[..., None, :]


def sample(model: Any, drawing: Drawing, rows: Sequence[Row], uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one picture a row, without gradients; each distinct prompt is computed once.

    Args:
        uniforms: [B, S] float64 in [0, 1).

    Returns:
        Codes [B, S] and their log-probs [B, S] in nats, on the CPU.
    """
    family, backbone = drawing.family, drawing.family.backbone(model)
    sides = _sides(rows, drawing.guidance_scale)
    distinct = list(dict.fromkeys(sides))
    prompts = _collate(distinct, drawing.pad_id, model.device)
    cache = DynamicCache(config=backbone.config)
    codes = torch.zeros(uniforms.shape, dtype=torch.int64)
    log_probs = torch.zeros(uniforms.shape)
    with torch.no_grad():
        hidden = backbone(
            inputs_embeds=model.get_input_embeddings()(prompts.ids),
            attention_mask=prompts.mask,
            position_ids=prompts.positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        owner = torch.tensor([distinct.index(side) for side in sides], device=model.device)
        cache.reorder_cache(owner)  # type: ignore[arg-type]  # annotated as LongTensor
        hidden, mask = hidden[owner], prompts.mask[owner]
        positions = prompts.after(family.offsets)[..., owner, :]
        step = 0
        for place, token in enumerate(family.layout):
            if token == DRAWN:
                guided = _guide(family.logits(model, hidden), drawing.guidance_scale)
                chosen, chosen_log_probs = draw(drawing.chain(codes, guided), uniforms[:, step])  # type: ignore[arg-type]
                codes[:, step], log_probs[:, step] = chosen.cpu(), chosen_log_probs.cpu()
                embeds = family.embed(model, chosen.repeat(len(sides) // len(rows))[:, None])
                step += 1
            else:
                fixed = torch.full((len(sides), 1), token, device=model.device)
                embeds = model.get_input_embeddings()(fixed)
            if place == len(family.layout) - 1:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            hidden = backbone(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions[..., place : place + 1],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
    return codes, log_probs


def evaluate(
    model: Any, drawing: Drawing, rows: Sequence[Row], codes: Tensor, *, entropy: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probs and entropy [B, S] of drawn codes [B, S], in one teacher-forced forward over all rows; and the last
    hidden states [B, S, H] that predicted them, of the conditional rows.

    Args:
        entropy: as in `categorical_head.score`.
    """
    family = drawing.family
    sides = _sides(rows, drawing.guidance_scale)
    copies = len(sides) // len(rows)
    prompts = _collate(sides, drawing.pad_id, model.device)
    codes = codes.to(model.device)
    is_drawn = torch.tensor([token == DRAWN for token in family.layout], device=model.device)
    fixed = torch.tensor(family.layout, device=model.device).clamp(min=0)
    words = model.get_input_embeddings()
    read = words(fixed)[None].repeat(len(rows), 1, 1)  # [B, layout, D]
    read = read.masked_scatter(is_drawn[None, :, None], family.embed(model, codes).to(read.dtype))
    # The last token is drawn and never read.
    embeds = torch.cat([words(prompts.ids), read[:, :-1].repeat(copies, 1, 1)], dim=1)
    mask = torch.cat([prompts.mask, prompts.mask.new_ones(len(sides), read.shape[1] - 1)], dim=1)
    behind = prompts.after(family.offsets[..., :-1])
    positions = torch.cat([prompts.positions.expand(*behind.shape[:-1], -1), behind], dim=-1)
    hidden = (
        family.backbone(model)(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        )
        .last_hidden_state[:, prompts.ids.shape[1] - 1 :]
        [:, is_drawn]
    )  # fmt: skip
    guided = _guide(family.logits(model, hidden), drawing.guidance_scale)
    log_probs, entropies = score(guided, codes, drawing.chain, drawing.temperature, entropy=entropy)
    return log_probs, entropies, hidden[: len(rows)]


def _sides(rows: Sequence[Row], scale: float) -> list[tuple[int, ...]]:
    """The prompts, then if they are guided their unconditional counterparts."""
    conditional = [prompt for prompt, _ in rows]
    return conditional if scale == 1.0 else [*conditional, *(empty for _, empty in rows)]


def _collate(sides: Sequence[tuple[int, ...]], pad_id: int, device: torch.device) -> _Prompts:
    length = max(map(len, sides))
    ids = [[pad_id] * (length - len(side)) + list(side) for side in sides]
    mask = [[0] * (length - len(side)) + [1] * len(side) for side in sides]
    return _Prompts(ids=torch.tensor(ids, device=device), mask=torch.tensor(mask, device=device))


def _guide(logits: Tensor, scale: float) -> Tensor:
    """[B, ...] float32 guided logits, of [B, ...] ones or, with guidance, [2 B, ...] (conditional ones first)."""
    if scale == 1.0:
        return logits.float()
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)

"""From pictures back to a pipeline's finished latents, without code for the pipeline.

What a pipeline does with its finished latents before it decodes them (unpacking, scale, shift, per-channel statistics)
moves every number to a place and scales it. That map is measured once: the pipeline's own loop is fast-forwarded to
known latents, and what reaches the VAE's decoder is taken. Its inverse turns the encoding of a picture into latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.policies.scheduler_head import UnsupportedPipelineError

BASE = 16
"""Places are measured digit by digit in this base, so that low precision cannot confuse them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentMap:
    """decoded[p] = scale[p] * latents[place[p]] + shift[p], flat, for one row."""

    latents_shape: tuple[int, ...]
    decoded_shape: tuple[int, ...]
    place: Tensor
    scale: Tensor
    shift: Tensor

    def latents_of(self, decoded: Tensor) -> Tensor:
        """Finished latents [B, ...] of what the decoder would get, [B, ...]."""
        flat = (decoded.flatten(1).float() - self.shift) / self.scale
        latents = torch.empty_like(flat)
        latents[:, self.place] = flat
        return latents.reshape(-1, *self.latents_shape)


def measure(before_decoding: Callable[[Tensor], Tensor], latents_shape: tuple[int, ...]) -> LatentMap:
    """The map of a pipeline.

    Args:
        before_decoding: from finished latents [1, ...] to what reaches the decoder, [1, ...].

    Raises:
        UnsupportedPipelineError: if it is no such map.
    """
    size = math.prod(latents_shape)
    zero = torch.zeros(1, *latents_shape)
    decoded = before_decoding(zero)
    shift = decoded.flatten().float()
    scale = before_decoding(zero + 1.0).flatten().float() - shift
    if len(shift) != size or bool((scale == 0).any()):
        raise UnsupportedPipelineError("finished latents and what is decoded are not the same numbers")
    index, place, unit = torch.arange(size), torch.zeros(size, dtype=torch.int64), 1
    while unit < size:
        digits = (index // unit % BASE).float().reshape(1, *latents_shape)
        found = ((before_decoding(digits).flatten().float() - shift) / scale).round().long()
        place += unit * found
        unit *= BASE
    if not torch.equal(place.sort().values, index):
        raise UnsupportedPipelineError("finished latents are mixed before they are decoded")
    return LatentMap(
        latents_shape=latents_shape, decoded_shape=tuple(decoded.shape[1:]), place=place, scale=scale, shift=shift
    )

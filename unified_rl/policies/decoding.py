"""Pictures that are no pictures: a decoder in half precision may give NaN (SDXL's is known for it), which becomes black
without a word on the way to a picture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def watched_decoder(pipeline: Any, num_rows: int) -> Iterator[Callable[[], list[bool]]]:
    """Look at what the decoders of a pipeline's autoencoders give in this block.

    Yields:
        A function that says of each row whether something was not finite. Where decoders run in pieces that do not tell
        the rows apart (tiles, frames), all rows count as spoiled if one piece is.
    """
    seen: list[Tensor] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(~output.detach().flatten(1).isfinite().all(1).cpu())

    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    decoders = [child for part in parts for name, child in part.named_children() if name == "decoder"]
    handles = [decoder.register_forward_hook(look) for decoder in decoders]
    try:
        yield lambda: _by_row(seen, num_rows)
    finally:
        for handle in handles:
            handle.remove()


def _by_row(seen: list[Tensor], num_rows: int) -> list[bool]:
    if not any(bool(flags.any()) for flags in seen):
        return [False] * num_rows
    if all(len(flags) == num_rows for flags in seen):
        return torch.stack(seen).any(0).tolist()
    joined = torch.cat(seen)
    if len(joined) == num_rows:  # decoded one by one, in slices
        return joined.tolist()
    return [True] * num_rows

"""Remembers what a pipeline's frozen encoders made of pictures, row by row: a window of other rows than those that were
sampled together finds them, so that its replay runs no VAE."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from torch import Tensor

from unified_rl.policies.memo import Memo, OpaqueError, fingerprint

MIN_DIMS = 4
"""Of a batch: rows, channels, and two or three sides."""


class PictureMemo(Memo):
    """A memo of encoders, of pictures too."""

    def __init__(self, *max_bytes: int) -> None:
        super().__init__(*max_bytes)
        self._examples: dict[Hashable, Any] = {}
        """A result of each function of pictures, by its name and the other arguments; None: it has no row for each."""

    def pictures(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """As `whole`, of a function whose first argument is a batch of pictures or videos, each encoded alone: rows
        that were encoded before, whatever lay beside them, are put together, and not encoded again."""
        if not args or not isinstance(args[0], Tensor) or args[0].ndim < MIN_DIMS:
            return self.whole(name, function, args, kwargs)
        try:
            shared = (name, fingerprint(args[1:]), fingerprint(kwargs))
        except OpaqueError:
            return self.whole(name, function, args, kwargs)
        if shared in self._examples and self._examples[shared] is None:
            return self.whole(name, function, args, kwargs)
        keys = [(*shared, fingerprint(row)) for row in args[0]]
        if not self.knows(keys):
            with torch.no_grad():
                result = function(*args, **kwargs)
            rows = tensor_of(result)
            if rows is None or len(rows) != len(keys):
                self._examples[shared] = None
                return self.whole(name, lambda *_, **__: result, args, kwargs)
            self._examples[shared] = with_tensor(result, rows[:0])
            for key, row in zip(keys, rows, strict=True):
                self._put(key, row.clone())
            if not self.knows(keys):  # more than it holds
                return result
        return with_tensor(self._examples[shared], torch.stack([self._get(key) for key in keys]))


def tensor_of(result: Any) -> Tensor | None:
    """The one tensor, with a row for each picture, that a VAE's encoding consists of; None: it is of another kind."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, DiagonalGaussianDistribution):
        return result.parameters
    if isinstance(result, BaseOutput | tuple):
        parts = [*result.values()] if isinstance(result, BaseOutput) else [*result]
        return tensor_of(parts[0]) if len(parts) == 1 else None
    return None


def with_tensor(result: Any, rows: Tensor) -> Any:
    """An encoding of the same kind with other rows in its one tensor."""
    if isinstance(result, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(rows, deterministic=result.deterministic)
    if isinstance(result, BaseOutput):
        ((name, part),) = result.items()
        return type(result)(**{name: with_tensor(part, rows)})
    return (with_tensor(result[0], rows),) if isinstance(result, tuple) else rows

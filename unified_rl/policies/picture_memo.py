"""Remembers what a pipeline's frozen encoders made of batches, row by row: a window of other rows than those that were
sampled together finds them, so that its replay runs no encoder."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from unified_rl.policies import row_split
from unified_rl.policies.memo import Memo, OpaqueError, fingerprint


class PictureMemo(Memo):
    """A memo of encoders, also of those that take batches of tensors."""

    def batch(self, name: str, function: Callable, args: tuple, kwargs: dict, *, min_dims: int) -> Any:
        """As `whole`, of a function of a batch of pictures, sounds or texts, each encoded alone: rows that were encoded
        before, whatever lay beside them, are put together, and not encoded again.

        Args:
            min_dims: dimensions of a batch's tensors, at least; another call is not of rows.
        """
        named = [*enumerate(args), *sorted(kwargs.items())]
        given = [(key, value) for key, value in named if isinstance(value, Tensor)]
        counts = {len(value) if value.ndim >= min_dims else 0 for _, value in given}
        if len(counts) != 1 or 0 in counts:
            return self.whole(name, function, args, kwargs)
        try:
            shared = tuple((key, fingerprint(value)) for key, value in named if not isinstance(value, Tensor))
        except OpaqueError:
            return self.whole(name, function, args, kwargs)
        form = (name, shared, tuple(key for key, _ in given))
        num_rows = counts.pop()
        keys = [(*form, tuple(fingerprint(value[row]) for _, value in given)) for row in range(num_rows)]
        layout = self._layouts.get(form)
        if form in self._layouts and layout is None:
            return self.whole(name, function, args, kwargs)
        if layout is not None and self.knows(keys):
            with suppress(row_split.RowsDifferError):
                return row_split.join([self._get(key) for key in keys], layout, like=self._examples[form])
        with torch.no_grad():
            result = function(*args, **kwargs)
        layout = self._layouts[form] = row_split.layout_of_batch(result, num_rows)
        if layout is None:
            return self.whole(name, lambda *_, **__: result, args, kwargs)
        self._examples[form] = row_split.emptied(result, layout)
        rows = [row_split.take(result, layout, row, num_rows) for row in range(num_rows)]
        for row, key in zip(rows, keys, strict=True):
            self._put(key, row)
        # Not the result itself: what is computed from it would round by how it lies in memory.
        return row_split.join(rows, layout, like=self._examples[form])

"""Remembers what a pipeline's frozen encoders made of batches, row by row: a window of other rows than those that were
sampled together finds them, so that its replay runs no encoder."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from unified_rl.policies import row_split
from unified_rl.policies.memo import Memo, OpaqueError, fingerprint

row_split.CONTAINERS[DiagonalGaussianDistribution] = (
    lambda value: [value.parameters],
    lambda like, parts: DiagonalGaussianDistribution(parts[0], deterministic=like.deterministic),
)
row_split.CONTAINERS[OobleckDiagonalGaussianDistribution] = (
    lambda value: [value.parameters],
    lambda _, parts: OobleckDiagonalGaussianDistribution(parts[0]),
)


class PictureMemo(Memo):
    """A memo of encoders, also of those that take batches of tensors."""

    def batch(
        self, name: str, function: Callable, args: tuple, kwargs: dict, *, min_dims: int, keep: bool = True
    ) -> Any:
        """As `whole`, of a function of a batch of pictures, sounds or texts, each encoded alone: rows that were encoded
        before, whatever lay beside them, are put together, and not encoded again.

        Args:
            min_dims: dimensions of a batch's tensors, at least; another call is not of rows.
            keep: False: what is known is found, but nothing is remembered.
        """
        named = [*enumerate(args), *sorted(kwargs.items())]
        given = [(key, value) for key, value in named if isinstance(value, Tensor)]
        counts = {len(value) if value.ndim >= min_dims else 0 for _, value in given}
        whole: Callable = self.whole if keep else _unremembered
        if len(counts) != 1 or 0 in counts:
            return whole(name, function, args, kwargs)
        try:
            shared = tuple((key, fingerprint(value)) for key, value in named if not isinstance(value, Tensor))
        except OpaqueError:
            return whole(name, function, args, kwargs)
        form = (name, shared, tuple(key for key, _ in given))
        num_rows = counts.pop()
        keys = [(*form, tuple(fingerprint(value[row]) for _, value in given)) for row in range(num_rows)]

        def first(count: int) -> Any:
            """The result for the first row, so many times."""
            index = [0] * count
            with torch.no_grad():
                return function(
                    *(value[index] if isinstance(value, Tensor) else value for value in args),
                    **{key: value[index] if isinstance(value, Tensor) else value for key, value in kwargs.items()},
                )

        if not keep:
            found = self._known(form, keys)
            return _unremembered(name, function, args, kwargs) if found is None else found
        return self._in_rows(form, keys, functools.partial(function, *args, **kwargs), first)

    def of_rows(self, name: str, function: Callable, args: tuple, kwargs: dict, rows: Sequence[Any]) -> Any:
        """As `whole`, of a function whose arguments do not say what belongs to which row, such as the pictures of all
        rows in one list. Rows are encoded together, as padded as they are then, and found again in other batches.

        Args:
            rows: what a row's result depends on, for each.
        """
        num_rows = len(rows)
        named = [*enumerate(args), *sorted(kwargs.items())]
        many = [value for _, value in named if isinstance(value, (list, Tensor))]
        texts = [value for value in many if len(value) == num_rows]
        try:
            form = (
                name,
                tuple((key, fingerprint(value)) for key, value in named if all(value is not it for it in many)),
            )
            keys = [
                (*form, fingerprint(rows[row]), fingerprint([text[row] for text in texts])) for row in range(num_rows)
            ]
        except OpaqueError:
            return self.whole(name, function, args, kwargs)
        return self._in_rows(form, keys, functools.partial(function, *args, **kwargs), None)

    def _in_rows(
        self,
        form: Hashable,
        keys: Sequence[Hashable],
        compute: Callable[[], Any],
        first: Callable[[int], Any] | None,
    ) -> Any:
        """The result for the rows of `keys`, computed for all of them unless all are known.

        Args:
            first: computes the result for the first row alone, so many times, to learn what rows share; None: it cannot
                be computed alone.
        """
        found = self._known(form, keys)
        if found is not None:
            return found
        if form in self._layouts and self._layouts[form] is None:
            return self._at_once((form, tuple(keys)), compute)
        with torch.no_grad():
            result = compute()
        if form not in self._layouts:
            self._layouts[form] = _learned(result, len(keys), first)
        layout = self._layouts[form]
        if layout is None or not row_split.fits(result, layout, len(keys)):
            self._layouts[form] = None
            return self._at_once((form, tuple(keys)), lambda: result)
        self._examples[form] = row_split.emptied(result, layout)
        rows = [row_split.take(result, layout, row, len(keys)) for row in range(len(keys))]
        # Not the result itself: what is computed from it would round by how it lies in memory.
        joined = row_split.join(rows, layout, like=self._examples[form])
        for row, key in zip(rows, keys, strict=True):
            self._put(key, row)
        return joined

    def _at_once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        if self.knows([key]):
            return self._get(key)
        with torch.no_grad():
            result = compute()
        self._put(key, result)
        return result


def _learned(result: Any, num_rows: int, first: Callable[[int], Any] | None) -> row_split.Layout | None:
    """The layout of a function's results, of which `result` is that for so many rows."""
    layout = row_split.layout_of_batch(result, num_rows)
    lone = num_rows == 1 and row_split.num_tensors(result) > 1  # one of them may be shared by all rows
    if first is None or (layout is not None and not lone):
        return layout
    layout = row_split.layout_of(result if num_rows == 1 else first(1), first(2))
    return None if layout is None or layout.has("blocks") else layout  # whose order one row alone does not show


def _unremembered(name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    return function(*args, **kwargs)

"""Remembers what frozen encoders gave, so that replaying a rollout never runs them again.

A memoised function's rows are kept one by one where its result splits by row, so that a window of other rows than those
that were sampled together finds them, and equal rows (the same prompt in a group) are computed once. Everything else is
kept by the content of the whole call. What cannot be fingerprinted (a random generator among the arguments) is computed
every time.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unified_rl.recipe.policy import REMEMBERED_BYTES


class OpaqueError(Exception):
    """An argument has no content to compare by."""


def fingerprint(value: Any) -> Hashable:
    """Equal for equal content.

    Raises:
        OpaqueError: if there is none to compare by.
    """
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return ("tensor", str(value.dtype), tuple(value.shape), hashlib.sha256(raw).digest())
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).digest())
    if isinstance(value, Image.Image):
        return ("image", value.mode, value.size, hashlib.sha256(value.tobytes()).digest())
    if isinstance(value, (list, tuple)):
        return tuple(fingerprint(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, fingerprint(item)) for key, item in sorted(value.items()))
    if value is None or isinstance(value, (str, bool, int, float, torch.device, torch.dtype)):
        return (type(value).__name__, value)
    raise OpaqueError


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_num_bytes(item) for item in value)
    return 0


class Memo:
    """A content-addressed store of results, the least recently used ones dropped beyond `max_bytes`."""

    def __init__(self, max_bytes: int = REMEMBERED_BYTES) -> None:
        self._store: OrderedDict[Hashable, Any] = OrderedDict()
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._layouts: dict[Hashable, tuple[bool, ...] | None] = {}
        """Of a function's results, by its name and the arguments that rows share; None: they do not split."""

    def _put(self, key: Hashable, value: Any) -> None:
        self._held_bytes += _num_bytes(value) - _num_bytes(self._store.get(key))
        self._store[key] = value
        while self._held_bytes > self._max_bytes and len(self._store) > 1:
            _, dropped = self._store.popitem(last=False)
            self._held_bytes -= _num_bytes(dropped)

    def _get(self, key: Hashable) -> Any:
        self._store.move_to_end(key)
        return self._store[key]

    def knows(self, keys: Sequence[Hashable]) -> bool:
        """Whether all of them are kept."""
        return all(key in self._store for key in keys)

    def whole(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """`function(*args, **kwargs)` without gradients, remembered by the content of the arguments."""
        try:
            key = (name, fingerprint(args), fingerprint(kwargs))
        except OpaqueError:
            key = None
        if key is not None and key in self._store:
            return self._get(key)
        with torch.no_grad():
            result = function(*args, **kwargs)
        if key is not None:
            self._put(key, result)
        return result

    def by_row(self, name: str, function: Callable, args: tuple, kwargs: dict, num_rows: int) -> Any:
        """As `whole`, but row by row: lists of length `num_rows` and tensors with that leading dimension are per row,
        everything else is shared; of the result, tensors that do not grow with the rows are shared by all (FLUX's
        positions of its tokens). A result that does not split falls back to `whole`."""
        try:
            shared, rows = _split_arguments(args, kwargs, num_rows)
        except OpaqueError:
            return self.whole(name, function, args, kwargs)

        def compute(*index: int) -> Any:
            with torch.no_grad():
                return function(
                    *(_pick(value, index, num_rows) for value in args),
                    **{name: _pick(value, index, num_rows) for name, value in kwargs.items()},
                )

        keys = [(name, shared, row) for row in rows]
        wanted = {key: index for index, key in enumerate(keys) if key not in self._store}
        for key, index in wanted.items():
            # One by one: the result must depend on the row alone, not on which others were missing beside it.
            result = compute(index)
            if (name, shared) not in self._layouts:
                once = has_rows(result, 1)
                self._layouts[name, shared] = _all_rows(result) if once else _layout(result, compute(index, index))
            layout = self._layouts[name, shared]
            if layout is None:
                return self.whole(name, function, args, kwargs)
            self._put(key, _row(result, layout, 0))
        found, known = [self._get(key) for key in keys], self._layouts[name, shared]
        assert known is not None, "rows of what has no rows are never kept"
        shapes = {tuple(None if part is None else part.shape for part in row) for row in found}
        if len(shapes) > 1:
            # Cut or padded to the batch: the rows belong together as this batch encodes them, and a later window of
            # them must find them so.
            result = self.whole(name, function, args, kwargs)
            if all(known) and has_rows(result, num_rows):
                for row, key in enumerate(keys):
                    self._put(key, _row(result, known, row))
            return result
        joined = zip(known, zip(*found, strict=True), strict=True)
        if any(not splits and any(not _same(part, parts[0]) for part in parts) for splits, parts in joined):
            return self.whole(name, function, args, kwargs)  # not shared after all: it depends on the row
        return tuple(
            parts[0] if parts[0] is None or not splits else torch.stack(parts)
            for splits, parts in zip(known, zip(*found, strict=True), strict=True)
        )


def _all_rows(result: tuple) -> tuple[bool, ...]:
    return (True,) * len(result)


def _layout(one: Any, two: Any) -> tuple[bool, ...] | None:
    """Of a function's results for a row and for the same row twice: which parts have a row each (True), and which are
    shared by all rows (False); None: neither holds."""
    if not isinstance(one, tuple) or not isinstance(two, tuple) or len(one) != len(two):
        return None
    found = []
    for part, doubled in zip(one, two, strict=True):
        if part is None and doubled is None:
            found.append(True)
            continue
        if not isinstance(part, Tensor) or not isinstance(doubled, Tensor):
            return None
        splits = part.ndim > 0 and len(part) == 1 and doubled.shape == (2, *part.shape[1:])
        if not splits and not _same(part, doubled):
            return None
        found.append(splits)
    return tuple(found)


def _same(part: Tensor | None, other: Tensor | None) -> bool:
    if part is None or other is None:
        return part is other
    return part.shape == other.shape and torch.equal(part, other)


def _row(result: tuple, layout: tuple[bool, ...], row: int) -> tuple:
    return tuple(part if part is None or not splits else part[row] for part, splits in zip(result, layout, strict=True))


def _is_per_row(value: Any, num_rows: int) -> bool:
    return isinstance(value, (list, Tensor)) and len(value) == num_rows


def _split_arguments(args: tuple, kwargs: dict, num_rows: int) -> tuple[Hashable, list[Hashable]]:
    named = [*enumerate(args), *sorted(kwargs.items())]
    per_row = [value for _, value in named if _is_per_row(value, num_rows)]
    shared = tuple((key, fingerprint(value)) for key, value in named if not _is_per_row(value, num_rows))
    if not per_row:
        raise OpaqueError
    return shared, [tuple(fingerprint(value[row]) for value in per_row) for row in range(num_rows)]


def _pick(value: Any, index: Sequence[int], num_rows: int) -> Any:
    """The rows of an argument; what is shared, whole."""
    if not _is_per_row(value, num_rows):
        return value
    return value[list(index)] if isinstance(value, Tensor) else [value[row] for row in index]


def has_rows(result: Any, num_rows: int) -> bool:
    """Whether a result is a tuple of tensors (or None) with a row each."""
    return isinstance(result, tuple) and all(
        part is None or (isinstance(part, Tensor) and part.ndim > 0 and len(part) == num_rows) for part in result
    )

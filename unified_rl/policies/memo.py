"""Remembers what frozen encoders gave, so that replaying a rollout never runs them again.

A memoised function's rows are kept one by one where its result splits by row, so that a window of other rows than those
that were sampled together finds them, and equal rows (the same prompt in a group) are computed once. Everything else is
kept by the content of the whole call. What cannot be fingerprinted (a random generator among the arguments) is computed
every time.
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unified_rl.policies import row_split
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
    if isinstance(value, Mapping):
        return tuple((key, fingerprint(item)) for key, item in sorted(value.items()))
    if value is None or isinstance(value, (str, bool, int, float, torch.device, torch.dtype)):
        return (type(value).__name__, value)
    raise OpaqueError


def num_bytes(value: Any) -> int:
    """Of all tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(num_bytes(item) for item in value)
    if isinstance(value, Mapping):
        return sum(num_bytes(item) for item in value.values())
    return 0


class Memo:
    """A content-addressed store of results, the least recently used ones dropped beyond `max_bytes`."""

    def __init__(self, max_bytes: int = REMEMBERED_BYTES) -> None:
        self._store: OrderedDict[Hashable, Any] = OrderedDict()
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._layouts: dict[Hashable, row_split.Layout | None] = {}
        """Of a function's results, by its name and the arguments that rows share; None: they do not split."""
        self._examples: dict[Hashable, Any] = {}
        """Their containers."""
        self._doubtful: set[Hashable] = set()
        """Of several blocks, whose order only rows that differ can show."""
        self.is_split = True
        """False while a function runs whose results do not split."""

    def _put(self, key: Hashable, value: Any) -> None:
        self._held_bytes += num_bytes(value) - num_bytes(self._store.get(key))
        self._store[key] = value
        while self._held_bytes > self._max_bytes and len(self._store) > 1:
            _, dropped = self._store.popitem(last=False)
            self._held_bytes -= num_bytes(dropped)

    def _get(self, key: Hashable) -> Any:
        self._store.move_to_end(key)
        return self._store[key]

    @contextmanager
    def nothing_new(self) -> Iterator[None]:
        """What it learns inside is forgotten at the end, but for other results of what it knew."""
        known = set(self._store)
        yield
        for key in [key for key in self._store if key not in known]:
            self._held_bytes -= num_bytes(self._store.pop(key))

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
        everything else is shared; of the result, what does not grow with the rows is shared by all (FLUX's positions of
        its tokens). A result that cannot be taken apart by row (`row_split`) falls back to `whole`."""
        try:
            shared, rows = _split_arguments(args, kwargs, num_rows)
        except OpaqueError:
            return self.whole(name, function, args, kwargs)
        form = (name, shared)
        whole = functools.partial(self.whole, name, function, args, kwargs)
        if form in self._layouts and self._layouts[form] is None:
            return self._unsplit(whole)

        def compute(*index: int) -> Any:
            with torch.no_grad():
                return function(
                    *(_pick(value, index, num_rows) for value in args),
                    **{
                        name: len(index) if _is_count(name, value, num_rows) else _pick(value, index, num_rows)
                        for name, value in kwargs.items()
                    },
                )

        keys = [(name, shared, row) for row in rows]
        found = {key: self._get(key) for key in keys if key in self._store}
        for index, key in enumerate(keys):
            if key in found:
                continue
            # One by one: the result must depend on the row alone, not on which others were missing beside it.
            result = compute(index)
            if form not in self._layouts:
                self._learn(form, result, functools.partial(compute, index, index))
            layout = self._layouts[form]
            if layout is None or not row_split.fits(result, layout, 1):
                self._layouts[form] = None
                return self._unsplit(whole)
            found[key] = row_split.take(result, layout, 0, 1)
            self._put(key, found[key])
        return self._joined(form, keys, [found[key] for key in keys], whole)

    def found(self, name: str, args: tuple, kwargs: dict, num_rows: int) -> Any | None:
        """What `by_row` would return for rows that are all known; None: some are not."""
        try:
            shared, rows = _split_arguments(args, kwargs, num_rows)
        except OpaqueError:
            return None
        return self._known((name, shared), [(name, shared, row) for row in rows])

    def _known(self, form: Hashable, keys: Sequence[Hashable]) -> Any | None:
        """The result for rows that are all known, or None."""
        layout = self._layouts.get(form)
        if layout is None or not self.knows(keys):
            return None
        with suppress(row_split.RowsDifferError):
            return row_split.join([self._get(key) for key in keys], layout, like=self._examples[form])
        return None

    def _unsplit(self, whole: Callable[[], Any]) -> Any:
        self.is_split = False
        try:
            return whole()
        finally:
            self.is_split = True

    def _learn(self, form: Hashable, one: Any, twice: Callable[[], Any]) -> None:
        """Find the layout of a function's results, of which `one` is that for a row."""
        flat = isinstance(one, tuple) and has_rows(one, 1)
        layout = row_split.layout_of_batch(one, 1) if flat else row_split.layout_of(one, twice())
        self._layouts[form] = layout
        if layout is not None:
            self._examples[form] = row_split.emptied(one, layout)
            if layout.has("blocks"):
                self._doubtful.add(form)

    def _joined(self, form: Hashable, keys: Sequence[Hashable], rows: list[Any], whole: Callable[[], Any]) -> Any:
        """The result for rows that are all known."""
        layout = self._layouts[form]
        assert layout is not None, "rows of what has no rows are never kept"
        try:
            joined = row_split.join(rows, layout, like=self._examples[form])
        except row_split.RowsDifferError:
            result = whole()
            if not layout.has("shared") and row_split.fits(result, layout, len(keys)):
                # Cut or padded to the batch: the rows belong together as this batch encodes them, and a later window
                # of them must find them so.
                rows = [row_split.take(result, layout, row, len(keys)) for row in range(len(keys))]
                for row, key in zip(rows, keys, strict=True):
                    self._put(key, row)
                return row_split.join(rows, layout, like=self._examples[form])
            return result
        if form in self._doubtful and len(set(keys)) > 1:
            self._doubtful.remove(form)
            result = whole()
            if not row_split.close(joined, result):  # what belongs to a row lies side by side
                self._layouts[form] = None
                return result
        return joined


def _split_arguments(args: tuple, kwargs: dict, num_rows: int) -> tuple[Hashable, list[Hashable]]:
    named = [
        *enumerate(args),
        *((key, kwargs[key]) for key in sorted(kwargs) if not _is_count(key, kwargs[key], num_rows)),
    ]
    per_row = [value for _, value in named if _is_per_row(value, num_rows)]
    shared = tuple((key, fingerprint(value)) for key, value in named if not _is_per_row(value, num_rows))
    if not per_row:
        raise OpaqueError
    return shared, [tuple(fingerprint(value[row]) for value in per_row) for row in range(num_rows)]


def _is_count(key: str, value: Any, num_rows: int) -> bool:
    """Whether an argument tells the number of rows."""
    return key == "batch_size" and value == num_rows


def _is_per_row(value: Any, num_rows: int) -> bool:
    return isinstance(value, (list, Tensor)) and len(value) == num_rows


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

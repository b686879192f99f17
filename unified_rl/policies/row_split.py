"""What belongs to each row in what a function of a batch returns: taken apart by row, and joined for other batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


class RowsDifferError(Exception):
    """Rows that do not fit together, because they are of different lengths, or what was to be shared is not."""


CLOSE = 0.05
"""Share of the mean magnitude by which batches of other sizes may round differently in half precision."""


CONTAINERS: dict[type, tuple[Callable[[Any], list[Any]], Callable[[Any, list[Any]], Any]]] = {}
"""Of other libraries, told by the modules that need those: what one holds, and how one like it is made of other parts.
Language models do not wait for diffusers to be imported."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a result is made of rows."""

    kind: Literal["rows", "list", "shared", "constant", "parts"]
    """rows: a tensor with a stretch of each row along `dim`, `blocks` times over (guidance: all rows without the
    prompt, then all with it), or None in its place (a mask that hides nothing). list: with an item for each row.
    shared: a tensor that all rows have in common. constant: another such value. parts: see `parts`."""
    dim: int = 0
    blocks: int = 1
    parts: "tuple[Layout, ...]" = ()

    def has(self, what: Literal["blocks", "shared"]) -> bool:
        """Whether rows lie in several blocks anywhere, or some tensor is shared."""
        here = self.blocks > 1 if what == "blocks" else self.kind == "shared"
        return here or any(part.has(what) for part in self.parts)


def layout_of(one: Any, two: Any) -> Layout | None:
    """The layout of a function's results, found from those for a row, and for the same row twice; None: of no kind that
    can be taken apart."""
    layout = _layout(one, two)
    if layout is None:
        return None
    row = take(one, layout, 0, 1)
    return layout if close(join([row, row], layout, like=one), two) else None


def _layout(one: Any, two: Any) -> Layout | None:
    if one is None and two is None:
        return Layout("rows")
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape == two.shape:
            return Layout("shared")
        apart = [dim for dim in range(one.ndim) if one.shape[dim] != two.shape[dim]] if one.ndim == two.ndim else []
        if len(apart) != 1 or two.shape[apart[0]] != 2 * one.shape[apart[0]]:
            return None
        return Layout("rows", dim=apart[0], blocks=one.shape[apart[0]])
    if isinstance(one, list) and isinstance(two, list) and (len(one), len(two)) == (1, 2):
        return Layout("list")
    inner, others = _parts_of(one), _parts_of(two)
    if inner is None or others is None:
        return Layout("constant") if _is_constant(one) and _is_constant(two) and one == two else None
    if len(inner) != len(others):
        return None
    found = [_layout(part, other) for part, other in zip(inner, others, strict=True)]
    return None if None in found else Layout("parts", parts=tuple(part for part in found if part is not None))


def layout_of_batch(result: Any, num_rows: int) -> Layout | None:
    """The layout of a result whose tensors all begin with the rows; None: some do not."""
    if result is None:
        return Layout("rows")
    if isinstance(result, Tensor):
        return Layout("rows") if result.ndim and len(result) == num_rows else None
    inner = _parts_of(result)
    if inner is None:
        return Layout("constant") if _is_constant(result) else None
    found = [layout_of_batch(part, num_rows) for part in inner]
    return None if None in found else Layout("parts", parts=tuple(part for part in found if part is not None))


def num_tensors(result: Any) -> int:
    """How many tensors a result holds."""
    return 1 if isinstance(result, Tensor) else sum(map(num_tensors, _parts_of(result) or ()))


def take(result: Any, layout: Layout, row: int, num_rows: int) -> Any:
    """What belongs to one row of a result for `num_rows`: its tensors keep their dimensions."""
    if result is None:
        return None
    if layout.kind == "rows":
        stretch = result.unflatten(layout.dim, (layout.blocks, num_rows)).select(layout.dim + 1, row)
        return stretch.clone()  # no view, which would keep the other rows
    if layout.kind == "list":
        return result[row]
    if layout.kind in ("shared", "constant"):
        return result
    inner = _parts_of(result)
    assert inner is not None, "the function's results have changed their form"
    return [take(part, each, row, num_rows) for part, each in zip(inner, layout.parts, strict=True)]


def join(rows: Sequence[Any], layout: Layout, *, like: Any) -> Any:
    """A result for several rows, as the function itself would give it.

    Args:
        rows: as from `take`.
        like: any result of the function, for the kinds of its containers.

    Raises:
        RowsDifferError: if there is no such result.
    """
    if layout.kind == "rows":
        if len({None if row is None else row.shape for row in rows}) > 1:
            raise RowsDifferError
        if rows[0] is None:
            return None
        return torch.stack(list(rows), dim=layout.dim + 1).flatten(layout.dim, layout.dim + 1)
    if layout.kind == "list":
        return list(rows)
    if layout.kind == "constant":
        return rows[0]
    if layout.kind == "shared":
        if any(row.shape != rows[0].shape or not torch.equal(row, rows[0]) for row in rows):
            raise RowsDifferError
        return rows[0]
    inner = _parts_of(like)
    assert inner is not None, "the function's results have changed their form"
    places = enumerate(zip(inner, layout.parts, strict=True))
    return _rebuilt(like, [join([row[place] for row in rows], each, like=part) for place, (part, each) in places])


def fits(result: Any, layout: Layout, num_rows: int) -> bool:
    """Whether a result for `num_rows` has such a layout."""
    if result is None:
        return layout.kind in ("rows", "constant")
    if layout.kind == "rows":
        return (
            isinstance(result, Tensor)
            and result.ndim > layout.dim
            and (result.shape[layout.dim] == layout.blocks * num_rows)
        )
    if layout.kind == "list":
        return isinstance(result, list) and len(result) == num_rows
    if layout.kind != "parts":
        return True
    inner = _parts_of(result)
    return (
        inner is not None
        and len(inner) == len(layout.parts)
        and all(fits(part, each, num_rows) for part, each in zip(inner, layout.parts, strict=True))
    )


def close(one: Any, other: Any) -> bool:
    """Whether two results are the same but for the rounding of batches of other sizes."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
            return False
        apart = (one.double() - other.double()).abs().mean()
        return one.numel() == 0 or bool(apart <= CLOSE * other.double().abs().mean())
    inner, others = _parts_of(one), _parts_of(other)
    if inner is None or others is None:
        return bool(one == other)
    return len(inner) == len(others) and all(close(*pair) for pair in zip(inner, others, strict=True))


def emptied(result: Any, layout: Layout) -> Any:
    """A result's containers without the content of its rows, for `join`."""
    if result is None:
        return None
    if layout.kind == "rows":
        return result.narrow(layout.dim, 0, 0).clone()
    if layout.kind == "parts":
        inner = _parts_of(result)
        assert inner is not None, "the layout is of another result"
        return _rebuilt(result, [emptied(part, each) for part, each in zip(inner, layout.parts, strict=True)])
    return [] if layout.kind == "list" else result


def _parts_of(value: Any) -> list[Any] | None:
    """What a container holds; None: it is none that can be built again."""
    for kind, (parts, _) in CONTAINERS.items():
        if isinstance(value, kind):
            return parts(value)
    if isinstance(value, Mapping):  # outputs of diffusers and transformers too
        return list(value.values())
    return list(value) if type(value) in (list, tuple) else None


def _rebuilt(like: Any, parts: list[Any]) -> Any:
    for kind, (_, build_like) in CONTAINERS.items():
        if isinstance(like, kind):
            return build_like(like, parts)
    if type(like) is dict:
        return dict(zip(like, parts, strict=True))
    if isinstance(like, Mapping):
        build: Callable = type(like)
        return build(**dict(zip(like.keys(), parts, strict=True)))
    return type(like)(parts)


def _is_constant(value: Any) -> bool:
    return isinstance(value, (str, bool, int, float))

"""A frozen vision tower that runs once for a picture, however often the picture is looked at.

Scoring, the reference's forward and every further pass over a rollout find the features that sampling computed. They
are kept by the content of the tower's inputs: picture by picture where a tower takes and gives one a row, or the
patches of all pictures in one sequence (Qwen-VL, GLM-V); else batch by batch.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from unified_rl.policies.memo import Memo, has_rows
from unified_rl.policies.sharded import is_sharded


def find_towers(model: Any) -> list[nn.Module]:
    """The vision encoders inside `model`: the outermost parts that are built from its vision configuration."""
    if "vision_config" not in model.config.sub_configs:
        return []
    kind = type(model.config.vision_config)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(module, PreTrainedModel) and isinstance(module.config, kind):
            found[name] = module
    return list(found.values())


def remember(model: Any, memo: Memo) -> None:
    """Put `memo` before every vision encoder of `model` of which nothing is trained."""
    for number, tower in enumerate(find_towers(model)):
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.forward = Remembered(tower, f"tower {number}", memo)


class Remembered:
    """The forward of a frozen encoder, behind a memo."""

    def __init__(self, tower: nn.Module, name: str, memo: Memo) -> None:
        self._tower, self._name, self._memo = tower, name, memo
        self._compute = tower.forward
        functools.update_wrapper(self, self._compute)  # models look at its signature
        self._layout: TreeSpec | None = None
        """Of a result whose tensors all have a row a picture; None: not so, or no batch of several pictures yet."""
        self._named = frozenset(inspect.signature(self._compute).parameters)  # a trunk of a critic is a deep copy
        self._joins: bool | None = None
        """Whether results of single pictures in a sequence, joined, are that of the sequence; None: not yet seen."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_sharded(self._tower):
            # Its layers gather their weights together on all ranks, so all must run alike. That one rank remembers a
            # picture and another does not is an error even while the weights are whole: DeepSpeed compares the order
            # in which the ranks call their modules.
            return self._compute(*args, **kwargs)
        name = f"{self._name} in {next(self._tower.parameters()).dtype}"  # a probe may raise it
        # Switches that are off, and that the tower itself does not know, are passed on by some callers only.
        kwargs = {
            key: value for key, value in kwargs.items() if key in self._named or not (value is None or value is False)
        }
        pictures = _in_sequence(args, kwargs)
        if len(pictures) > 1 and self._joins is not False:
            return self._joined(name, pictures, args, kwargs)
        num_pictures = _num_pictures([*args, *kwargs.values()])
        if self._layout is None or not num_pictures:
            parts, layout = self._memo.whole(name, self._taken_apart, args, kwargs)
            if num_pictures < 2 or not has_rows(parts, num_pictures):
                return tree_unflatten(parts, layout)
            self._layout = layout
        parts = self._memo.by_row(name, self._parts, args, kwargs, num_pictures)
        return tree_unflatten(parts, self._layout)

    def _joined(self, name: str, pictures: list[tuple[tuple, dict]], args: tuple, kwargs: dict) -> Any:
        """The result for a sequence of pictures, put together of single ones'; or its own, if that is another."""
        found = [self._memo.whole(name, self._taken_apart, *picture) for picture in pictures]
        joined = _cat([parts for parts, _ in found])
        if self._joins is None or joined is None:
            parts, layout = self._memo.whole(name, self._taken_apart, args, kwargs)
            if len({id(parts) for parts, _ in found}) > 1:  # of equal pictures nothing is learned
                self._joins = joined is not None and layout == found[0][1] and _agree(joined, parts)
            if not self._joins or joined is None:
                return tree_unflatten(parts, layout)
        return tree_unflatten(joined, found[0][1])

    def _taken_apart(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], TreeSpec]:
        parts, layout = tree_flatten(self._compute(*args, **kwargs))
        return tuple(parts), layout

    def _parts(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return self._taken_apart(*args, **kwargs)[0]


def _in_sequence(args: tuple, kwargs: dict) -> list[tuple[tuple, dict]]:
    """The arguments for each picture of a sequence of patches; empty where the arguments are none."""
    grids = kwargs.get("grid_thw")
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(grids, Tensor) or grids.ndim != 2:
        return []
    others = [value for key, value in kwargs.items() if key != "grid_thw" and isinstance(value, (Tensor, list, tuple))]
    sizes = grids.prod(1).tolist()
    if others or sum(sizes) != len(args[0]):
        return []
    patches = args[0].split(sizes)
    return [((each,), {**kwargs, "grid_thw": grid[None]}) for each, grid in zip(patches, grids, strict=True)]


def _cat(results: list[tuple]) -> tuple[Tensor, ...] | None:
    """Results of several pictures joined along their first dimensions; None where they are not of that kind."""
    columns = list(zip(*results, strict=True)) if len({len(parts) for parts in results}) == 1 else []
    for column in columns:
        first = column[0]
        if not all(isinstance(part, Tensor) and part.ndim and part.shape[1:] == first.shape[1:] for part in column):
            return None
    return tuple(torch.cat(column) for column in columns) or None


def _agree(joined: tuple[Tensor, ...], parts: tuple) -> bool:
    """Whether two results are the same to rounding."""
    return len(joined) == len(parts) and all(
        isinstance(part, Tensor)
        and part.shape == mine.shape
        and bool((part - mine).abs().max() <= (1e-4 if part.dtype == torch.float32 else 5e-2) * part.abs().max())
        for mine, part in zip(joined, parts, strict=True)
    )


def _num_pictures(values: list[Any]) -> int:
    """The number of pictures in a batch that has one a row; 0 where it has not, or cannot be told."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(isinstance(value, (list, tuple)) for value in values) or not any(value.ndim >= 4 for value in tensors):
        return 0
    counts = {len(value) for value in tensors}
    return counts.pop() if len(counts) == 1 else 0

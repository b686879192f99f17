"""A frozen vision tower that runs once for a picture, however often the picture is looked at.

Scoring, the reference's forward and every further pass over a rollout find the features that sampling computed. They
are kept by the content of the tower's inputs: picture by picture where a tower takes and gives one a row, else (the
patches of all pictures in one sequence) batch by batch.
"""

import functools
from typing import Any

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_sharded(self._tower):
            # Its layers gather their weights together on all ranks, so all must run alike. That one rank remembers a
            # picture and another does not is an error even while the weights are whole: DeepSpeed compares the order
            # in which the ranks call their modules.
            return self._compute(*args, **kwargs)
        name = f"{self._name} in {next(self._tower.parameters()).dtype}"  # a probe may raise it
        num_pictures = _num_pictures([*args, *kwargs.values()])
        if self._layout is None or not num_pictures:
            parts, layout = self._memo.whole(name, self._taken_apart, args, kwargs)
            if num_pictures < 2 or not has_rows(parts, num_pictures):
                return tree_unflatten(parts, layout)
            self._layout = layout
        parts = self._memo.by_row(name, self._parts, args, kwargs, num_pictures)
        return tree_unflatten(parts, self._layout)

    def _taken_apart(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], TreeSpec]:
        parts, layout = tree_flatten(self._compute(*args, **kwargs))
        return tuple(parts), layout

    def _parts(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return self._taken_apart(*args, **kwargs)[0]


def _num_pictures(values: list[Any]) -> int:
    """The number of pictures in a batch that has one a row; 0 where it has not, or cannot be told."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(isinstance(value, (list, tuple)) for value in values) or not any(value.ndim >= 4 for value in tensors):
        return 0
    counts = {len(value) for value in tensors}
    return counts.pop() if len(counts) == 1 else 0

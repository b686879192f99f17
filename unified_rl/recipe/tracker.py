"""Keys of one tracker in a recipe."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from unified_rl.errors import RecipeError, nearest
from unified_rl.imports import check_import
from unified_rl.recipe.block import Block

BUILT_IN = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Name -> the package that it needs."""


class TrackerBlock(Block):
    """A service that shows a run elsewhere; the run's folder has everything in any case."""

    name: str
    """tensorboard, wandb, or `package.module:attr` or `path/to/file.py:attr` of a class of your own."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of its constructor; those of wandb go to `wandb.init`."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait at the run's end for what it has not sent yet."""


def check_trackers(blocks: Sequence[TrackerBlock]) -> None:
    """
    Raises:
        RecipeError: if one does not exist, or its package is not installed.
    """
    for index, block in enumerate(blocks):
        where = f"trackers.{index}.name"
        if ":" in block.name:
            check_import(block.name, where)
        elif block.name not in BUILT_IN:
            raise RecipeError(f"{where}: no tracker {block.name!r}{nearest(block.name, [*BUILT_IN])}")
        elif importlib.util.find_spec(BUILT_IN[block.name]) is None:
            raise RecipeError(f"{where}: {block.name} is not installed; pip install {BUILT_IN[block.name]}")

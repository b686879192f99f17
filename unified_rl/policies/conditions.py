"""Conditions from the dataset: which columns of a row are arguments of a pipeline's call, checked before it is loaded.

Columns are handed over by name (`pipeline_call`); `image` and `images` are the call's `image`. Rewards read columns
too, so a column that the call does not know is only wrong if it can be nothing but a condition.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from unified_rl.errors import RecipeError, nearest
from unified_rl.recipe.policy import DiffusionSampling, PolicyBlock

ALWAYS = re.compile(
    r"^(images?|.*_image|(.*_)?video|negative_prompt(_\d)?|prompt_\d|height|width|num_frames|strength)$"
)
"""Columns that are conditions in every dataset."""
NEEDED = {
    "Inpaint": ("image", "mask_image"),
    "Img2Img": ("image",),
    "ImageToVideo": ("image",),
    "VideoToVideo": ("video",),
    "Pix2Pix": ("image",),
    "Edit": ("image",),
}
"""Part of a class's name -> arguments that it needs although its call's signature says they may be None."""


def check_conditions(block: PolicyBlock, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse rows whose conditions the pipeline's call has no argument for, or that lack one which it needs.

    Args:
        block: names the model; only its index is read.
        rows: as from `load_rows`.
        where: the recipe key of the rows; errors begin with it.

    Raises:
        RecipeError: naming the column.
    """
    try:
        index = DiffusionPipeline.load_config(block.model, revision=block.revision)
    except OSError as error:
        raise RecipeError(f"policy.model: {block.model} cannot be read: {' '.join(str(error).split())}") from error
    name = index["_class_name"]
    assert isinstance(block.sampling, DiffusionSampling)
    if isinstance(name, str) and hasattr(diffusers, name):  # a class of the user's own is known once it is loaded
        check_columns(getattr(diffusers, name), rows, settings=block.sampling.call, where=where)


def check_columns(
    pipeline_class: type, rows: Sequence[Mapping[str, Any]], *, settings: Mapping[str, Any], where: str
) -> None:
    """As `check_conditions`, for a class of pipelines; `settings` are the call's arguments from the recipe."""
    name = pipeline_class.__name__
    parameters = inspect.signature(pipeline_class.__call__).parameters
    columns = [{_argument(column, parameters) for column in row} for row in rows]
    for column in dict.fromkeys(column for row in rows for column in row):
        if ALWAYS.fullmatch(column) and _argument(column, parameters) not in parameters:
            raise RecipeError(
                f"{where}: {name} takes no {column!r}{nearest(column, list(parameters))}; remove the column"
            )
    wanted = [key for part, keys in NEEDED.items() if part in name for key in keys if key in parameters]
    wanted += [key for key, parameter in parameters.items() if _has_no_default(key, parameter)]
    for key in dict.fromkeys(wanted):
        lacking = [number for number, names in enumerate(columns) if key not in names]
        if key not in settings and lacking:
            raise RecipeError(f"{where}: {name} needs a column {key!r}, which row {lacking[0]} lacks")


def _argument(column: str, parameters: Mapping[str, Any]) -> str:
    """The call's argument that a column becomes."""
    return "image" if column in ("image", "images") and "image" in parameters else column


def _has_no_default(key: str, parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty and key not in ("self", "prompt", "num_inference_steps")

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
from unified_rl.policies.pipeline_table import takes_one_row
from unified_rl.recipe.policy import DiffusionSampling, PolicyBlock
from unified_rl.recipe.schema import EngineBlock

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
    assert isinstance(block.sampling, DiffusionSampling)
    kind = _class_of(block)
    if kind is not None:
        check_columns(kind, rows, settings=block.sampling.call, where=where)


def check_call(block: PolicyBlock, exam: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline's call does not have.

    Args:
        exam: evaluation's changes to the sampling.

    Raises:
        RecipeError: naming the argument.
    """
    assert isinstance(block.sampling, DiffusionSampling)
    kind = _class_of(block)
    if kind is None:
        return
    parameters = list(inspect.signature(kind.__call__).parameters)
    for where, call in (("policy", block.sampling.call), ("evaluation", exam.get("call", {}))):
        for key in call:
            if key not in parameters:
                hint = nearest(key, parameters[1:])
                raise RecipeError(f"{where}.sampling.call: {kind.__name__} takes no argument {key!r}{hint}")


def check_batches(block: PolicyBlock, engine: EngineBlock) -> None:
    """Refuse batches for a class that takes one row a call.

    Raises:
        RecipeError: naming the key.
    """
    kind = _class_of(block)
    if kind is None or not takes_one_row(kind.__name__):
        return
    for key, rows in (("micro_batch", engine.micro_batch), ("rollout_batch", engine.rollout_batch)):
        if rows not in (1, None):
            raise RecipeError(f"engine.{key}: {kind.__name__} takes one row a call, not {rows}; say 1")


def check_tokens(block: PolicyBlock, argument: str, pixels: tuple[int, int]) -> None:
    """Refuse tokens of another model that the pipeline's call has no argument for, or that are for another size.

    Args:
        block: names the pipeline; only its index is read.
        argument: of the call, for the tokens.
        pixels: height and width of the pictures that the tokens are for.

    Raises:
        RecipeError: if so.
    """
    assert isinstance(block.sampling, DiffusionSampling)
    kind, call = _class_of(block), block.sampling.call
    if kind is not None and argument not in inspect.signature(kind.__call__).parameters:
        raise RecipeError(f"policy.writer: {kind.__name__} takes no {argument}, which the writer draws")
    if (call.get("height"), call.get("width")) != pixels:
        raise RecipeError(
            f"policy.sampling.call: the writer's tokens are for height: {pixels[0]}, width: {pixels[1]}; say so here,"
            " or change policy.writer.sampling.processor"
        )


def _class_of(block: PolicyBlock) -> type | None:
    """The pipeline's class; None: one of the user's own, which is known once it is loaded."""
    try:
        index = DiffusionPipeline.load_config(block.model, revision=block.revision)
    except OSError as error:
        raise RecipeError(f"policy.model: {block.model} cannot be read: {' '.join(str(error).split())}") from error
    name = index["_class_name"]
    return getattr(diffusers, name) if isinstance(name, str) and hasattr(diffusers, name) else None


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

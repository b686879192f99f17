"""From prompts to the arguments of a pipeline's call, and from its output back to rows. By parameter names only."""

import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from unified_rl.policies.scheduler_head import UnsupportedPipelineError
from unified_rl.types import Prompt

OWN = frozenset({"prompt", "generator", "num_inference_steps", "callback_on_step_end", "callback", "return_dict"})
"""Arguments that a dataset's column cannot set."""
TEXTS = re.compile(r"negative_prompt(_\d)?|prompt_\d")
"""Arguments that a text of the recipe is given to for every row: many calls want as many of them as prompts."""
DENOISERS = ("transformer", "unet", "image_unet", "prior", "dit", "decoder")


def call_arguments(
    pipeline_class: type, prompts: Sequence[Prompt], settings: Mapping[str, Any], *, lone: bool = False
) -> dict[str, Any]:
    """Keyword arguments for one call over all prompts.

    `settings` hold for every row; above them come the prompt's text, its images (`image`) and every column of the
    dataset that the call has a parameter for.

    Args:
        lone: whether the class takes one row a call: all but tensors is then handed over as it is, not in lists of
            one, which some of these refuse.

    Raises:
        UnsupportedPipelineError: if the call lacks an argument of `settings`, has no place for the images or
            the rows, or rows of one batch differ where the call takes a single value.
    """
    # inspect follows `__wrapped__`: the parameters behind torch.no_grad.
    parameters = inspect.signature(pipeline_class.__call__).parameters
    name = pipeline_class.__name__
    arguments = dict(settings)
    for key in arguments:
        if key not in parameters:
            raise UnsupportedPipelineError(f"{name} takes no argument {key!r}")
    columns: dict[str, list[Any]] = {
        key: [value] * len(prompts)
        for key, value in settings.items()
        if TEXTS.fullmatch(key) and isinstance(value, str)
    }
    if "prompt" in parameters:
        # Embeddings that were computed beforehand stand in for the text, and pipelines refuse both.
        if not any(key.startswith("prompt_embeds") for key in _names(prompts)):
            columns["prompt"] = [prompt.text for prompt in prompts]
        elif parameters["prompt"].default is inspect.Parameter.empty:
            arguments["prompt"] = None
    if any(prompt.images for prompt in prompts):
        if "image" not in parameters:
            raise UnsupportedPipelineError(f"{name} takes no argument 'image', but the prompts have pictures")
        single = all(len(prompt.images) == 1 for prompt in prompts)
        columns["image"] = [prompt.images[0] if single else list(prompt.images) for prompt in prompts]
    for key in _names(prompts):
        if key in parameters and key not in OWN:
            columns[key] = [_column(prompt, key) for prompt in prompts]
    for key, rows in columns.items():
        arguments[key] = _joined(name, key, rows, parameters[key].annotation, lone)
    if "generator" in parameters:
        arguments["generator"] = generators([prompt.seed for prompt in prompts])
    if "batch_size" in parameters and "prompt" not in parameters:
        arguments["batch_size"] = len(prompts)  # unconditional
    return arguments


def generators(seeds: Sequence[int]) -> torch.Generator | list[torch.Generator]:
    """One for each row of a call; for a lone row itself, which draws the same and which pipelines that fold a video's
    frames into the rows, or draw without diffusers' help, do not take in a list."""
    made = _Generators(torch.Generator().manual_seed(seed) for seed in seeds)
    return made[0] if len(made) == 1 else made


class _Generators(list[torch.Generator]):
    """Those of a call's rows, for which pipelines ask by number."""

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except IndexError:
            raise UnsupportedPipelineError(
                f"the pipeline draws for more rows than it has prompts, {len(self)}: does it take negative prompts as"
                " rows of their own (as Kandinsky's priors do)? leave negative_prompt out"
            ) from None


def _names(prompts: Sequence[Prompt]) -> dict[str, None]:
    """The columns of the rows, in order."""
    return dict.fromkeys(key for prompt in prompts for key in prompt.columns)


def _column(prompt: Prompt, key: str) -> Any:
    if key not in prompt.columns:
        raise UnsupportedPipelineError(f"column {key!r}: some rows of the batch lack it")
    return prompt.columns[key]


def _joined(name: str, key: str, rows: list[Any], annotation: Any, lone: bool) -> Any:
    """One argument for all rows: a list where the call takes lists, a batch for tensors, else the common value."""
    if all(isinstance(row, Tensor) for row in rows):
        if len({row.shape for row in rows}) > 1:
            raise UnsupportedPipelineError(f"{name}: {key}: the rows' shapes differ within a batch")
        return torch.stack(rows)
    if len(rows) == 1 and (
        lone
        or isinstance(rows[0], Image.Image)
        or _is_one_list(annotation, rows[0])
        or (isinstance(rows[0], str) and not _names_lists(annotation))
    ):
        return rows[0]  # pipelines of one prompt, picture or video, which a list would break
    if key == "prompt" or takes_rows(annotation, rows[0]):
        return rows
    if any(row is not rows[0] and row != rows[0] for row in rows[1:]):
        raise UnsupportedPipelineError(f"{name}: {key} is one value for the whole call, but differs within a batch")
    return rows[0]


def takes_rows(annotation: Any, row: Any) -> bool:
    """Whether a parameter of this annotation takes a list with one such value per row."""
    if annotation is inspect.Parameter.empty:
        return not isinstance(row, (bool, int, float))
    first = row
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, Image.Image) and annotation is not Image.Image:
        return True  # image and video processors take lists of rows, also where the annotation does not say so
    wanted = "" if not isinstance(row, (list, tuple)) else type(row[0]).__name__ if row else ""
    for option in _options(annotation):
        if typing.get_origin(option) in (list, tuple, Sequence):
            inner = " ".join(str(item) for item in typing.get_args(option))
            if not isinstance(row, (list, tuple)) or "list" in inner.lower() or (wanted and wanted not in inner):
                # A list of numbers beside a plain number is a range or a shape only where no plain number is meant.
                return True
        elif isinstance(option, str) and "list" in option.lower():
            return True
    return False


def _is_one_list(annotation: Any, row: Any) -> bool:
    """Whether a list of pictures is all that a parameter takes (`list[Image]`): one video for the whole call."""
    return (
        isinstance(row, (list, tuple))
        and typing.get_origin(annotation) is list
        and (typing.get_args(annotation) == (Image.Image,))
    )


def _names_lists(annotation: Any) -> bool:
    """Whether an annotation allows lists in so many words, or says nothing at all."""
    if annotation in (inspect.Parameter.empty, Any):
        return True
    return any(
        typing.get_origin(option) in (list, tuple, Sequence) or (isinstance(option, str) and "list" in option.lower())
        for option in _options(annotation)
    )


def _options(annotation: Any) -> list[Any]:
    """The alternatives of a (nested) union."""
    if typing.get_origin(annotation) in (list, tuple, Sequence) or not typing.get_args(annotation):
        return [annotation]
    return [option for part in typing.get_args(annotation) for option in _options(part)]


def rows_of(output: Any, num_rows: int) -> list[tuple[Any, ...]]:
    """The pipeline's first output, row by row: one picture, the frames of a video, or another medium's array.

    Raises:
        UnsupportedPipelineError: if the output does not split into rows.
    """
    rows = output[0]
    if num_rows == 1 and len(rows) != 1:
        rows = [rows]
    each, rest = divmod(len(rows), num_rows)
    if rest == 0 and each > 1:  # several pictures of each row, row by row (intrinsic images)
        return [tuple(rows[row * each : (row + 1) * each]) for row in range(num_rows)]
    if len(rows) != num_rows:
        raise UnsupportedPipelineError(f"the pipeline returned {len(rows)} results for {num_rows} prompts")
    return [_media(row) for row in rows]


def _media(row: Any) -> tuple[Any, ...]:
    if isinstance(row, (list, tuple)):
        return tuple(row)
    if isinstance(row, np.ndarray) and row.ndim == 4 and row.shape[-1] in (1, 3):  # [F, H, W, C] in [0, 1]
        return tuple(VaeImageProcessor.numpy_to_pil(row))
    return (row,)


def denoiser_names(pipeline: Any) -> list[str]:
    """The components that are trained: the denoiser, and those that take its place at some steps (`transformer_2`).

    Raises:
        UnsupportedPipelineError: if there is none.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    first = next((name for name in DENOISERS if name in parts), None)
    if first is None:
        raise UnsupportedPipelineError(f"{type(pipeline).__name__}: no denoiser among its components ({DENOISERS})")
    return [first, *sorted(name for name in parts if name.startswith(f"{first}_"))]


def companion_names(pipeline: Any) -> list[str]:
    """The components that compute beside the denoiser at every step and stay as they are: ControlNets, and frozen
    models of the denoiser's own class (Ideogram's unconditional one)."""
    trained = denoiser_names(pipeline)
    kind = type(getattr(pipeline, trained[0]))
    return [
        name
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
        and name not in trained
        and (name.startswith("controlnet") or isinstance(part, kind))
    ]

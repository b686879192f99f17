"""Builds a pipeline from its class: components by the annotations of its `__init__`, overridden by the case."""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image

from tests.contract.pipelines.components import FACTORIES, tokenizer

NEVER = {"safety_checker", "watermarker", "image_encoder", "feature_extractor", "transformer_2", "guider"}
"""Optional components that no denoising step depends on, absent unless a case brings them."""


@dataclass(frozen=True)
class Case:
    """One pipeline class: what its components and call need beyond the defaults."""

    name: str
    components: dict[str, Callable[[], Any] | Any] = field(default_factory=dict)
    """By `__init__` parameter: a factory, or a plain value."""
    call: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    """Dataset columns by name, from the row number."""
    images: int = 0
    """Condition pictures of each prompt."""
    refused: str | None = None
    """Part of the message with which the policy must refuse this pipeline; None: it must replay exactly."""
    size: int = 32


def picture(seed: int, size: int = 32) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mask(seed: int, size: int = 32) -> Image.Image:
    half = Image.new("L", (size, size), 0)
    half.paste(255, (0, 0, size // 2 + seed, size))
    return half


def _class_names(annotation: Any) -> list[str]:
    parts = typing.get_args(annotation)
    return [name for part in parts for name in _class_names(part)] if parts else [getattr(annotation, "__name__", "")]


def build(case: Case) -> Any:
    """A tiny instance of the case's class with weights from seed 0."""
    torch.manual_seed(0)
    pipeline_class = getattr(diffusers, case.name)
    chosen: dict[str, Any] = {}
    for key, parameter in list(inspect.signature(pipeline_class.__init__).parameters.items())[1:]:
        if key in case.components:
            wanted = case.components[key]
            chosen[key] = wanted() if callable(wanted) else wanted
            continue
        names = _class_names(parameter.annotation)
        known = [name for name in names if name in FACTORIES]
        if key in NEVER:
            chosen[key] = None
        elif "tokenizer" in key:
            chosen[key] = tokenizer()
        elif key == "requires_safety_checker":
            chosen[key] = False
        elif parameter.default is not inspect.Parameter.empty and key not in ("unet", "transformer"):
            continue
        elif known:
            chosen[key] = FACTORIES[known[0]]()
        else:
            raise LookupError(f"{case.name}: no tiny {key}: {names}")
    return pipeline_class(**chosen)


def call_settings(case: Case) -> dict[str, Any]:
    """Call arguments: small pictures, few tokens, guidance on where the class has it."""
    parameters = inspect.signature(getattr(diffusers, case.name).__call__).parameters
    wanted = {"height": case.size, "width": case.size, "max_sequence_length": 16, "num_frames": 5}
    wanted |= {"guidance_scale": 3.0, "strength": 0.7}
    return {key: value for key, value in wanted.items() if key in parameters} | case.call

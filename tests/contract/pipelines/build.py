"""Builds a pipeline from its class: components by the annotations of its `__init__`, overridden by the case."""

import functools
import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch
from PIL import Image

from tests.contract.pipelines.components import FACTORIES, tokenizer
from tests.contract.pipelines.tiny import TINY
from unified_rl.policies.pipeline_call import DENOISERS

Kernel = Literal["auto", "flow_sde", "dance_sde", "cps", "ddim", "ancestral", "renoise"]
NEVER = {"safety_checker", "watermarker", "image_encoder", "feature_extractor", "transformer_2", "guider"}
"""Optional components that no denoising step depends on, absent unless a case brings them."""
UNMASKED = "pads texts to the longest of a call, without a mask"
"""Why a row's picture depends on what it is drawn beside."""
WANTED = {"unet", "transformer", "scheduler"}
"""Components that are built also where the class has them optional."""


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
    text: str = "{}"
    """How the prompt is written around the row's text, for classes that want JSON or marks of pictures."""
    refused: str | None = None
    """Part of the message with which the policy must refuse this pipeline; None: it must replay exactly."""
    size: int = 32
    lora_targets: list[str] | Literal["auto"] = "auto"
    kernel: Kernel = "auto"
    """Which transition kernel is tried; another than `auto` where the class reads its own scheduler's sigmas."""
    half: bool = True
    """False: the class fails in bfloat16, so that LoRA is tried in float32."""
    half_note: str = "float32 only: mixes dtypes in bfloat16"
    """How it fails."""
    note: str = ""
    """What to mind, for the table."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Names in the pipeline's module that fix a resolution which no test can afford, and what stands in for them."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What is set on the instance for the same reason."""
    row_tolerance: float = 1e-5
    """How far a log-prob of one row alone may be from the rollout's; more where rounding is large: those classes have
    no gap at all in float64."""
    store_outputs: bool = False
    """Whether its guidance remembers earlier steps, so that a replay needs their outputs."""
    rows: int = 2
    """Rows of one call; 1 where the class cannot take several prompts or pictures at once."""


def picture(seed: int, size: int = 32) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mask(seed: int, size: int = 32) -> Image.Image:
    half = Image.new("L", (size, size), 0)
    half.paste(255, (0, 0, size // 2 + seed, size))
    return half


def _classes(annotation: Any) -> list[Any]:
    """The alternatives of a (nested) union, in order; postponed annotations are strings."""
    if isinstance(annotation, str):
        return [part.strip() for part in annotation.split("|")]
    parts = typing.get_args(annotation)
    return [found for part in parts for found in _classes(part)] if parts else [annotation]


def _factory(option: Any) -> Callable[[], Any] | None:
    """How a tiny instance of a component's class is made, or None."""
    name = option if isinstance(option, str) else getattr(option, "__name__", "")
    if name in FACTORIES:
        return FACTORIES[name]
    if isinstance(option, str) and name in TINY:
        option = getattr(diffusers, name)
    return functools.partial(option, **TINY[name]) if name in TINY else None


def without_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that start at zero (gates, output layers) would cut gradients off, and the conditions with them: guidance
    and prompts must make a difference."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def build(case: Case) -> Any:
    """A tiny instance of the case's class with weights from seed 0."""
    torch.manual_seed(0)
    pipeline_class = getattr(diffusers, case.name)
    for name, value in case.constants.items():
        setattr(sys.modules[pipeline_class.__module__], name, value)
    chosen: dict[str, Any] = {}
    for key, parameter in list(inspect.signature(pipeline_class.__init__).parameters.items())[1:]:
        if key in case.components:
            wanted = case.components[key]
            chosen[key] = wanted() if callable(wanted) else wanted
            continue
        options = _classes(parameter.annotation)
        known = [factory for factory in map(_factory, options) if factory is not None]
        if key in NEVER:
            chosen[key] = None
        elif "tokenizer" in key:
            chosen[key] = tokenizer()
        elif key == "requires_safety_checker":
            chosen[key] = False
        elif parameter.default is not inspect.Parameter.empty and key not in WANTED:
            continue
        elif known:
            chosen[key] = known[0]()
        else:
            raise LookupError(f"{case.name}: no tiny {key}: {options}")
    for name in DENOISERS:
        if isinstance(chosen.get(name), torch.nn.Module):
            without_zeros(chosen[name])
    pipeline = pipeline_class(**chosen)
    for name, value in case.attributes.items():
        assert name in vars(pipeline), f"{case.name} has no {name}"
        setattr(pipeline, name, value)
    return pipeline


def call_settings(case: Case) -> dict[str, Any]:
    """Call arguments: small pictures, few tokens, guidance on where the class has it."""
    parameters = inspect.signature(getattr(diffusers, case.name).__call__).parameters
    wanted = {"height": case.size, "width": case.size, "max_sequence_length": 16, "num_frames": 5}
    wanted |= {"guidance_scale": 3.0, "strength": 0.7}
    if "true_cfg_scale" in parameters and "negative_prompt_embeds" not in case.columns:
        # Beside the scale that the denoiser is told.
        wanted |= {"true_cfg_scale": 2.0, "negative_prompt": "a blue star"}
    return {key: value for key, value in wanted.items() if key in parameters} | case.call

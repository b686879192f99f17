"""What is trained of a pipeline: its denoiser, or the several that share its loop (Wan 2.2 has one for the noisy steps
and one for the others). Each step is replayed through the denoiser that sampled it, because the pipeline's own code
chooses. With several, names of parameters begin with the component's (`transformer_2.blocks.0...`), so that
`policy.train` can keep one of them as it is.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import nn

from unified_rl.errors import RecipeError, nearest
from unified_rl.imports import one_line
from unified_rl.policies.denoiser_lora import add_adapter, restore_adapter, save_adapter, switch_adapters
from unified_rl.policies.lora import lora_config, select_trained
from unified_rl.policies.pipeline_call import companion_names, denoiser_names
from unified_rl.recipe.policy import PolicyBlock


class Denoisers:
    """The denoisers of one pipeline, which stay where they are in it."""

    def __init__(self, pipeline: Any, block: PolicyBlock, *, with_reference: bool) -> None:
        """Make them trainable as the recipe says.

        Raises:
            UnsupportedPipelineError: if the pipeline has none.
            RecipeError: if the adapter or train patterns match nothing.
        """
        self._pipeline, self._lora = pipeline, block.adapter.kind == "lora"
        self.parts: dict[str, Any] = {name: getattr(pipeline, name) for name in denoiser_names(pipeline)}
        self._companions: list[nn.Module] = [getattr(pipeline, name) for name in companion_names(pipeline)]
        self._copies: dict[str, nn.Module] = {}
        for name, part in self.parts.items():
            if block.attention is not None:
                _set_attention(part, block.attention)
            if self._lora:
                add_adapter(part, lora_config(part, block.adapter))
                continue
            if with_reference:
                self._copies[name] = copy.deepcopy(part)
            part.requires_grad_(True)
        several = len(self.parts) > 1
        self.module: Any = nn.ModuleDict(self.parts) if several else next(iter(self.parts.values()))
        """What the engine trains."""
        select_trained(self.module, block.train)
        parts = [*self.parts.values(), *self._companions, *self._copies.values()]
        self._attention = [(module, module.processor) for part in parts for module in _attentions(part)]

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return next(self.module.parameters()).device

    @contextmanager
    def wrapped(self, denoise: Callable) -> Iterator[None]:
        """Inside it, `denoise(forward, ...)` stands in for the forward of each of them, and of the frozen models that
        compute beside them at each step."""
        trained = [getattr(self._pipeline, name) for name in self.parts]  # the reference's, inside `reference`
        parts: list[Any] = [*trained, *self._companions]
        for module, processor in self._attention:
            # A replay leaves the loop before PAG's own go again; its backward pass may still want them till here.
            if module.processor is not processor:
                module.processor = processor
        for part in parts:
            part.forward = functools.wraps(part.forward)(functools.partial(denoise, part.forward))
        try:
            yield
        finally:
            for part in parts:
                del part.forward  # the instance's; the class's own comes back

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The adapters switched off, or the frozen copies in the denoisers' places.

        Raises:
            RuntimeError: without adapters or copies.
        """
        if not self._lora and not self._copies:
            raise RuntimeError("this policy was built without a reference")
        self._exchange(trained=False)
        try:
            yield
        finally:
            self._exchange(trained=True)

    def _exchange(self, *, trained: bool) -> None:
        for name, part in self.parts.items():
            if self._lora:
                switch_adapters(part, trained)
            else:
                setattr(self._pipeline, name, part if trained else self._copies[name])

    def save(self, directory: Path) -> None:
        """Full fine-tuning: a folder for each, as in their pipeline. LoRA: `pytorch_lora_weights.safetensors`, with
        several denoisers in such a folder for each."""
        for name, part in self.parts.items():
            if self._lora:
                save_adapter(part, directory / name if len(self.parts) > 1 else directory)
            else:
                part.save_pretrained(directory / name)

    def restore(self, directory: Path) -> None:
        """Load what `save` wrote."""
        for name, part in self.parts.items():
            if self._lora:
                restore_adapter(part, directory / name if len(self.parts) > 1 else directory)
            else:
                saved = type(part).from_pretrained(directory / name, dtype=part.dtype)
                part.load_state_dict(saved.state_dict())


def _set_attention(part: Any, name: str) -> None:
    """
    Raises:
        RecipeError: if diffusers does not know the backend or cannot run it here, or the denoiser takes none.
    """
    if not any(hasattr(module.processor, "_attention_backend") for module in _attentions(part)):
        raise RecipeError(
            f"policy.attention: {type(part).__name__} has no attention that takes a backend; leave it out"
        )
    valid = [backend.value for backend in AttentionBackendName]
    if name not in valid:
        raise RecipeError(f"policy.attention: no backend {name!r} of diffusers{nearest(name, valid)}")
    try:
        with attention_backend():  # which diffusers also makes the choice of every other model of the process
            part.set_attention_backend(name)
    except (RuntimeError, ImportError, ValueError) as error:
        raise RecipeError(f"policy.attention: {name} cannot run here: {one_line(error)}") from error


def _attentions(part: nn.Module) -> Iterator[Any]:
    """Its layers that have their attention computed by a processor."""
    for module in part.modules():
        if "processor" in vars(module) or "processor" in vars(module)["_modules"]:
            yield module

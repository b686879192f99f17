"""A pipeline's frozen encoders: their results are remembered, so that a replay never runs them; the text encoders'
weights may be out of the way in between."""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from unified_rl.errors import RecipeError
from unified_rl.policies.memo import num_bytes
from unified_rl.policies.picture_memo import PictureMemo
from unified_rl.types import Prompt

UNLIMITED = 1 << 62
"""Bytes: encodings of text encoders that are gone must not be forgotten."""
TEXT = re.compile(r"(.*_)?text_encoder(_\d+)?|bert")
"""Names of the components that encode texts."""
PICTURES = re.compile(r"image_encoder|(.*_)?vae|movq|vqvae")
"""Names of those that encode pictures, videos or sounds; all but the first one by their method `encode`."""


class Encoders:
    """Remembers prompt encodings by row, and other frozen encoders' results by content."""

    def __init__(self, pipeline: Any, mode: str) -> None:
        """
        Args:
            mode: of the text encoders: "keep", "offload" or "drop".
        """
        self.seeds: list[int] = []
        """Of the rows of the current call; they draw what the pipeline draws without a generator."""
        self._rows: Sequence[Any] = []
        """What each row of the current call is made of."""
        self._memo = PictureMemo(UNLIMITED) if mode == "drop" else PictureMemo()
        self._text = TextEncoders(pipeline, mode)
        self._ahead = self._in_prompt = False
        self._encoded = 0
        """Bytes of the prompts that were encoded last."""
        for name in _prompt_encoders(pipeline):
            setattr(pipeline, name, self._remembered(name, getattr(pipeline, name)))
        for name in _encoding_batches(pipeline):
            setattr(pipeline, name, functools.partial(self._text_whole, name, getattr(pipeline, name)))
        for name, component in pipeline.components.items():
            if not isinstance(component, nn.Module):
                continue
            if TEXT.fullmatch(name):
                forward = component.forward
                component.forward = functools.wraps(forward)(functools.partial(self._texts, name, component, forward))
            method = "forward" if name == "image_encoder" else "encode"
            if PICTURES.fullmatch(name) and hasattr(component, method):
                original: Callable = getattr(component, method)
                pictures = functools.partial(self._pictures, name, original)
                setattr(component, method, functools.wraps(original)(pictures))

    def begin(self, prompts: Sequence[Prompt], call: Mapping[str, Any], seeds: Sequence[int]) -> None:
        """Tell of the rows of the next call: their prompts, its other arguments, and `seeds`."""
        self.seeds = [*seeds]
        self._rows = [(prompt.text, prompt.images, prompt.columns, call) for prompt in prompts]

    def ahead(self, prompts: Sequence[Prompt], call: Callable[[Sequence[Prompt]], None], *, one_row: bool) -> None:
        """Encode prompts that will come, one by one; and where a class pads texts to the longest of a call, as long as
        the longest of all, so that each fits beside any other.

        Args:
            call: runs the pipeline for some prompts up to its denoiser.
            one_row: the class takes one row a call.
        """
        sizes: list[int] = []
        self._ahead = True
        for prompt in prompts:
            self._encoded = 0
            call([prompt])
            sizes.append(self._encoded)
        if not one_row and len(set(sizes)) > 1:
            shortest, longest = (prompts[sizes.index(extreme(sizes))].text for extreme in (min, max))
            with self._memo.nothing_new():
                for prompt, size in zip(prompts, sizes, strict=True):
                    call([prompt, replace(prompt, text=longest if size < max(sizes) else shortest)])
        self._ahead = False

    @contextmanager
    def afresh(self) -> Iterator[None]:
        """Inside it, nothing is known of what was encoded before."""
        known, self._memo = self._memo, PictureMemo()
        try:
            yield
        finally:
            self._memo = known

    def drop(self) -> None:
        """Free the text encoders' weights; what was not encoded yet cannot be any more."""
        self._text.drop()

    def _remembered(self, name: str, encode_prompt: Callable) -> Callable:
        def encode(*args: Any, **kwargs: Any) -> Any:
            self._text.bring()
            return encode_prompt(*args, **kwargs)

        @functools.wraps(encode_prompt)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            prompt = args[0] if args else kwargs.get("prompt")
            num_rows = len(prompt) if isinstance(prompt, list) else 0
            encoded = None
            if isinstance(prompt, str):  # some calls take a lone prompt as it is, and several in a list
                listed = (([prompt], *args[1:]), kwargs) if args else ((), {**kwargs, "prompt": [prompt]})
                encoded = self._memo.found(name, *listed, 1)
            if encoded is None:
                with self._prompt(by_row=num_rows > 0):
                    encoded = self._memo.by_row(name, encode, args, kwargs, num_rows)
            self._encoded += num_bytes(encoded)
            return encoded

        return remembered

    @contextmanager
    def _prompt(self, *, by_row: bool) -> Iterator[None]:
        """Inside it, prompts are encoded; `by_row`: by what remembers its own results so."""
        self._in_prompt = by_row
        try:
            with self._text.encoding():
                yield
        finally:
            self._in_prompt = False

    def _text_whole(self, name: str, encode: Callable, *args: Any, **kwargs: Any) -> Any:
        """A text encoder's result for prompts together with their pictures, by the content of the call's rows."""

        def brought(*args: Any, **kwargs: Any) -> Any:
            self._text.bring()
            return encode(*args, **kwargs)

        with self._prompt(by_row=True):  # as far as that goes
            return self._memo.of_rows(name, brought, args, kwargs, self._rows)

    def _texts(self, name: str, encoder: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """A text encoder's forward; its rows are remembered where nothing around it does so, and found everywhere."""

        def brought(*args: Any, **kwargs: Any) -> Any:
            self._text.bring()
            return forward(*args, **kwargs)

        if any(part._forward_hooks for part in encoder.modules()):
            return brought(*args, **kwargs)  # hooks read what a layer computes
        if "use_cache" in inspect.signature(forward).parameters and kwargs.get("past_key_values") is None:
            kwargs.setdefault("use_cache", False)  # nothing goes on from an encoding, and a cache has no rows
        name = f"{name} in {next(encoder.parameters()).dtype}"  # token ids say nothing of it
        with self._text.encoding():
            keep = not (self._in_prompt and self._memo.is_split)
            return self._memo.batch(name, brought, args, kwargs, min_dims=2, keep=keep)

    def _pictures(self, name: str, encode: Callable, *args: Any, **kwargs: Any) -> Any:
        """A frozen encoder's result by content; a VAE's draw without a generator comes from the rows' own seeds."""
        min_dims = 4 if name == "image_encoder" else 3
        # Ahead of a run, room is for texts.
        result = self._memo.batch(name, encode, args, kwargs, min_dims=min_dims, keep=not self._ahead)
        distribution = getattr(result, "latent_dist", None)
        if isinstance(distribution, DiagonalGaussianDistribution) and len(distribution.mean) % len(self.seeds) == 0:
            draw: Callable = functools.partial(type(distribution).sample, distribution)
            seeds = self.seeds * (len(distribution.mean) // len(self.seeds))  # guidance doubles the rows

            def sample(generator: Any = None) -> Tensor:
                return draw(generator or [torch.Generator().manual_seed(seed) for seed in seeds])

            distribution.sample = sample  # type: ignore[method-assign]
        return result


def _prompt_encoders(pipeline: Any) -> list[str]:
    """The method that encodes prompts, row by row: older classes have a private one alone."""
    return [name for name in ("encode_prompt", "_encode_prompt") if hasattr(pipeline, name)][:1]


def _encoding_batches(pipeline: Any) -> list[str]:
    """Methods that encode prompts together with their pictures, of which no row has a fixed number."""
    return [name for name in dir(type(pipeline)) if name.startswith("encode_prompt_")]


class TextEncoders:
    """A pipeline's text encoders, whose weights leave their device except while they encode, or for ever.

    Only the parameters' storage moves: the modules stay where pipelines look for a device and a dtype.
    """

    def __init__(self, pipeline: Any, mode: str) -> None:
        """
        Args:
            mode: "keep", "offload" or "drop".

        Raises:
            RecipeError: if the pipeline has none, or they are to be dropped, but it does not encode prompts by a method
                of its own, after which it can be left, or together with pictures.
        """
        found = [part for name, part in pipeline.components.items() if TEXT.fullmatch(name)]
        encoders = [part for part in found if isinstance(part, nn.Module)]
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._encoders = encoders
        self._depth = 0
        self._here = False
        if mode == "keep":
            return
        batches = _encoding_batches(pipeline)
        if not encoders:
            raise RecipeError(f"policy.memory.text_encoders: {type(pipeline).__name__} has none to {mode}")
        if mode == "drop" and not _prompt_encoders(pipeline):
            raise RecipeError(
                f"policy.memory.text_encoders: {type(pipeline).__name__} has no method encode_prompt, by which prompts"
                " could be encoded before the run; use offload"
            )
        if batches and mode == "drop":
            raise RecipeError(
                f"policy.memory.text_encoders: {type(pipeline).__name__} encodes prompts and pictures batch by batch"
                f" ({batches[0]}), which cannot be done before the run; use offload"
            )
        for encoder in encoders:
            self._weights |= {parameter: parameter.data.cpu() for parameter in encoder.parameters()}
        self._put_away()

    def bring(self) -> None:
        """Let them encode, until the end of the surrounding `encoding`."""
        if self._here:
            return
        self._here = True
        for parameter, weight in self._weights.items():
            parameter.data = weight.to(parameter.device, parameter.dtype)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Surrounds whatever may call the encoders."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._put_away()

    def drop(self) -> None:
        """Give their weights' memory back for good; a layer that is called then raises a RecipeError."""
        self._weights.clear()
        for encoder in self._encoders:
            for layer in encoder.modules():
                layer.register_forward_pre_hook(_gone)

    def _put_away(self) -> None:
        self._here = False
        for parameter in self._weights:
            parameter.data = parameter.data.new_empty(0)


def _gone(*_: Any) -> None:
    raise RecipeError(
        "policy.memory.text_encoders: drop encodes all prompts of data before the run, and this batch of texts is"
        " none of them, nor padded as they were; use offload"
    )

"""A pipeline's frozen encoders: their results are remembered, so that a replay never runs them; the text encoders'
weights may be out of the way in between."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from unified_rl.errors import RecipeError
from unified_rl.policies.picture_memo import PictureMemo
from unified_rl.policies.scheduler_head import LoopLeft

UNLIMITED = 1 << 62
"""Bytes: encodings of text encoders that are gone must not be forgotten."""


class Encoders:
    """Remembers prompt encodings by row, and other frozen encoders' results by content."""

    def __init__(self, pipeline: Any, mode: str) -> None:
        """
        Args:
            mode: of the text encoders: "keep", "offload" or "drop".
        """
        self.seeds: list[int] = []
        """Of the rows of the current call; they draw what the pipeline draws without a generator."""
        self._memo = PictureMemo(UNLIMITED) if mode == "drop" else PictureMemo()
        self._text = TextEncoders(pipeline, mode)
        self._alone = False
        if hasattr(pipeline, "encode_prompt"):
            pipeline.encode_prompt = self._remembered(pipeline.encode_prompt)
        for name in _encoding_batches(pipeline):
            setattr(pipeline, name, functools.partial(self._text_whole, name, getattr(pipeline, name)))
        for name, component in pipeline.components.items():
            method = {"image_encoder": "forward", "vae": "encode"}.get(name)
            if method is not None and isinstance(component, nn.Module):
                original: Callable = getattr(component, method)
                whole = functools.partial(self._remember_whole, name, original)
                setattr(component, method, functools.wraps(original)(whole))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside it, a pipeline's call is left once its prompts are encoded."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

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

    def _remembered(self, encode_prompt: Callable) -> Callable:
        def encode(*args: Any, **kwargs: Any) -> Any:
            self._text.bring()
            return encode_prompt(*args, **kwargs)

        @functools.wraps(encode_prompt)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            prompt = args[0] if args else kwargs.get("prompt")
            num_rows = len(prompt) if isinstance(prompt, list) else 0
            with self._text.encoding():
                encoded = self._memo.by_row("encode_prompt", encode, args, kwargs, num_rows)
            if self._alone:
                raise LoopLeft
            return encoded

        return remembered

    def _text_whole(self, name: str, encode: Callable, *args: Any, **kwargs: Any) -> Any:
        """A text encoder's result for a whole batch by content."""

        def brought(*args: Any, **kwargs: Any) -> Any:
            self._text.bring()
            return encode(*args, **kwargs)

        with self._text.encoding():
            return self._memo.whole(name, brought, args, kwargs)

    def _remember_whole(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """A frozen encoder's result by content; a VAE's draw without a generator comes from the rows' own seeds."""
        result = self._memo.pictures(name, function, args, kwargs)
        distribution = getattr(result, "latent_dist", None)
        if isinstance(distribution, DiagonalGaussianDistribution) and len(distribution.mean) % len(self.seeds) == 0:
            draw: Callable = functools.partial(type(distribution).sample, distribution)
            seeds = self.seeds * (len(distribution.mean) // len(self.seeds))  # guidance doubles the rows

            def sample(generator: Any = None) -> Tensor:
                return draw(generator or [torch.Generator().manual_seed(seed) for seed in seeds])

            distribution.sample = sample  # type: ignore[method-assign]
        return result


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
            RecipeError: if the pipeline does not encode through `encode_prompt`, where it can be watched, or batches
                of prompts and pictures are to be encoded before they are known.
        """
        found = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
        encoders = [part for part in found if isinstance(part, nn.Module)]
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._gone = False
        if mode == "keep":
            return
        batches = _encoding_batches(pipeline)
        if not encoders or not (hasattr(pipeline, "encode_prompt") or batches):
            raise RecipeError(f"policy.memory.text_encoders: {type(pipeline).__name__} has none to {mode}")
        if batches and mode == "drop":
            raise RecipeError(
                f"policy.memory.text_encoders: {type(pipeline).__name__} encodes prompts and pictures batch by batch"
                f" ({batches[0]}), which cannot be done before the run; use offload"
            )
        for encoder in encoders:
            self._weights |= {parameter: parameter.data.cpu() for parameter in encoder.parameters()}
        self._put_away()

    def bring(self) -> None:
        """Let them encode, until the end of the surrounding `encoding`.

        Raises:
            RecipeError: if they were dropped.
        """
        if self._gone:
            raise RecipeError(
                "policy.memory.text_encoders: drop encodes all prompts of data before the run, and this text is none"
                " of them; use offload"
            )
        for parameter, weight in self._weights.items():
            parameter.data = weight.to(parameter.device, parameter.dtype)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Surrounds whatever may call the encoders."""
        try:
            yield
        finally:
            self._put_away()

    def drop(self) -> None:
        """Give their weights' memory back for good."""
        self._weights.clear()
        self._gone = True

    def _put_away(self) -> None:
        for parameter in self._weights:
            parameter.data = parameter.data.new_empty(0)

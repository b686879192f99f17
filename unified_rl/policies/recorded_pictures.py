"""Recorded pictures as a pipeline's trajectories: finished latents, and what the loop looks like around them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unified_rl.policies.bypass import bypassing, recording
from unified_rl.policies.differentiable import replaced_decoder
from unified_rl.policies.latent_map import LatentMap, measure
from unified_rl.policies.scheduler_head import LoopLeft, Pass, SamplePass, Transition, UnsupportedPipelineError
from unified_rl.types import Completion, Prompt, Segment

Run = Callable[[Pass, Callable], Tensor]
"""One call of the pipeline for one prompt, driven by a pass and a denoiser wrapper, to what reached the decoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a pipeline's loop looks like from outside; the same for every prompt."""

    templates: list[list[Any]]
    levels: list[tuple[float, float]]
    map: LatentMap

    def segment(self, pipeline: Any, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Segment:
        """Pictures as finished samples without a chain behind them."""
        num_rows, num_steps = len(prompts), len(self.levels)
        pictures = [completion.images[0] for completion in completions]
        latents = self.map.latents_of(encode(pipeline, pictures, self.map.decoded_shape).cpu())
        return Segment(
            actions={
                "prompts": list(prompts),
                "states": list(latents.unsqueeze(1)),
                "stored": [[num_steps - 1]] * num_rows,
                "templates": [self.templates] * num_rows,
                "levels": [self.levels] * num_rows,
            },
            rollout_log_probs=torch.zeros(num_rows, num_steps),
            loss_mask=torch.zeros(num_rows, num_steps, dtype=torch.bool),
            turn_ids=torch.zeros(num_rows, num_steps, dtype=torch.int64),
        )


def layout_of(run: Run) -> Layout:
    """Measure a pipeline: one loop with its denoiser for one prompt, and a few without."""
    templates: list[list[Any]] = []
    tape = SamplePass([0])
    run(tape, recording(tape, templates, 1))

    def before_decoding(latents: Tensor) -> Tensor:
        finished = FinishedPass(len(tape.states), latents)
        return run(finished, bypassing(finished, templates, 1)).cpu()

    shape = tuple(tape.states[-1].shape[1:])
    return Layout(templates=templates, levels=tape.levels, map=measure(before_decoding, shape))


class FinishedPass:
    """Skips a whole loop and ends it at given latents."""

    def __init__(self, num_steps: int, latents: Tensor) -> None:
        self.step = 0
        self.asked = range(0)
        self._num_steps = num_steps
        self._latents = latents

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        self.step += 1
        if self.step < self._num_steps:
            return latents
        copies = len(latents) // len(self._latents)
        return self._latents.repeat(copies, *[1] * (self._latents.ndim - 1)).to(latents)


@contextmanager
def catching_decoder(pipeline: Any, caught: list[Tensor]) -> Iterator[None]:
    """Inside it, what reaches the VAE's decoder is caught, and the loop left.

    Raises:
        UnsupportedPipelineError: if the pipeline has no VAE.
    """
    vae = vae_of(pipeline)

    def catch(decoded: Tensor, *args: Any, **kwargs: Any) -> Any:
        caught.append(decoded.detach())
        raise LoopLeft

    with replaced_decoder(vae, catch):
        yield


def vae_of(pipeline: Any) -> Any:
    """The pipeline's VAE.

    Raises:
        UnsupportedPipelineError: if it has none, or cannot prepare pictures.
    """
    name = type(pipeline).__name__
    if "vae" not in pipeline.components or "image_processor" not in vars(pipeline):
        raise UnsupportedPipelineError(f"{name} has no VAE and image processor, so recorded pictures have no latents")
    return pipeline.vae


def encode(pipeline: Any, pictures: Sequence[Image.Image], shape: tuple[int, ...]) -> Tensor:
    """What the decoder would get for pictures: [B, *shape].

    Raises:
        UnsupportedPipelineError: if the pictures have another size than the pipeline's own.
    """
    vae = vae_of(pipeline)
    pixels = torch.cat([pipeline.image_processor.preprocess(picture) for picture in pictures])
    parameter = next(vae.parameters())
    pixels = pixels.to(parameter.device, parameter.dtype)
    if len(shape) == 4:  # a video decoder: one frame
        pixels = pixels.unsqueeze(2)
    with torch.no_grad():
        encoded = vae.encode(pixels)
    found = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
    if tuple(found.shape[1:]) != tuple(shape):
        raise UnsupportedPipelineError(
            f"data.rollouts: a picture of {pictures[0].width} x {pictures[0].height} becomes latents"
            f" {tuple(found.shape[1:])}, the pipeline's own are {tuple(shape)}; set height and width in"
            " policy.sampling.call"
        )
    return found

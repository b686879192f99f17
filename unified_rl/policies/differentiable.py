"""The last steps of a pipeline's loop and its decoder, with gradients."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unified_rl.policies.bypass import bypassing
from unified_rl.policies.denoising import PredictPass
from unified_rl.policies.scheduler_head import (
    MIN_STD,
    UnsupportedPipelineError,
    sampling_generators,
    without_copies,
)
from unified_rl.policies.scheduler_steps import Forward, Transition
from unified_rl.types import Segment


class GradientPass:
    """Goes on from a rollout's states as its sampling did, with gradients from one step on."""

    def __init__(self, segment: Segment, first: int, seeds: Sequence[int], *, kind: str, num_steps: int) -> None:
        """
        Args:
            first: the first step with gradients; of kind clean_prediction, the only one.
            seeds: of the rollout's rows.
            num_steps: of the loop.

        Raises:
            UnsupportedPipelineError: if the states differ in shape from step to step (joint audio and video).
        """
        self.step = 0
        self._states: Any = segment.actions["states"]
        if any(not isinstance(row, Tensor) for row in self._states):
            raise UnsupportedPipelineError("the loop steps several kinds of latents, whose gradient is not defined")
        self._slots = {step: slot for slot, step in enumerate(segment.actions["stored"][0])}
        self._resumed = max((step for step in self._slots if step < first), default=-1)
        """The last step whose recorded result is used."""
        self._first = first
        self._clean = kind == "clean_prediction"
        self.asked = range(self._resumed + 1, first + 1 if self._clean else num_steps)
        self._noisy = segment.loss_mask[0].tolist()
        self._generators = sampling_generators(seeds)
        self._shape = tuple(self._states[0].shape[1:])

    @property
    def with_grad(self) -> bool:
        """Whether the current step has gradients."""
        return self.step >= self._first and self.step in self.asked

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        following = self._following(self.step, transition, latents)
        self.step += 1
        return following

    def _following(self, step: int, transition: Transition, latents: Tensor) -> Tensor:
        if step <= self._resumed:
            if self._noisy[step]:
                self._noise()  # keeps the streams in step with the rollout's
            return self._recorded(latents) if step == self._resumed else latents
        if step not in self.asked:  # the clean prediction is final
            return latents
        if self._clean and step == self._first:
            return predicted_clean(transition.forward, latents).to(latents.dtype)
        mean, std = transition()
        mean, copies = without_copies(mean, len(self._states))
        if std >= MIN_STD:
            mean = mean + std * self._noise().to(mean.device)
        following = mean.to(latents.dtype)
        following = following if step >= self._first else following.detach()
        return following.repeat(copies, *[1] * (following.ndim - 1))

    def _noise(self) -> Tensor:
        return torch.stack([torch.randn(self._shape, generator=each) for each in self._generators])

    def _recorded(self, latents: Tensor) -> Tensor:
        found = torch.stack([row[self._slots[self._resumed]] for row in self._states]).to(latents)
        copies = len(latents) // len(found)
        return found.repeat(copies, *[1] * (found.ndim - 1))


class RenoisedPass(PredictPass):
    """Noises finished samples again to the level of the last step, and takes that step with gradients."""

    @property
    def with_grad(self) -> bool:
        """Whether the current step has gradients."""
        return self.step in self.asked

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        if self.step not in self.asked:
            return super().next_latents(transition, latents)
        self.check_arrived(latents)
        mean, copies = without_copies(transition()[0], len(self.noised))
        self.step += 1
        return mean.to(latents.dtype).repeat(copies, *[1] * (mean.ndim - 1))


def start(
    segment: Segment, kind: str, step: int, seeds: Sequence[int], device: torch.device
) -> tuple[GradientPass | RenoisedPass, list[int]]:
    """The pass of a kind of gradient, and the noisy steps of its loop."""
    num_steps = segment.loss_mask.shape[1]
    if kind == "renoised":
        return RenoisedPass(segment, num_steps - 1, seeds, device), []
    rows: Any = segment.actions["prompts"]
    tape = GradientPass(segment, step, [prompt.seed for prompt in rows], kind=kind, num_steps=num_steps)
    return tape, segment.loss_mask[0].nonzero().flatten().tolist()


def predicted_clean(forward: Forward, latents: Tensor) -> Tensor:
    """The clean sample that a denoiser's prediction stands for."""
    output, latents = forward.output.float(), latents.float()
    signal, level = forward.signal.to(output), forward.level.to(output)
    if forward.predicts == "velocity":
        return latents - level * output
    if forward.predicts == "epsilon":
        return (latents - level * output) / signal
    if forward.predicts == "v_prediction":
        return signal * latents - level * output
    return output


def with_gradients(tape: GradientPass | RenoisedPass, segment: Segment) -> Callable:
    """A denoiser wrapper: gradients, with activation checkpoints, in the steps that have them; the plain forward in the
    other asked steps; none elsewhere."""
    templates: Any = segment.actions["templates"][0]
    # On the rollout's own path; finished samples that were noised again have no earlier steps.
    outputs: Any = segment.actions.get("outputs") if isinstance(tape, GradientPass) else None
    bypass = bypassing(tape, templates, segment.num_rows, outputs)

    def denoise(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if not tape.with_grad:
            with torch.no_grad():
                return bypass(forward, *args, **kwargs)
        return bypass(functools.partial(checkpoint, forward, use_reentrant=False), *args, **kwargs)

    return denoise


@contextmanager
def checkpointed_decoder(pipeline: Any) -> Iterator[None]:
    """Inside it, the pipeline's VAE keeps no activations of its decoder for the backward pass."""
    vae: Any = pipeline.components.get("vae")
    if not isinstance(vae, nn.Module):
        yield
        return
    decode: Any = vae.decode
    with replaced_decoder(vae, functools.wraps(decode)(functools.partial(checkpoint, decode, use_reentrant=False))):
        yield


@contextmanager
def replaced_decoder(vae: Any, decode: Callable) -> Iterator[None]:
    """Inside it, a VAE decodes by another function."""
    own = vars(vae).get("decode")  # memory settings may have put one there
    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode  # the instance's; the class's own comes back
        if own is not None:
            vae.decode = own


def pictures_of(output: Any, num_rows: int, name: str) -> Tensor:
    """[B, 3, H, W] of a call with output_type="pt".

    Raises:
        UnsupportedPipelineError: if the pipeline returned no such pictures, or without gradients.
    """
    pictures = output[0]
    if not isinstance(pictures, Tensor) or pictures.ndim != 4 or len(pictures) != num_rows:
        raise UnsupportedPipelineError(f"{name} does not return one picture a sample, which rewards could see")
    if not pictures.requires_grad:
        raise UnsupportedPipelineError(f"{name}: no gradient flows from its pictures to the denoiser")
    return pictures.float()

"""A pipeline's prediction for finished samples that were noised again, through the pipeline's own loop.

The loop is fast-forwarded to the asked step as in a replay, but there the latents are the noised samples: they are put
where the step before left its result, or where the loop starts. What the pipeline then hands to its scheduler is the
prediction, with guidance, packing and casts as in sampling.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unified_rl.policies.scheduler_head import LoopLeft, UnsupportedPipelineError, without_copies
from unified_rl.policies.scheduler_steps import Forward, Transition
from unified_rl.types import Denoised, Segment


class PredictPass:
    """Brings noised samples to one step of the loop and takes the prediction there."""

    def __init__(self, segment: Segment, step: int, seeds: Sequence[int], device: torch.device) -> None:
        """
        Args:
            segment: finished samples; their last states are the clean ones.
            step: of the schedule that drew them.
            seeds: one a sample; rows with equal seeds and shapes get equal noise.

        Raises:
            UnsupportedPipelineError: if the samples differ in shape from step to step (joint audio and video).
        """
        self.step = 0
        self.asked = range(step, step + 1)
        states: Any = segment.actions["states"]
        if any(not isinstance(row, Tensor) for row in states):
            raise UnsupportedPipelineError("the loop steps several kinds of latents, which have no joint noise level")
        self.clean = torch.stack([row[-1].float() for row in states]).to(device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.randn(self.clean.shape[1:], generator=generator) for generator in generators]
        self.noise = torch.stack(noise).to(device)
        signal, level = segment.actions["levels"][0][step]
        self.noised = signal * self.clean + level * self.noise
        self._forward: Forward | None = None

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        self.step += 1
        if self.step == self.asked.start:
            return self._noised_like(latents)
        if self.step == self.asked.stop:
            self.check_arrived(latents)
            self._forward = transition.forward
            raise LoopLeft
        return latents

    def check_arrived(self, latents: Tensor) -> None:
        """Make sure that a step of the loop started from the noised samples.

        Raises:
            UnsupportedPipelineError: if the pipeline put something else in their place.
        """
        if not torch.equal(latents.detach(), self._noised_like(latents)):
            raise UnsupportedPipelineError("the pipeline changes its latents between two steps of its scheduler")

    def _noised_like(self, latents: Tensor) -> Tensor:
        copies = len(latents) // len(self.noised)
        return self.noised.repeat(copies, *[1] * (self.noised.ndim - 1)).to(latents)

    def denoised(self, name: str) -> Denoised:
        """What was predicted.

        Raises:
            UnsupportedPipelineError: if the loop ended before the asked step, or no gradient leads to the denoiser.
        """
        forward = self._forward
        if forward is None:
            raise UnsupportedPipelineError(f"{name}: the loop took another number of steps than sampling did")
        output, _ = without_copies(forward.output.float(), len(self.clean))
        if torch.is_grad_enabled() and not output.requires_grad:
            raise UnsupportedPipelineError(f"{name}: no gradient flows from the scheduler's step to the denoiser")
        signal, level = forward.signal.to(output), forward.level.to(output)
        target, clean_scale = {
            "velocity": (self.noise - self.clean, -level),
            "epsilon": (self.noise, -level / signal),
            "v_prediction": (signal * self.noise - level * self.clean, -level),
            "sample": (self.clean, torch.ones_like(level)),
        }[forward.predicts]
        return Denoised(output=output, target=target, clean_scale=clean_scale, level=level)


def first_latents(pipeline_class: type, tape: PredictPass) -> dict[str, Tensor]:
    """The call's `latents` argument for a prediction at the first step, which no step comes before.

    Raises:
        UnsupportedPipelineError: if the pipeline makes its first latents itself.
    """
    if tape.asked.start > 0:
        return {}
    if "latents" not in inspect.signature(pipeline_class.__call__).parameters:
        raise UnsupportedPipelineError(f"{pipeline_class.__name__} takes no latents, so its first step cannot be asked")
    return {"latents": tape.noised}

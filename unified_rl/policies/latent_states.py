"""The latents in which denoising steps were drawn, as a critic sees them: from the recorded states, without running the
denoiser. Only the first ones are not recorded; the pipeline makes them again."""

from typing import Any

import torch
from torch import Tensor

from unified_rl.policies.scheduler_head import LoopLeft, Transition, UnsupportedPipelineError
from unified_rl.types import Segment, StepStates


class StartPass:
    """Takes the latents that the loop begins with, and leaves it."""

    def __init__(self) -> None:
        self.step = 0
        self.asked = range(0)  # the denoiser is bypassed
        self.latents: Tensor | None = None

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        self.latents = latents.detach()
        raise LoopLeft


def latent_states(name: str, tape: StartPass, segment: Segment, steps: slice, scheduler: Any) -> StepStates:
    """Latents [B, s, C, ...] before each of the steps, and their times in [0, 1], 1 being noise.

    A deterministic step, which is no decision, may start from latents that were not stored: zeros stand for them.

    Args:
        name: of the pipeline, for errors.
        tape: has passed the beginning of the segment's loop.
        scheduler: as that loop has left it.

    Raises:
        UnsupportedPipelineError: if the latents differ in shape from step to step.
    """
    recorded: Any = segment.actions["states"]
    stored: Any = segment.actions["stored"][0]
    if tape.latents is None or any(not isinstance(row, Tensor) for row in recorded):
        raise UnsupportedPipelineError(f"{name}: latents of several shapes in one loop; a critic cannot see them")
    reached = torch.stack(list(recorded)).to(tape.latents.device, torch.float32)
    shape = reached.shape[2:]
    if tape.latents.numel() % shape.numel():
        raise UnsupportedPipelineError(f"{name}: its loop begins with latents of another shape than it goes on with")
    num_steps = segment.rollout_log_probs.shape[1]
    all_before = reached.new_zeros(len(reached), num_steps, *shape)
    all_before[:, 0] = tape.latents.reshape(-1, *shape)[: len(reached)]  # guidance may have doubled the rows
    for slot, step in enumerate(stored):
        if step + 1 < num_steps:
            all_before[:, step + 1] = reached[:, slot]
    before = all_before[:, steps]
    if len(shape) == 2:  # packed: [tokens, channels]
        before = before.transpose(2, 3)
    times = torch.as_tensor(scheduler.timesteps, dtype=torch.float32)[-num_steps:][steps]
    level = times / scheduler.config.num_train_timesteps
    if scheduler.config.get("invert_sigmas", False):  # told by the clean sample's share
        level = 1 - level
    return StepStates(state=before, level=level.to(before.device).expand(len(reached), -1))

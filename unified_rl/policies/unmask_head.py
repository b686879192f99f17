"""The policy head of a masked-diffusion pipeline: its own scheduler, run a row at a time, recorded and replayable.

The scheduler's own `step` draws the tokens and chooses which of them stay, so its schedule, temperatures and confidence
rule are the library's. Only the random numbers are each row's own, and the log-probs of what it commits are recorded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from diffusers import AmusedScheduler
from diffusers.schedulers.scheduling_amused import AmusedSchedulerOutput
from torch import Tensor

from unified_rl.policies.scheduler_head import LoopLeft, UnsupportedPipelineError
from unified_rl.transitions import unmask

Draw = Callable[[int, torch.Generator], Tensor]
"""The scheduler's own step for one row: its number and generator to the state after it, [1, ...]."""


class UnmaskPass(Protocol):
    """One run through the pipeline's loop."""

    step: int
    """Number of scheduler steps done so far in this pass."""

    def next_tokens(self, logits: Tensor, state: Tensor, mask_id: int, draw: Draw) -> Tensor:
        """The next state [B, ...].

        Args:
            logits: [B, L, V] float32.
            state: [B, ...] L tokens a row.
        """
        ...


class UnmaskSample:
    """Draws every step from its row's own generator and records states and log-probs."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.step = 0
        self.states: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.commits: list[Tensor] = []
        """[B] bool a step: whether the row committed anything."""
        # Other streams than the pipeline's own generators, which replay must find untouched by these draws.
        self._generators = [torch.Generator().manual_seed((seed * 2 + 1) % (1 << 63)) for seed in seeds]

    def next_tokens(self, logits: Tensor, state: Tensor, mask_id: int, draw: Draw) -> Tensor:
        if len(state) != len(self._generators):
            raise UnsupportedPipelineError(f"the scheduler is stepped with {len(state)} rows")
        following = torch.cat([draw(row, generator) for row, generator in enumerate(self._generators)])
        committed = ((state == mask_id) & (following != mask_id)).flatten(1)
        result = unmask.log_prob(logits, following.flatten(1), committed)
        self.states.append(following)
        self.log_probs.append(result.total)
        self.commits.append(result.count > 0)
        self.step += 1
        return following


class UnmaskReplay:
    """Returns recorded states and scores those of the asked steps, with gradients."""

    def __init__(self, states: Sequence[Tensor], asked: range, samples: Sequence[Tensor] | None) -> None:
        """
        Args:
            states: [B] of [steps, ...], the state after each step of the loop.
            asked: the steps to score.
            samples: [B] of [...]; None: score what the step commits (sum), else all masked tokens of the state before
                it, as they are in the finished sample (mean).
        """
        self.step = 0
        self.asked = asked
        self.log_probs: list[Tensor] = []
        self._states, self._samples = states, samples

    def next_tokens(self, logits: Tensor, state: Tensor, mask_id: int, draw: Draw) -> Tensor:
        if self.step >= len(self._states[0]):
            raise UnsupportedPipelineError("the replayed loop steps its scheduler more often than sampling did")
        following = torch.stack([row[self.step] for row in self._states]).to(state)
        if self.step in self.asked:
            masked = (state == mask_id).flatten(1)
            if self._samples is None:
                committed = masked & (following != mask_id).flatten(1)
                self.log_probs.append(unmask.log_prob(logits, following.flatten(1), committed).total)
            else:
                finished = torch.stack(list(self._samples)).to(state).flatten(1)
                self.log_probs.append(unmask.log_prob(logits, finished, masked).mean)
        self.step += 1
        if self.step >= self.asked.stop:
            raise LoopLeft
        return following


class UnmaskHead:
    """Stands between a pipeline's scheduler and the current pass. `current` is set for the length of a pass."""

    def __init__(self) -> None:
        self.current: UnmaskPass | None = None


def recorded_scheduler(scheduler: Any, head: UnmaskHead) -> Any:
    """A twin of a masked-diffusion scheduler that is driven by the head's pass.

    Raises:
        UnsupportedPipelineError: if the scheduler's tokens cannot be scored.
    """
    config = scheduler.config
    if not isinstance(scheduler, AmusedScheduler):
        raise UnsupportedPipelineError(
            f"{type(scheduler).__name__}: no discrete kernel for this scheduler; an AmusedScheduler has one"
        )
    own_step = AmusedScheduler.step

    @functools.wraps(own_step)
    def step(self: Any, model_output, timestep, sample, starting_mask_ratio=1.0, generator=None, return_dict=True):
        assert head.current is not None, "the scheduler is stepped outside of a pass"
        scores = model_output.float()

        def draw(row: int, own: torch.Generator) -> Tensor:
            part = slice(row, row + 1)
            return own_step(self, scores[part], timestep, sample[part], starting_mask_ratio, own).prev_sample

        logits = scores.flatten(2).transpose(1, 2) if scores.ndim == 4 else scores
        following = head.current.next_tokens(logits, sample, self.config.mask_token_id, draw)
        if not return_dict:
            return (following, following)
        output: Any = AmusedSchedulerOutput  # its annotation of pred_original_sample is that of a generator
        return output(prev_sample=following, pred_original_sample=following)

    twin: Any = type("RecordedAmusedScheduler", (AmusedScheduler,), {"step": step})
    return twin.from_config(config)

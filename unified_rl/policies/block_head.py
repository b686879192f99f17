"""The policy head of a text denoiser: its block scheduler, run a row at a time, recorded.

diffusers' loops fill in a block of tokens after the other, for a batch: they go on with a block until every row is done
with it. Here each row has its own scheduler, random numbers and end, so that it is what it would be alone. Tokens are
drawn from the processed logits; which of them stay is the scheduler's own rule.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import BlockRefinementScheduler
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput
from torch import Tensor
from transformers import LogitsProcessorList

from unified_rl.policies.scheduler_head import UnsupportedPipelineError, sampling_generators
from unified_rl.transitions import unmask

OWN_STEP = BlockRefinementScheduler.step


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One row's block before a step, and what the step drew for it."""

    start: int
    """Where the block begins in the row's sequence; everything before it is known, nothing after it exists."""
    before: Tensor
    """[L] int64."""
    drawn: Tensor
    """[L] int64; only the scored places matter."""
    scored: Tensor
    """[L] bool: the places whose token was drawn and kept."""
    signal: Tensor | None
    """[L, H] what the denoiser was told of its former prediction (self-conditioning); None where it is told nothing."""


class BlockTape:
    """One run of the loop: rows' own random numbers, and every state in which a row drew tokens."""

    def __init__(self, seeds: Sequence[int], chain: LogitsProcessorList, limit: int) -> None:
        """
        Args:
            chain: turns logits into the distribution that tokens are drawn from.
            limit: length of a whole sequence; a block may reach beyond it, to places that nothing reads.
        """
        self.generators = sampling_generators(seeds)
        self.chain = chain
        self.states: list[list[State]] = [[] for _ in seeds]
        self.log_probs: list[list[float]] = [[] for _ in seeds]
        """In nats, of each state: the sum over the tokens that were kept."""
        self.start = 0
        """Where the block begins; whoever calls the loop keeps it."""
        self.limit = limit
        self.canvas: Tensor | None = None
        """[B, L] block that is denoised in place of the one that the loop made; for one step."""
        self.signal: Tensor | None = None
        """[B, L, H] of the denoiser's latest call."""
        self._schedulers: list[Any] = []
        self._rows: list[_Row] = []

    def begin(self, scheduler: BlockRefinementScheduler) -> None:
        """Take a schedule: each row gets a scheduler of its own, as some keep what they committed."""
        self._schedulers = [copy.copy(scheduler) for _ in self.generators]
        self._rows = [_Row() for _ in self.generators]

    def step(self, logits: Tensor, timestep: Any, sample: Tensor, **settings: Any) -> BlockRefinementSchedulerOutput:
        """One step of the loop for all rows: [B, L, V] logits and [B, L] tokens."""
        if len(sample) != len(self.generators):
            raise UnsupportedPipelineError(f"the scheduler is stepped with {len(sample)} rows")
        if not any(row.active for row in self._rows):  # the loop goes on to the next block
            self._rows = [_Row(active=not row.finished, finished=row.finished) for row in self._rows]
        if self.canvas is not None:
            sample, self.canvas = self.canvas, None
        # What the chain has already done; and tokens are always drawn.
        settings |= {"temperature": 1.0, "top_k": None, "top_p": None, "sampling_method": "multinomial"}
        # The generators live on the CPU, so that a seed means the same tokens on every device; so must all they meet.
        settings = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in settings.items()}
        mask_id = settings["mask_token_id"]
        outputs = []
        for number, (row, scheduler, generator) in enumerate(
            zip(self._rows, self._schedulers, self.generators, strict=True)
        ):
            one = slice(number, number + 1)
            row.masked = mask_id is not None and bool((sample[one] == mask_id).any())
            if not row.active:
                outputs.append(_nothing(sample[one], logits[one]))
                continue
            raw = logits[number].float()
            scores = self.chain(sample[number][:, None], raw)[None]  # type: ignore[arg-type]  # as LongTensor annotated
            output = OWN_STEP(scheduler, scores.cpu(), timestep, sample[one].cpu(), generator=generator, **settings)
            outputs.append(_like(output, logits[one]))
            self._record(number, sample[number], outputs[-1], scores)
        joined: dict[str, Any] = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        return BlockRefinementSchedulerOutput(**joined)

    def _record(self, number: int, before: Tensor, output: Any, scores: Tensor) -> None:
        """Note what a row drew, with scores [1, L, V]; places from its limit on are nobody's."""
        kept = output.transfer_index | output.editing_transfer_index
        kept = kept & (torch.arange(kept.shape[1], device=kept.device) < self.limit - self.start)
        if not kept.any():
            return
        self.log_probs[number].append(float(unmask.log_prob(scores, output.sampled_tokens, kept).total))
        self.states[number].append(
            State(
                start=self.start,
                before=before.cpu().clone(),  # the loop writes into it
                drawn=output.sampled_tokens[0].cpu(),
                scored=kept[0].cpu(),
                signal=None if self.signal is None else self.signal[number].cpu(),
            )
        )

    def goes_on(self, scheduler: BlockRefinementScheduler, edited: Tensor, finished: Tensor, **settings: Any) -> bool:
        """Whether any row is not done with the block, each judged by the scheduler's rule as if it were alone."""
        own = BlockRefinementScheduler.check_block_should_continue
        for number, row in enumerate(self._rows):
            if not row.active:
                continue
            row.fills += row.masked
            row.edits += not row.masked
            row.finished = bool(finished[number])
            row.active = own(
                scheduler,
                step_idx=row.fills,
                masks_remaining=row.masked,
                editing_transfer_index=edited[number : number + 1],
                post_steps=row.edits,
                finished=finished[number : number + 1],
                **settings,
            )
        return any(row.active for row in self._rows)


@dataclass(slots=True, kw_only=True)
class _Row:
    """Where a row is in its block."""

    active: bool = True
    finished: bool = False
    """Its text has ended."""
    masked: bool = False
    """Whether the block held masks before the current step."""
    fills: int = 0
    """Steps that began with masks."""
    edits: int = 0
    """Steps that began without."""


class BlockHead:
    """Stands between a pipeline's scheduler and the current run. `current` is set for the length of a run."""

    def __init__(self) -> None:
        self.current: BlockTape | None = None

    @contextmanager
    def driven(self, tape: BlockTape) -> Iterator[None]:
        """Inside it, the loop is driven by a tape."""
        self.current = tape
        try:
            yield
        finally:
            self.current = None


def recorded_blocks(scheduler: Any, head: BlockHead) -> Any:
    """A twin of a block scheduler that is driven by the head's tape."""

    def tape() -> BlockTape:
        assert head.current is not None, "the scheduler is stepped outside of a run"
        return head.current

    @functools.wraps(BlockRefinementScheduler.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        BlockRefinementScheduler.set_timesteps(self, *args, **kwargs)
        tape().begin(self)

    @functools.wraps(OWN_STEP)
    def step(self: Any, model_output, timestep, sample, *, generator=None, return_dict=True, **settings):
        return tape().step(model_output, timestep, sample, **settings)

    @functools.wraps(BlockRefinementScheduler.check_block_should_continue)
    def check(self: Any, step_idx, masks_remaining, editing_enabled, editing_transfer_index, post_steps,
              max_post_steps, finished):  # fmt: skip
        return tape().goes_on(
            self, editing_transfer_index, finished, editing_enabled=editing_enabled, max_post_steps=max_post_steps
        )

    members = {"set_timesteps": set_timesteps, "step": step, "check_block_should_continue": check}
    twin: Any = type("RecordedBlockScheduler", (BlockRefinementScheduler,), members)
    return twin.from_config(scheduler.config)


def _nothing(sample: Tensor, logits: Tensor) -> BlockRefinementSchedulerOutput:
    """The step of a row that is done with its block."""
    none: Any = torch.zeros_like(sample, dtype=torch.bool)
    tokens: Any = sample
    return BlockRefinementSchedulerOutput(
        prev_sample=tokens,
        transfer_index=none,
        editing_transfer_index=none,
        sampled_tokens=tokens,
        sampled_probs=torch.zeros_like(sample, dtype=torch.float32),
        pred_logits=logits,
    )


def _like(output: Any, logits: Tensor) -> BlockRefinementSchedulerOutput:
    """A row's step on the device of the logits; a denoiser that sees its former prediction sees the logits as they
    were, not the processed ones."""
    moved = {name: value.to(logits.device) for name, value in output.items() if name != "pred_logits"}
    return BlockRefinementSchedulerOutput(**moved, pred_logits=logits)

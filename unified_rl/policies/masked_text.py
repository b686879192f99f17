"""A text denoiser as a policy: LLaDA2, DiffusionGemma, masked language models.

Sampling runs diffusers' own loop with a recorded scheduler (`block_head`). A step's state is small (the block before
it), and one call of the model evaluates it again, so that scoring joins rows that are in different blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DiffusionGemmaForBlockDiffusion, LogitsProcessorList

from unified_rl.errors import RecipeError, nearest
from unified_rl.policies.block_denoisers import BlockDenoiser, CanvasBlocks, MaskedBlocks
from unified_rl.policies.block_head import BlockTape, State
from unified_rl.policies.categorical_head import processors, score
from unified_rl.policies.lora import make_trained, reference_of, restore_model
from unified_rl.policies.masked_text_model import load_model
from unified_rl.policies.probing import float32_probes
from unified_rl.policies.savings import recomputing
from unified_rl.policies.text_inputs import TextInputs
from unified_rl.policies.words import suppressed_ids
from unified_rl.protocols import Probe
from unified_rl.recipe.policy import MaskedTextSampling, PolicyBlock
from unified_rl.transitions import unmask
from unified_rl.types import Completion, Prompt, Segment, StepStats, Trajectory

SEGMENT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """One row of a run."""

    sequence: Tensor
    """[T] prompt and text, as the loop left them."""
    prompt: int
    """Tokens of the prompt."""
    end: int
    """Where the text ends: after its first end token, or at its limit."""
    states: list[State]
    log_probs: list[float]


class MaskedTextPolicy:
    """A model that fills in text. See `unified_rl.protocols.Policy`."""

    steps_per_forward: Mapping[str, int | None] = {SEGMENT: 1}

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        block: PolicyBlock,
        *,
        evaluation: MaskedTextSampling | None = None,
        with_reference: bool = False,
    ) -> None:
        """Take over a model, already on its device and in its dtype.

        Args:
            evaluation: sampling settings of evaluation; None: those of `block.sampling`.
            with_reference: keep what `reference()` needs (full fine-tuning: a frozen copy).

        Raises:
            RecipeError: if the tokenizer lacks an end or a mask, a call argument is not for this model, or the adapter
                or train patterns match nothing.
            UnsupportedPipelineError: if the model cannot be called as its pipeline does.
        """
        assert isinstance(block.sampling, MaskedTextSampling)
        self.version = 0
        self.rollout = 0
        self._block = block
        self._settings: dict[bool, MaskedTextSampling] = {False: block.sampling, True: evaluation or block.sampling}
        self._tokenizer = tokenizer
        self._end_id = _end_id(tokenizer)
        self._denoiser = _denoiser_of(model, tokenizer, self._end_id, block.sampling)
        for key in (*block.sampling.call, *self._settings[True].call):
            if key not in self._denoiser.call_keys:
                known = self._denoiser.call_keys
                raise RecipeError(f"policy.sampling.call.{key}: is not for this model{nearest(key, list(known))}")
        estimated = block.sampling.estimator != "trajectory"
        most = block.sampling.num_scored if estimated else self._denoiser.most_steps(block.sampling)
        self.max_steps: Mapping[str, int] = {SEGMENT: most}
        self._inputs = TextInputs(tokenizer, self._end_id)  # rows of a batch are equally long, so nothing is padded
        self._suppressed = suppressed_ids(model, tokenizer, [self._end_id])
        self.module: Any = model
        self._reference = make_trained(model, block, with_reference=with_reference)
        self._checkpointing = block.memory.gradient_checkpointing
        self._active: Any = model

    @classmethod
    def load(
        cls, block: PolicyBlock, *, evaluation: MaskedTextSampling, with_reference: bool, device: torch.device
    ) -> "MaskedTextPolicy":
        """Load a model and its tokenizer from a folder or the hub; see `load_model` about its repository's code."""
        model, tokenizer = load_model(block)
        return cls(model.to(device), tokenizer, block, evaluation=evaluation, with_reference=with_reference)

    def check(self, prompt: Prompt) -> None:
        """See `unified_rl.protocols.ChecksPrompts`."""
        self._inputs.prepare(prompt, self._settings[False])

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Fill in a text for each prompt; a step's log-prob is the sum over the tokens that it keeps, or the
        estimator's mean over one mask (not computed for evaluation, where nothing reads it)."""
        settings = self._settings[evaluation]
        if any(prompt.images for prompt in prompts):
            raise RecipeError("data: the prompts have pictures, which masked_text policies do not take")
        drawn = self._draw(prompts, settings)
        if settings.estimator == "trajectory" or evaluation:
            segment = self._segment([(row, row.states) for row in drawn], settings)
            for number, row in enumerate(drawn):
                segment.rollout_log_probs[number, : len(row.log_probs)] = torch.tensor(row.log_probs)
        else:
            masked = [(row, self._masked(prompt, row, settings)) for prompt, row in zip(prompts, drawn, strict=True)]
            segment = self._segment(masked, settings)
            with torch.no_grad():
                log_probs = self.log_prob(SEGMENT, segment, slice(None)).log_probs.cpu()
            segment = replace(segment, rollout_log_probs=log_probs)
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments={SEGMENT: segment},
            completions=[self._completion(row.sequence[row.prompt : row.end]) for row in drawn],
            policy_version=self.version,
        )

    def _draw(self, prompts: Sequence[Prompt], settings: MaskedTextSampling) -> list["_Drawn"]:
        ids = [inputs["input_ids"][0] for inputs in self._inputs.prepare_all(prompts, settings)]
        drawn: dict[int, _Drawn] = {}
        # Blocks lie at multiples of their length, so that padding would move them: only rows of one length go together.
        for length in sorted({len(row) for row in ids}):
            rows = [row for row, prompt in enumerate(ids) if len(prompt) == length]
            limit = length + settings.max_new_tokens
            tape = BlockTape([prompts[row].seed for row in rows], self._chain(settings), limit)
            batch = torch.stack([ids[row] for row in rows]).to(self._device)
            with torch.no_grad():
                sequences = self._denoiser.run(self._active, batch, settings, tape).cpu()
            for row, sequence, states, log_probs in zip(rows, sequences, tape.states, tape.log_probs, strict=True):
                ended = (sequence[length:limit] == self._end_id).nonzero().flatten()
                end = length + int(ended[0]) + 1 if len(ended) else limit
                # A row whose text has ended may still be given blocks, which belong to nobody.
                num = sum(state.start < end for state in states)
                drawn[row] = _Drawn(
                    sequence=sequence, prompt=length, end=end, states=states[:num], log_probs=log_probs[:num]
                )
        return [drawn[row] for row in range(len(ids))]

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Score recorded steps, one call of the model each."""
        assert name == SEGMENT, f"a text denoiser has no segment {name!r}"
        settings = self._settings[False]
        columns = []
        for step in range(*steps.indices(segment.rollout_log_probs.shape[1])):
            columns.append(self._score(segment, step, settings))
        return StepStats(log_probs=torch.stack(columns, dim=1), entropy=None, mean=None, std=None)

    def _score(self, segment: Segment, step: int, settings: MaskedTextSampling) -> Tensor:
        """[B] log-probs of one step; 0 for rows that have none."""
        rows: Any = segment.actions["states"]
        sequences: Any = segment.actions["sequences"]
        limits: Any = segment.actions["limits"]
        # Every call of the model is made, also where no row has such a step: the trainer counts on it.
        states = [row[min(step, len(row) - 1)] for row in rows]
        with recomputing(self._active) if self._checkpointing and torch.is_grad_enabled() else nullcontext():
            logits = self._denoiser.logits(self._active, sequences, states, limits)
        length = max(len(state.before) for state in states)
        logits = logits[:, :length]
        drawn = _padded([state.drawn for state in states]).to(logits.device)
        places = _padded([state.scored for state in states]).to(logits.device)
        chosen = torch.where(places, drawn, self._end_id)  # elsewhere there may be a mask, which is never drawn
        known = score(logits, chosen, self._chain(settings), settings.temperature, entropy="none")[0]
        scored = unmask.Committed(total=known.masked_fill(~places, 0.0).sum(1), count=places.sum(1))
        log_probs = scored.total if settings.estimator == "trajectory" else scored.mean
        present = torch.tensor([step < len(row) for row in rows], device=logits.device)
        return log_probs.masked_fill(~present, 0.0)

    def _segment(self, rows: Sequence[tuple["_Drawn", list[State]]], settings: MaskedTextSampling) -> Segment:
        """Of the states that each row is scored in; log-probs are still 0."""
        # As wide on every process; an exam, which nobody scores, may be longer.
        width = max(self.max_steps[SEGMENT], *(len(states) for _, states in rows))
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, (_, states) in enumerate(rows):
            mask[number, : len(states)] = torch.stack([state.scored.any() for state in states])
        return Segment(
            actions={
                "sequences": [row.sequence for row, _ in rows],
                "limits": [row.prompt + settings.max_new_tokens for row, _ in rows],
                "states": [states for _, states in rows],
            },
            rollout_log_probs=torch.zeros(mask.shape),
            loss_mask=mask,
            turn_ids=torch.zeros(mask.shape, dtype=torch.int64),
        )

    def _masked(self, prompt: Prompt, row: "_Drawn", settings: MaskedTextSampling) -> list[State]:
        """A finished text made unknown again in parts, a state each."""
        own = torch.Generator().manual_seed((prompt.seed * 2 + 2) % (1 << 63))
        low, high = settings.mask_ratio
        states = []
        for _ in range(settings.num_masks):
            start, stop = self._denoiser.span(row.prompt, row.end, settings, own)
            tokens, num = row.sequence[start:stop], min(row.end, stop) - start
            if settings.estimator == "random_mask":
                masks = unmask.random_masks(1, num, low=low, high=high, generator=own)
            elif num > 1:
                masks = unmask.coupled_masks(1, num, low=low, high=high, generator=own)
            else:  # one token has no complement
                masks = torch.tensor([[True], [False]])
            for mask in masks:
                scored = torch.nn.functional.pad(mask, (0, len(tokens) - num))
                before = self._denoiser.corrupted(tokens, scored, own)
                states.append(State(start=start, before=before, drawn=tokens, scored=scored, signal=None))
        return states

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The adapter switched off, or the frozen copy in the model's place."""
        with reference_of(self.module, self._reference, self._block.adapter) as self._active:
            try:
                yield
            finally:
                self._active = self.module

    def probes(self) -> list[Probe]:
        """Low precision."""
        return float32_probes([self.module])

    def save(self, directory: Path) -> None:
        """Full fine-tuning: model and tokenizer; LoRA: peft's adapter files and the tokenizer."""
        self.module.save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)

    def restore(self, directory: Path) -> None:
        """Load what `save` wrote."""
        restore_model(self.module, directory, adapted=self._block.adapter.kind == "lora")

    def _completion(self, tokens: Tensor) -> Completion:
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return Completion(text=text.strip(), images=(), truncated=int(tokens[-1]) != self._end_id)

    def _chain(self, settings: MaskedTextSampling) -> LogitsProcessorList:
        return processors(settings, self._suppressed, self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._active.parameters()).device


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)


def _denoiser_of(model: Any, tokenizer: Any, end_id: int, settings: MaskedTextSampling) -> BlockDenoiser:
    if isinstance(model, DiffusionGemmaForBlockDiffusion):
        return CanvasBlocks(model, end_id)
    mask_id = settings.call.get("mask_token_id", tokenizer.mask_token_id)
    if mask_id is None:
        raise RecipeError("policy.sampling.call.mask_token_id: is needed, as the model's tokenizer names no mask")
    return MaskedBlocks(model, int(mask_id), end_id)


def _end_id(tokenizer: Any) -> int:
    """An encoder's tokenizer ends texts with a separator."""
    given = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if given is None:
        raise RecipeError("policy.model: its tokenizer names no end token")
    return int(given)

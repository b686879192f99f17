"""Any transformers text or image-text-to-text generator as a policy: its logits processors are the policy head.

Sampling is the model's own `generate`; each token is drawn from the processed distribution with the row's own random
numbers, and its log-prob recorded. Scoring is teacher-forced over the same left-padded layout, with inputs continued
and prepared by the model's own methods, as `generate` does it, under the same processors. In both, a group's prompt is
computed once where the model's cache allows it.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unified_rl.errors import RecipeError
from unified_rl.policies.attention import load_with_attention
from unified_rl.policies.categorical_head import CategoricalHead, processors, score
from unified_rl.policies.frozen_tower import find_towers, remember
from unified_rl.policies.generators import loader_of
from unified_rl.policies.hidden_states import catching, of_completions
from unified_rl.policies.lora import make_trained, reference_of, restore_model
from unified_rl.policies.memo import Memo
from unified_rl.policies.probing import float32_probes, prefill_probe, switched_off
from unified_rl.policies.savings import recomputing
from unified_rl.policies.sharded import is_sharded, with_stand_ins
from unified_rl.policies.shared_prefill import SharedPrefill, can_share_prefill
from unified_rl.policies.teacher_forcing import can_share, plain_logits, shared_logits
from unified_rl.policies.text_inputs import Inputs, TextInputs, distinct, kinds, recorded_tokens, told_tokens
from unified_rl.policies.without_videos import load_processor
from unified_rl.policies.words import Words
from unified_rl.protocols import Probe
from unified_rl.recipe.policy import PolicyBlock, TextSampling
from unified_rl.types import Completion, Prompt, Recorded, Segment, StepStates, StepStats, Trajectory

SEGMENT = "text"


class CausalLMPolicy:
    """A transformers model with `generate`. See `unified_rl.protocols.Policy`."""

    steps_per_forward: Mapping[str, int | None] = {SEGMENT: None}

    def __init__(
        self,
        model: Any,
        processor: Any,
        block: PolicyBlock,
        *,
        evaluation: TextSampling | None = None,
        with_reference: bool = False,
        entropy_gradient: bool = False,
    ) -> None:
        """Take over a model, already on its device and in its dtype.

        Args:
            processor: the model's processor, or its tokenizer for a text-only model.
            evaluation: sampling settings of evaluation; None: those of `block.sampling`.
            with_reference: keep what `reference()` needs (full fine-tuning: a frozen copy).
            entropy_gradient: let gradients flow through `StepStats.entropy`, for an entropy bonus.

        Raises:
            RecipeError: if the adapter or train patterns match nothing.
        """
        assert isinstance(block.sampling, TextSampling)
        self.version = 0
        self.rollout = 0
        self.max_steps: Mapping[str, int] = {SEGMENT: block.sampling.max_new_tokens}
        self._processor = processor
        is_tokenizer = isinstance(processor, PreTrainedTokenizerBase)
        self._tokenizer: PreTrainedTokenizerBase = processor if is_tokenizer else processor.tokenizer
        self._block = block
        self._settings = {False: block.sampling, True: evaluation or block.sampling}
        self._entropy_gradient = entropy_gradient
        self._shipped_generation_config = model.generation_config
        for key in ("end_tokens", "special_tokens"):
            if evaluation is not None and getattr(evaluation, key) != getattr(block.sampling, key):
                raise RecipeError(f"evaluation.sampling.{key}: must be as under policy.sampling; leave it out")
        self._words = Words(model, self._tokenizer, block.sampling)
        pad_id = self._tokenizer.pad_token_id
        self._inputs = TextInputs(processor, pad_id if pad_id is not None else self._words.ends[0])
        # generate() fills what a call leaves open from the model's own generation config (repetition penalties,
        # top-k...): those would change the distribution behind the recipe's back.
        model.generation_config = GenerationConfig(eos_token_id=self._words.ends, pad_token_id=self._inputs.pad_id)
        self.module: Any = model
        self._reference = make_trained(model, block, with_reference=with_reference)
        self._checkpointing = block.memory.gradient_checkpointing
        memo = Memo()
        for each in (model, *([] if self._reference is None else [self._reference])):
            remember(each, memo)  # a frozen copy's tower has the same weights
        self._active: Any = model
        self._in_reference = self._watched = False
        self.shares_prefill = can_share_prefill(model)
        """Whether a group's prompt is computed once. False gives the plain path: slower, the same numbers."""

    @classmethod
    def load(
        cls,
        block: PolicyBlock,
        *,
        evaluation: TextSampling,
        with_reference: bool,
        entropy_gradient: bool,
        device: torch.device,
    ) -> "CausalLMPolicy":
        """Load a model and its processor from a folder or the hub; never runs remote code.

        Raises:
            RecipeError: if it is no decoder that transformers generates with.
        """
        config = AutoConfig.from_pretrained(block.model, revision=block.revision)
        load = functools.partial(
            loader_of(config).from_pretrained, block.model, revision=block.revision, dtype=getattr(torch, block.dtype)
        )
        model = load_with_attention(load, block.attention)
        return cls(
            model.to(device),
            load_processor(block.model, block.revision),
            block,
            evaluation=evaluation,
            with_reference=with_reference,
            entropy_gradient=entropy_gradient,
        )

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Generate for the batch; the log-probs are those of the processed distribution.

        Rows of the same prompt are prefilled once where the model's cache allows it (`shares_prefill`); the result is
        the same, to rounding, as generating each row on its own.
        """
        settings = self._settings[evaluation]
        inputs = self._inputs.prepare_all(prompts, settings)
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        uniforms = torch.stack(
            [torch.rand(settings.max_new_tokens, generator=g, dtype=torch.float64) for g in generators]
        )
        generate = self._generate_shared if self.shares_prefill else self._generate_plain
        tokens = torch.full(uniforms.shape, self._inputs.pad_id)
        log_probs = torch.zeros(uniforms.shape)
        every = with_stand_ins(self._active, inputs)
        draws = torch.cat([uniforms, uniforms[:1].expand(len(every) - len(inputs), -1)])
        for kind in kinds(every):
            drawn, drawn_log_probs = generate([every[row] for row in kind], draws[kind], settings)
            if kind[0] < len(inputs):  # else it was drawn for another process's sake
                tokens[kind, : drawn.shape[1]], log_probs[kind, : drawn.shape[1]] = drawn, drawn_log_probs
        lengths = self._words.lengths(tokens)
        rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        known = [row[:length] for row, length in zip(log_probs, lengths, strict=True)]
        return self._trajectory(prompts, inputs, rows, known)

    def check(self, prompt: Prompt) -> None:
        """See `unified_rl.protocols.ChecksPrompts`."""
        self._inputs.prepare(prompt, self._settings[False])

    def record(self, prompts: Sequence[Prompt], recorded: Sequence[Recorded]) -> Trajectory:
        """Recorded texts as trajectories.

        Raises:
            RecipeError: if a text is longer than max_new_tokens.
        """
        rows = [recorded_tokens(each, self._tokenizer, self._words.ends[0]) for each in recorded]
        longest, limit = max(len(row) for row in rows), self.max_steps[SEGMENT]
        if longest > limit:
            raise RecipeError(f"data.rollouts: a text has {longest} tokens, policy.sampling.max_new_tokens is {limit}")
        known = [
            torch.zeros(len(row)) if each.log_probs is None else torch.tensor(each.log_probs, dtype=torch.float32)
            for row, each in zip(rows, recorded, strict=True)
        ]
        return self._trajectory(prompts, self._inputs.prepare_all(prompts, self._settings[False]), rows, known)

    def told(self, trajectory: Trajectory) -> list[Recorded]:
        """The tokens of texts and their log-probs: the inverse of `record`."""
        return told_tokens(trajectory.segments[SEGMENT], trajectory.completions)

    def _trajectory(
        self, prompts: Sequence[Prompt], inputs: list[Inputs], rows: list[Tensor], log_probs: list[Tensor]
    ) -> Trajectory:
        """Of tokens and their log-probs, row by row."""
        lengths = torch.tensor([len(row) for row in rows])
        segment = Segment(
            actions={"inputs": inputs, "tokens": rows},
            rollout_log_probs=pad_sequence(log_probs, batch_first=True),
            loss_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            turn_ids=torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64),
            context_tokens=torch.tensor([row["input_ids"].shape[1] for row in inputs]),
        )
        texts = [self._words.text(row) for row in rows]
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments={SEGMENT: segment},
            completions=[
                Completion(
                    text=text.strip(),
                    images=(),
                    tokens=tuple(row.tolist()),
                    truncated=int(row[-1]) not in self._words.ends,
                )
                for text, row in zip(texts, rows, strict=True)
            ],
            policy_version=self.version,
        )

    def _generate_shared(self, rows: list[Inputs], uniforms: Tensor, settings: TextSampling) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs [N, S] of rows of one kind, each distinct prompt prefilled once."""
        unique, owner = distinct(rows)
        decode = SharedPrefill(self._chain(settings), uniforms, owner, self._words.ends, self._inputs.pad_id)
        config = GenerationConfig(do_sample=False, max_new_tokens=settings.max_new_tokens)
        with torch.no_grad():
            self._active.generate(
                **self._inputs.collate(unique, self._device), generation_config=config, custom_generate=decode
            )
        return decode.tokens, decode.log_probs

    def _generate_plain(self, rows: list[Inputs], uniforms: Tensor, settings: TextSampling) -> tuple[Tensor, Tensor]:
        """The same by the model's own decoding loop, with every row prefilled."""
        batch = self._inputs.collate(rows, self._device)
        head = CategoricalHead(uniforms)
        with torch.no_grad():
            sequences = self._active.generate(
                **batch,
                generation_config=GenerationConfig(do_sample=False, max_new_tokens=settings.max_new_tokens),
                logits_processor=LogitsProcessorList([*self._chain(settings), head]),
                synced_gpus=is_sharded(self._active),
            )
        return sequences[:, batch["input_ids"].shape[1] :].cpu(), torch.stack(head.log_probs, dim=1).cpu()

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Teacher-forced log-probs [B, s] of the recorded tokens; logits are computed for completions only.

        The entropy is left out inside `reference()`, where nothing uses it.
        """
        assert name == SEGMENT, f"a language model has no segment {name!r}"
        num_steps = segment.rollout_log_probs.shape[1]
        start, stop, _ = steps.indices(num_steps)
        inputs: list[Inputs] = segment.actions["inputs"]  # type: ignore[assignment]
        tokens: list[Tensor] = segment.actions["tokens"]  # type: ignore[assignment]
        every = with_stand_ins(self._active, inputs)
        groups = kinds(every)
        parts = [
            self._score([every[row] for row in kind], [tokens[row % len(tokens)] for row in kind], num_steps)
            for kind in groups
        ]
        order = torch.tensor([row for kind in groups for row in kind]).argsort().to(self._device)
        log_probs, entropies, states = (
            None if column[0] is None else torch.cat(column)[order][: len(inputs), start:stop]
            for column in zip(*parts, strict=True)
        )
        assert log_probs is not None
        return StepStats(
            log_probs=log_probs,
            entropy=entropies,
            mean=None,
            std=None,
            states=None if states is None else StepStates(state=states, level=None),
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside it, `log_prob` also tells the states of its steps: the model's last hidden states."""
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def states(self, name: str, segment: Segment, steps: slice, *, trunk: nn.Module | None = None) -> StepStates:
        """The last hidden state [B, s, H] in which each step was drawn, of the model or of a `trunk` in its place."""
        active, self._active = self._active, self._active if trunk is None else trunk
        try:
            with self.watched():
                states = self.log_prob(name, segment, steps).states
        finally:
            self._active = active
        assert states is not None
        return states

    def trunk(self) -> nn.Module:
        """A copy of the model as it is now, trained where the model is."""
        trunk = copy.deepcopy(self.module)
        for tower in find_towers(trunk):
            tower.__dict__.pop("forward", None)  # the memo's, which runs the original tower
        remember(trunk, Memo())
        return trunk

    def _score(
        self, rows: list[Inputs], completions: list[Tensor], num_steps: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs, entropy and, if watched, states [B, num_steps, ...] of rows of one kind, 0 beyond completions."""
        length = max(len(row) for row in completions)
        tokens = torch.stack([pad(row, (0, length - len(row)), value=self._inputs.pad_id) for row in completions])
        tokens = tokens.to(self._device)
        lengths = torch.tensor([len(row) for row in completions], device=self._device)
        masked = torch.arange(length, device=self._device) >= lengths[:, None]
        settings = self._settings[False]
        with recomputing(self._active) if self._checkpointing and torch.is_grad_enabled() else nullcontext():
            logits, states = self._completion_logits(rows, tokens)
        log_probs, entropy = score(
            logits,
            tokens,
            self._chain(settings),
            settings.temperature,
            entropy=self._entropy_mode,
        )
        fill = (0, num_steps - length)
        entropy = entropy if entropy is None else pad(entropy.masked_fill(masked, 0.0), fill)
        states = states if states is None else pad(states, (0, 0, *fill))
        return pad(log_probs.masked_fill(masked, 0.0), fill), entropy, states

    @property
    def _entropy_mode(self) -> str:
        return "none" if self._in_reference else ("gradient" if self._entropy_gradient else "value")

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The adapter switched off, or the frozen copy in the model's place."""
        with reference_of(self.module, self._reference, self._block.adapter) as self._active:
            self._in_reference = True
            try:
                yield
            finally:
                self._active, self._in_reference = self.module, False

    def save(self, directory: Path) -> None:
        """Full fine-tuning: model and processor; LoRA: peft's adapter files and the processor."""
        model: Any = self.module
        neutral, model.generation_config = model.generation_config, self._shipped_generation_config
        try:
            model.save_pretrained(directory)
        finally:
            model.generation_config = neutral
        self._processor.save_pretrained(directory)

    def restore(self, directory: Path) -> None:
        """Load what `save` wrote."""
        restore_model(self.module, directory, adapted=self._block.adapter.kind == "lora")

    def probes(self) -> list[Probe]:
        """Low precision, and prompts that are computed once for a group."""
        found = float32_probes([self.module])
        if self.shares_prefill:
            found.append(prefill_probe(functools.partial(switched_off, self, "shares_prefill")))
        return found

    def _completion_logits(self, rows: list[Inputs], tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, S, V] logits that predicted `tokens` [B, S], in the model's dtype, and if watched [B, S, H] the hidden
        states behind them."""
        unique, owner = distinct(rows)
        shared = self.shares_prefill and len(unique) < len(rows) and can_share(self._active)
        shared = shared and not is_sharded(self._active)  # there all processes must call the model equally often
        with catching(self._active, self._watched) as caught:
            if shared:
                batch = self._inputs.collate(unique, self._device)
                logits = shared_logits(self._active, batch, unique, owner, tokens)
            else:
                logits = plain_logits(self._active, self._inputs.collate(rows, self._device), rows, tokens)
        states = of_completions(caught, owner if shared else None, tokens.shape[1]) if caught else None
        return logits, states

    def _chain(self, settings: TextSampling) -> LogitsProcessorList:
        return processors(settings, self._words.suppressed, self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._active.parameters()).device

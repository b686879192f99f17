"""Any transformers text or image-text-to-text generator as a policy: its logits processors are the policy head.

Sampling is the model's own `generate`; the last logits processor draws each token from the processed distribution with
the row's own random numbers and records its log-prob. Scoring is one teacher-forced forward over the same left-padded
layout, with inputs prepared by the model's own `prepare_inputs_for_generation`, under the same processors.
"""

import copy
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unified_rl.errors import RecipeError
from unified_rl.policies.lora import lora_config, select_trained
from unified_rl.recipe import PolicyBlock, TextSampling
from unified_rl.transitions import categorical
from unified_rl.types import Completion, Prompt, Segment, StepStats, Trajectory

SEGMENT = "text"
VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|image_encoder)\.")


class CategoricalHead(LogitsProcessor):
    """Draws from the scores that reach it by inverting the distribution function, and records the log-prob.

    It leaves only the drawn token's score finite, so that greedy decoding takes it.
    """

    def __init__(self, uniforms: Tensor) -> None:
        self._uniforms = uniforms
        """[B, S] float64 in [0, 1): one number a row and step."""
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.log_probs)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        threshold = self._uniforms[:, step, None].to(scores.device) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[-1] - 1)
        self.log_probs.append(categorical.log_probs(scores[:, None], tokens)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0.0)


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
        self.max_steps: Mapping[str, int] = {SEGMENT: block.sampling.max_new_tokens}
        self._processor = processor
        is_tokenizer = isinstance(processor, PreTrainedTokenizerBase)
        self._tokenizer: PreTrainedTokenizerBase = processor if is_tokenizer else processor.tokenizer
        self._block = block
        self._settings = {False: block.sampling, True: evaluation or block.sampling}
        self._entropy_gradient = entropy_gradient
        self._shipped_generation_config = model.generation_config
        self._end_ids = _end_ids(model.generation_config, self._tokenizer)
        pad_id = self._tokenizer.pad_token_id
        self._pad_id = pad_id if pad_id is not None else self._end_ids[0]
        self._suppressed = _suppressed_ids(model, self._tokenizer, self._end_ids)
        # generate() fills what a call leaves open from the model's own generation config (repetition penalties,
        # top-k...): those would change the distribution behind the recipe's back.
        model.generation_config = GenerationConfig(eos_token_id=self._end_ids, pad_token_id=self._pad_id)
        model.requires_grad_(False).eval()
        self.module: Any = model
        self._reference: nn.Module | None = None
        if block.adapter.kind == "lora":
            model.add_adapter(lora_config(model, block.adapter, exclude=VISION))
        else:
            if with_reference:
                self._reference = copy.deepcopy(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(block.train is not None or VISION.search(name) is None)
        select_trained(model, block.train)
        self._active: Any = model

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
        """Load a model and its processor from a folder or the hub; never runs remote code."""
        config = AutoConfig.from_pretrained(block.model, revision=block.revision)
        multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        loader: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        attention = {} if block.attention is None else {"attn_implementation": block.attention}
        model = loader.from_pretrained(
            block.model, revision=block.revision, dtype=getattr(torch, block.dtype), **attention
        )
        processor = AutoProcessor.from_pretrained(block.model, revision=block.revision)
        return cls(
            model.to(device),
            processor,
            block,
            evaluation=evaluation,
            with_reference=with_reference,
            entropy_gradient=entropy_gradient,
        )

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Generate once for the batch; the log-probs are those of the processed distribution."""
        settings = self._settings[evaluation]
        inputs = self._prepare_all(prompts, settings)
        batch = self._collate(inputs)
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        uniforms = [torch.rand(settings.max_new_tokens, generator=g, dtype=torch.float64) for g in generators]
        head = CategoricalHead(torch.stack(uniforms))
        with torch.no_grad():
            sequences = self._active.generate(
                **batch,
                generation_config=GenerationConfig(do_sample=False, max_new_tokens=settings.max_new_tokens),
                logits_processor=LogitsProcessorList([*self._processors(settings), head]),
            )
        tokens = sequences[:, batch["input_ids"].shape[1] :].cpu()
        lengths = self._lengths(tokens)
        mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
        segment = Segment(
            actions={"inputs": inputs, "tokens": [row[:n] for row, n in zip(tokens, lengths, strict=True)]},
            rollout_log_probs=torch.stack(head.log_probs, dim=1).cpu().masked_fill(~mask, 0.0),
            loss_mask=mask,
            turn_ids=torch.zeros(mask.shape, dtype=torch.int64),
        )
        texts = [str(self._tokenizer.decode(row, skip_special_tokens=True)) for row in segment.actions["tokens"]]
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments={SEGMENT: segment},
            completions=[Completion(text=text.strip(), images=()) for text in texts],
            policy_version=self.version,
        )

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Teacher-forced log-probs [B, s] of the recorded tokens; logits are computed for completions only."""
        assert name == SEGMENT, f"a language model has no segment {name!r}"
        num_steps = segment.rollout_log_probs.shape[1]
        start, stop, _ = steps.indices(num_steps)
        rows: list[Tensor] = segment.actions["tokens"]  # type: ignore[assignment]
        length = max(len(row) for row in rows)
        tokens = torch.stack([pad(row, (0, length - len(row)), value=self._pad_id) for row in rows])
        mask = torch.stack([pad(torch.ones_like(row), (0, length - len(row))) for row in rows])
        batch = self._collate(segment.actions["inputs"])  # type: ignore[arg-type]
        tokens, mask = tokens.to(batch["input_ids"].device), mask.to(batch["input_ids"].device)
        logits = self._completion_logits(batch, tokens, mask)
        logits = self._processed(logits, tokens)
        log_probs = categorical.log_probs(logits, tokens).masked_fill(mask == 0, 0.0)
        entropy = categorical.entropy(logits if self._entropy_gradient else logits.detach())
        fill = (0, num_steps - length)
        return StepStats(
            log_probs=pad(log_probs, fill)[:, start:stop],
            entropy=pad(entropy.masked_fill(mask == 0, 0.0), fill)[:, start:stop],
            mean=None,
            std=None,
        )

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The adapter switched off, or the frozen copy in the model's place."""
        if self._block.adapter.kind == "lora":
            self.module.disable_adapters()
            try:
                yield
            finally:
                self.module.enable_adapters()
            return
        if self._reference is None:
            raise RuntimeError("this policy was built without a reference")
        self._active = self._reference
        try:
            yield
        finally:
            self._active = self.module

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
        model: Any = self.module
        if self._block.adapter.kind == "lora":
            set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"))
            return
        saved = type(model).from_pretrained(directory, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _completion_logits(self, batch: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, S, V] float32 logits that predicted `tokens` [B, S]."""
        model, num_steps = self._active, tokens.shape[1]
        input_ids = torch.cat([batch["input_ids"], tokens], dim=1)
        extra = {key: value for key, value in batch.items() if key != "input_ids"}
        extra["attention_mask"] = torch.cat([batch["attention_mask"], mask.to(batch["attention_mask"])], dim=1)
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in extra:
                extra[key] = pad(extra[key], (0, num_steps))
        accepted = inspect.signature(model.forward).parameters
        if "position_ids" in accepted:
            extra["position_ids"] = model._prepare_position_ids_for_generation(
                input_ids, {"input_ids": input_ids, **extra}
            )
        keep = {}
        if "logits_to_keep" in accepted:
            keep = {"logits_to_keep": num_steps + 1}
        prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, use_cache=False, **extra)
        logits = model(**prepared, **keep, return_dict=True).logits
        return logits[:, -(num_steps + 1) : -1].float()

    def _processors(self, settings: TextSampling) -> list[LogitsProcessor]:
        device = next(self._active.parameters()).device
        processors: list[LogitsProcessor] = [SuppressTokensLogitsProcessor(self._suppressed, device=device)]
        if settings.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k is not None:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1.0:
            processors.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            processors.append(MinPLogitsWarper(settings.min_p))
        return processors

    def _processed(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """The behaviour policy's distribution [B, S, V] from the model's logits."""
        settings = self._settings[False]
        flat = logits.flatten(0, 1)
        for processor in self._processors(settings):
            flat = processor(tokens.flatten()[:, None], flat)
        # At the edge of top-k, top-p or min-p, rounding may drop a token that was drawn; it stays a candidate.
        chosen = tokens.flatten()[:, None]
        dropped = flat.gather(-1, chosen).isneginf()
        if dropped.any():
            raw = logits.flatten(0, 1).gather(-1, chosen) / settings.temperature
            flat = flat.scatter(-1, chosen, torch.where(dropped, raw, flat.gather(-1, chosen)))
        return flat.view_as(logits)

    def _lengths(self, tokens: Tensor) -> list[int]:
        """Decisions of each row: up to and including its first end token."""
        ended = torch.isin(tokens, torch.tensor(self._end_ids))
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        return first.tolist()

    def _prepare_all(self, prompts: Sequence[Prompt], settings: TextSampling) -> list[dict[str, Tensor]]:
        """Processed inputs per row; a group's rows share one."""
        seen: dict[tuple, dict[str, Tensor]] = {}
        rows = []
        for prompt in prompts:
            key = (prompt.group_id, str(prompt.text), tuple(id(image) for image in prompt.images))
            if key not in seen:
                seen[key] = self._prepare(prompt, settings)
            rows.append(seen[key])
        return rows

    def _prepare(self, prompt: Prompt, settings: TextSampling) -> dict[str, Tensor]:
        text, templated = self._render(prompt, settings)
        images = {"images": [list(prompt.images)]} if prompt.images else {}
        inputs = self._processor(text=[text], **images, return_tensors="pt", add_special_tokens=not templated)
        length = inputs["input_ids"].shape[1]
        if settings.max_prompt_tokens is not None and length > settings.max_prompt_tokens:
            raise RecipeError(
                f"policy.sampling.max_prompt_tokens: a prompt has {length} tokens ({text[:60]!r}...); raise the limit "
                "or drop the row (prompts are never cut)"
            )
        return dict(inputs)

    def _render(self, prompt: Prompt, settings: TextSampling) -> tuple[str, bool]:
        """The prompt as one string, and whether a chat template (which brings its special tokens) made it."""
        if not settings.chat_template or not self._processor.chat_template:
            if not isinstance(prompt.text, str):
                raise RecipeError("policy.sampling.chat_template: chat messages need a model with a chat template")
            return prompt.text, False
        messages = prompt.text
        if isinstance(messages, str):
            pictures = [{"type": "image"} for _ in prompt.images]
            content: Any = [*pictures, {"type": "text", "text": messages}] if pictures else messages
            if not pictures and self._processor is not self._tokenizer:
                content = [{"type": "text", "text": messages}]
            messages = [{"role": "user", "content": content}]
        return self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), True

    def _collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join processed rows: token columns are padded on the left, everything else is joined along dimension 0."""
        keys = set(rows[0])
        if any(set(row) != keys for row in rows):
            raise RecipeError("data: rows with and without images in one batch are not supported by this policy")
        longest = max(row["input_ids"].shape[1] for row in rows)
        fills = {"input_ids": self._pad_id}
        device = next(self._active.parameters()).device
        batch = {}
        for key in rows[0]:
            parts = [row[key] for row in rows]
            if parts[0].shape == rows[0]["input_ids"].shape:
                parts = [pad(part, (longest - part.shape[1], 0), value=fills.get(key, 0)) for part in parts]
            else:
                parts = _padded(parts)
            batch[key] = torch.cat(parts).to(device)
        return batch


def _padded(parts: list[Tensor]) -> list[Tensor]:
    """Zero-pad dimensions after the first to the largest size (pictures that a processor marks as padding by zeros)."""
    target = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if all(list(part.shape[1:]) == target for part in parts):
        return parts
    grown = []
    for part in parts:
        widths = [(0, want - size) for want, size in zip(target, part.shape[1:], strict=True)]
        grown.append(pad(part, functools.reduce(lambda right, left: (*left, *right), widths, ())))
    return grown


def _end_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    given = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if given is None:
        raise RecipeError("policy.model: neither its generation config nor its tokenizer names an end token")
    return [int(given)] if isinstance(given, int) else [int(token) for token in given]


def _suppressed_ids(model: Any, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> list[int]:
    """Tokens that are never sampled: special and image tokens (a sampled image token breaks the next forward), and ids
    beyond the tokenizer's vocabulary that padding of the embedding created."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    named = model.config.to_dict()
    special |= {value for key, value in named.items() if re.search(r"(image|video|vision).*token_(id|index)$", key)}
    vocabulary = model.get_output_embeddings().weight.shape[0]
    beyond = range(len(tokenizer), vocabulary)
    return sorted((special | set(beyond)) - set(end_ids) - {None})

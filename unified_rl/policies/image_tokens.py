"""A transformers model that draws with tokens (Janus, Emu3, Chameleon) as a policy, optionally after thinking in words.

A picture's tokens are drawn from the guided distribution of the model's image head and scored under the same one (see
`guided_tokens`); the model's own VQ decoder makes pixels of them. With `think`, the model first writes a text (segment
`text`, by the machinery of language models), then draws from the prompt and that text (segment `image`): one trajectory
with one reward, as in T2I-R1 (Jiang et al. 2025, arXiv 2505.00703), whose objective settings may differ by segment.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import RecipeError
from unified_rl.imports import load_import
from unified_rl.policies import guided_tokens
from unified_rl.policies.categorical_head import processors
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.guided_tokens import Drawing, Row
from unified_rl.policies.image_families import DRAWN, ImageFamily, PipelineFamily, family_of
from unified_rl.policies.lora import select_trained
from unified_rl.policies.probing import UNGUIDED, UNGUIDED_REMEDY
from unified_rl.policies.text_inputs import rewritten
from unified_rl.protocols import Probe
from unified_rl.recipe.policy import ImageTokenSampling, PolicyBlock, TextSampling
from unified_rl.types import Completion, Prompt, Segment, StepStates, StepStats, Trajectory

TEXT, IMAGE = "text", "image"
THINK = "policy.sampling.think"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mode:
    """How pictures are drawn: in training, or in evaluation, whose settings may name another size or decoder."""

    settings: ImageTokenSampling
    family: ImageFamily
    decode: Callable[[Tensor], Sequence[Any]] | None
    """In place of the family's own decoder."""
    where: str
    """The recipe's key of the settings."""


class ImageTokensPolicy(CausalLMPolicy):
    """A model that draws, and that may think first. See `unified_rl.protocols.Policy`."""

    decodes = True
    """Whether its tokens become pictures here."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        block: PolicyBlock,
        *,
        evaluation: ImageTokenSampling | None = None,
        with_reference: bool = False,
        entropy_gradient: bool = False,
    ) -> None:
        """See `CausalLMPolicy`.

        Raises:
            RecipeError: also if transformers cannot draw with this model.
        """
        assert isinstance(block.sampling, ImageTokenSampling)
        training = self._mode_of(model, processor, block.sampling, "policy.sampling")
        exam = None if evaluation is None else self._mode_of(model, processor, evaluation, "evaluation.sampling")
        self._modes = {False: training, True: exam or training}
        texts = {key: mode.settings.think or TextSampling() for key, mode in self._modes.items()}
        super().__init__(
            model,
            processor,
            block.model_copy(update={"sampling": texts[False]}),
            evaluation=texts[True],
            with_reference=with_reference,
            entropy_gradient=entropy_gradient,
        )
        family = training.family
        self._words.suppressed = sorted({*self._words.suppressed, *family.vocabulary})
        thinks = block.sampling.think is not None
        needs_words = thinks or len(family.vocabulary) > 0  # a loss reaches the language model's head
        for name, parameter in model.named_parameters():
            if name.startswith(family.unused) or (name.startswith("lm_head.") and not needs_words):
                parameter.requires_grad_(False)
        select_trained(model, None)  # something must be left
        texts_first = {TEXT: self.max_steps[TEXT]} if thinks else {}
        self.max_steps = {**texts_first, IMAGE: family.layout.count(DRAWN)}
        self.steps_per_forward: Mapping[str, int | None] = dict.fromkeys(self.max_steps)

    def _mode_of(self, model: Any, processor: Any, settings: ImageTokenSampling, where: str) -> _Mode:
        """
        Raises:
            RecipeError: if the decoder cannot be imported, transformers cannot draw with this model, or nothing makes
                pictures of its tokens.
        """
        decode = None if settings.decoder is None else load_import(settings.decoder, f"{where}.decoder")
        family, kind = family_of(model, processor, settings), model.config.model_type
        by_pipeline = isinstance(family, PipelineFamily)
        if not self.decodes and not by_pipeline:
            raise RecipeError(f"policy.writer: {kind} makes its pictures itself; train it as policy.model")
        if self.decodes and decode is None and not family.decodes:
            where_else = ", or let its pipeline do that (policy.writer)" if by_pipeline else ""
            raise RecipeError(
                f"{where}.decoder: transformers has no decoder of {kind}'s tokens; name a function of yours that makes"
                f" pictures of them{where_else}"
            )
        return _Mode(settings=settings, family=family, decode=decode, where=where)

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Think, if the recipe says so, and draw; each prompt's part is computed once for its group."""
        mode = self._modes[evaluation]
        segments: dict[str, Segment] = {}
        texts: list[str | None] = [None] * len(prompts)
        cut = [False] * len(prompts)
        drawn_from = list(prompts)
        if mode.settings.think is not None:
            think = mode.settings.think
            asked = [rewritten(prompt, think.instruction, THINK) for prompt in prompts]
            thought = super().sample(asked, evaluation=evaluation)
            segments[TEXT] = thought.segments[TEXT]
            texts = [completion.text for completion in thought.completions]
            cut = [completion.truncated for completion in thought.completions]
            drawn_from = [
                rewritten(prompt, think.draw, THINK, text=text) for prompt, text in zip(prompts, texts, strict=True)
            ]
        segment, images = self._draw(drawn_from, mode)
        segments[IMAGE] = segment
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments=segments,
            completions=[
                Completion(text=text, images=image, truncated=truncated)
                for text, image, truncated in zip(texts, images, cut, strict=True)
            ],
            policy_version=self.version,
        )

    def check(self, prompt: Prompt) -> None:
        """See `unified_rl.protocols.ChecksPrompts`; what is drawn after a thought is not known beforehand."""
        mode = self._modes[False]
        if mode.settings.think is None:
            self._row(prompt, mode)
        else:
            super().check(rewritten(prompt, mode.settings.think.instruction, THINK))

    def _draw(self, prompts: Sequence[Prompt], mode: _Mode) -> tuple[Segment, list[tuple[Any, ...]]]:
        """The image segment, and each prompt's picture, if pictures are made here."""
        drawing = self._drawing(mode)
        rows = [self._row(prompt, mode) for prompt in prompts]
        # Other streams than the texts', which begin at the same seeds.
        generators = [torch.Generator().manual_seed((prompt.seed * 2 + 1) % (1 << 63)) for prompt in prompts]
        uniforms = torch.stack([torch.rand(drawing.num_tokens, generator=g, dtype=torch.float64) for g in generators])
        codes, log_probs = guided_tokens.sample(self._active, drawing, rows, uniforms)
        images = self._pictures(codes.to(self._device), mode)
        segment = Segment(
            actions={"rows": rows, "codes": codes},
            rollout_log_probs=log_probs,
            loss_mask=torch.ones(codes.shape, dtype=torch.bool),
            turn_ids=torch.zeros(codes.shape, dtype=torch.int64),
        )
        return segment, images

    def _pictures(self, codes: Tensor, mode: _Mode) -> list[tuple[Any, ...]]:
        if not self.decodes:
            return [()] * len(codes)
        shown = codes[:, -prod(mode.family.grid) :]
        with torch.no_grad():
            if mode.decode is None:
                images = mode.family.pictures(self._active, shown)
            else:
                images = list(mode.decode(shown.view(-1, *mode.family.grid)))
        if len(images) != len(codes):
            raise RecipeError(f"{mode.where}.decoder: gave {len(images)} pictures for the tokens of {len(codes)}")
        return [(image,) for image in images]

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Log-probs [B, s] of the recorded tokens of either segment, teacher-forced."""
        if name == TEXT:
            return super().log_prob(name, segment, steps)
        codes: Tensor = segment.actions["codes"]  # type: ignore[assignment]
        rows: list[Row] = segment.actions["rows"]  # type: ignore[assignment]
        log_probs, entropy, states = guided_tokens.evaluate(
            self._active, self._drawing(self._modes[False]), rows, codes, entropy=self._entropy_mode
        )
        return StepStats(
            log_probs=log_probs[:, steps],
            entropy=None if entropy is None else entropy[:, steps],
            mean=None,
            std=None,
            states=StepStates(state=states[:, steps], level=None) if self._watched else None,
        )

    def probes(self) -> list[Probe]:
        """Those of language models, and guidance."""
        if self._modes[False].settings.guidance_scale == 1:
            return super().probes()
        return [*super().probes(), Probe(change=UNGUIDED, remedy=UNGUIDED_REMEDY, active=self._unguided)]

    @contextmanager
    def _unguided(self) -> Iterator[None]:
        modes = self._modes
        self._modes = {
            key: replace(mode, settings=mode.settings.model_copy(update={"guidance_scale": 1.0}))
            for key, mode in modes.items()
        }
        try:
            yield
        finally:
            self._modes = modes

    def _drawing(self, mode: _Mode) -> Drawing:
        settings = mode.settings
        return Drawing(
            family=mode.family,
            chain=processors(settings, (), self._device),
            temperature=settings.temperature,
            guidance_scale=settings.guidance_scale,
            pad_id=self._inputs.pad_id,
        )

    def _row(self, prompt: Prompt, mode: _Mode) -> Row:
        """Ids of a prompt and of what it is guided away from.

        Raises:
            RecipeError: if it holds pictures, or is too long.
        """
        if prompt.images:
            raise RecipeError("data: image-token policies draw from text; a prompt has pictures")
        settings, family = mode.settings, mode.family
        text, templated = self._inputs.render(prompt, settings)
        ids = family.prompt(text, special=not templated)
        if settings.max_prompt_tokens is not None and len(ids) > settings.max_prompt_tokens:
            raise RecipeError(
                f"{mode.where}.max_prompt_tokens: a prompt has {len(ids)} tokens ({text[:60]!r}...); raise the limit"
            )
        if settings.negative_prompt is None:
            return tuple(ids), tuple(family.unconditional(ids))
        text, templated = self._inputs.render(replace(prompt, text=settings.negative_prompt), settings)
        return tuple(ids), tuple(family.prompt(text, special=not templated))


class TokenWriter(ImageTokensPolicy):
    """Draws tokens that a pipeline makes pictures of (GLM-Image)."""

    decodes = False

    @property
    def family(self) -> PipelineFamily:
        """What is known of its tokens."""
        family = self._modes[False].family
        assert isinstance(family, PipelineFamily)
        return family

    def handed_on(self, written: Trajectory) -> list[Tensor]:
        """The value of each row for the pipeline's argument `family.argument`."""
        codes: Tensor = written.segments[IMAGE].actions["codes"]  # type: ignore[assignment]
        return list(self.family.handed_on(codes[:, -prod(self.family.grid) :]))

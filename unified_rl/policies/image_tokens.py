"""A transformers model that draws with tokens (Janus, Emu3) as a policy, optionally after thinking in words.

A picture's tokens are drawn from the guided distribution of the model's image head and scored under the same one (see
`guided_tokens`); the model's own VQ decoder makes pixels of them. With `think`, the model first writes a text (segment
`text`, by the machinery of language models), then draws from the prompt and that text (segment `image`): one trajectory
with one reward, as in T2I-R1 (Jiang et al. 2025, arXiv 2505.00703), whose objective settings may differ by segment.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unified_rl.errors import RecipeError
from unified_rl.policies import guided_tokens
from unified_rl.policies.categorical_head import processors
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.guided_tokens import Drawing, Row
from unified_rl.policies.image_families import DRAWN, family_of
from unified_rl.policies.lora import select_trained
from unified_rl.policies.probing import UNGUIDED, UNGUIDED_REMEDY
from unified_rl.policies.text_inputs import rewritten
from unified_rl.protocols import Probe
from unified_rl.recipe.policy import ImageTokenSampling, PolicyBlock, TextSampling
from unified_rl.types import Completion, Prompt, Segment, StepStates, StepStats, Trajectory

TEXT, IMAGE = "text", "image"
THINK = "policy.sampling.think"


class ImageTokensPolicy(CausalLMPolicy):
    """A model that draws, and that may think first. See `unified_rl.protocols.Policy`."""

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
        self._family = family_of(model, processor, block.sampling)
        self._drawn = {False: block.sampling, True: evaluation or block.sampling}
        texts = {key: settings.think or TextSampling() for key, settings in self._drawn.items()}
        super().__init__(
            model,
            processor,
            block.model_copy(update={"sampling": texts[False]}),
            evaluation=texts[True],
            with_reference=with_reference,
            entropy_gradient=entropy_gradient,
        )
        self._suppressed = sorted({*self._suppressed, *self._family.vocabulary})
        thinks = block.sampling.think is not None
        for name, parameter in model.named_parameters():
            if name.startswith(self._family.unused) or (name.startswith("lm_head.") and not self._needs_words(thinks)):
                parameter.requires_grad_(False)
        select_trained(model, None)  # something must be left
        texts_first = {TEXT: self.max_steps[TEXT]} if thinks else {}
        self.max_steps = {**texts_first, IMAGE: self._family.layout.count(DRAWN)}
        self.steps_per_forward: Mapping[str, int | None] = dict.fromkeys(self.max_steps)

    def _needs_words(self, thinks: bool) -> bool:
        """Whether a loss reaches the head of the language model: its texts', or its pictures' if they are words."""
        return thinks or len(self._family.vocabulary) > 0

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Think, if the recipe says so, and draw; each prompt's part is computed once for its group."""
        settings = self._drawn[evaluation]
        segments: dict[str, Segment] = {}
        texts: list[str | None] = [None] * len(prompts)
        drawn_from = list(prompts)
        if settings.think is not None:
            think = settings.think
            asked = [rewritten(prompt, think.instruction, THINK) for prompt in prompts]
            thought = super().sample(asked, evaluation=evaluation)
            segments[TEXT] = thought.segments[TEXT]
            texts = [completion.text for completion in thought.completions]
            drawn_from = [
                rewritten(prompt, think.draw, THINK, text=text) for prompt, text in zip(prompts, texts, strict=True)
            ]
        segment, images = self._draw(drawn_from, settings)
        segments[IMAGE] = segment
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments=segments,
            completions=[Completion(text=text, images=(image,)) for text, image in zip(texts, images, strict=True)],
            policy_version=self.version,
        )

    def _draw(self, prompts: Sequence[Prompt], settings: ImageTokenSampling) -> tuple[Segment, list[Any]]:
        """The image segment and the pictures of prompts."""
        drawing = self._drawing(settings)
        rows = [self._row(prompt, settings) for prompt in prompts]
        # Other streams than the texts', which begin at the same seeds.
        generators = [torch.Generator().manual_seed((prompt.seed * 2 + 1) % (1 << 63)) for prompt in prompts]
        uniforms = torch.stack([torch.rand(drawing.num_tokens, generator=g, dtype=torch.float64) for g in generators])
        codes, log_probs = guided_tokens.sample(self._active, drawing, rows, uniforms)
        with torch.no_grad():
            images = self._family.pictures(self._active, codes.to(self._device))
        segment = Segment(
            actions={"rows": rows, "codes": codes},
            rollout_log_probs=log_probs,
            loss_mask=torch.ones(codes.shape, dtype=torch.bool),
            turn_ids=torch.zeros(codes.shape, dtype=torch.int64),
        )
        return segment, images

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Log-probs [B, s] of the recorded tokens of either segment, teacher-forced."""
        if name == TEXT:
            return super().log_prob(name, segment, steps)
        codes: Tensor = segment.actions["codes"]  # type: ignore[assignment]
        rows: list[Row] = segment.actions["rows"]  # type: ignore[assignment]
        log_probs, entropy, states = guided_tokens.evaluate(
            self._active, self._drawing(self._drawn[False]), rows, codes, entropy=self._entropy_mode
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
        if self._drawn[False].guidance_scale == 1:
            return super().probes()
        return [*super().probes(), Probe(change=UNGUIDED, remedy=UNGUIDED_REMEDY, active=self._unguided)]

    @contextmanager
    def _unguided(self) -> Iterator[None]:
        drawn = self._drawn
        self._drawn = {key: each.model_copy(update={"guidance_scale": 1.0}) for key, each in drawn.items()}
        try:
            yield
        finally:
            self._drawn = drawn

    def _drawing(self, settings: ImageTokenSampling) -> Drawing:
        return Drawing(
            family=self._family,
            chain=processors(settings, (), self._device),
            temperature=settings.temperature,
            guidance_scale=settings.guidance_scale,
            pad_id=self._inputs.pad_id,
        )

    def _row(self, prompt: Prompt, settings: ImageTokenSampling) -> Row:
        """Ids of a prompt and of what it is guided away from.

        Raises:
            RecipeError: if it holds pictures, or is too long.
        """
        if prompt.images:
            raise RecipeError("data: image-token policies draw from text; a prompt has pictures")
        text, templated = self._inputs.render(prompt, settings)
        ids = self._family.prompt(text, special=not templated)
        if settings.max_prompt_tokens is not None and len(ids) > settings.max_prompt_tokens:
            raise RecipeError(
                f"policy.sampling.max_prompt_tokens: a prompt has {len(ids)} tokens ({text[:60]!r}...); raise the limit"
            )
        if settings.negative_prompt is None:
            return tuple(ids), tuple(self._family.unconditional(ids))
        text, templated = self._inputs.render(replace(prompt, text=settings.negative_prompt), settings)
        return tuple(ids), tuple(self._family.prompt(text, special=not templated))

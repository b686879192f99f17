"""A chain of two models as one policy: a language model writes a prompt, then a diffusion pipeline draws from it; or an
autoregressive model draws tokens, of which the pipeline makes the picture (GLM-Image).

One trajectory has two segments, `text` or `tokens`, then `image`, and one reward on the picture. Each is sampled,
scored and saved by the policy of its own model; what is here joins them. A model whose segment has no objective is
frozen.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.conditions import check_tokens
from unified_rl.policies.diffusion import SEGMENT as IMAGE
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.image_tokens import TokenWriter
from unified_rl.policies.text_inputs import rewritten
from unified_rl.protocols import Probe
from unified_rl.recipe.policy import DiffusionSampling, Writer
from unified_rl.types import Denoised, Prompt, Segment, StepStats, Trajectory

if TYPE_CHECKING:
    from unified_rl.recipe.schema import Recipe

WRITER, DRAWER = "writer", "drawer"
"""Folders of a checkpoint, and prefixes of parameter names."""
SEEDS = 1 << 63
KEY = "policy.writer"


class ChainPolicy:
    """A prompt writer and a pipeline. See `unified_rl.protocols.Policy`."""

    def __init__(
        self,
        writer: CausalLMPolicy,
        drawer: DiffusionPolicy,
        settings: Writer,
        *,
        trained: Sequence[str],
        referenced: Sequence[str] = (),
    ) -> None:
        """
        Args:
            settings: what the writer is asked, and what is drawn from its text.
            trained: segments with an objective, of the writer's and "image"; the model of the other one is frozen.
            referenced: segments whose policies were built with a reference.
        """
        self._written = settings.segment
        self._parts: dict[str, CausalLMPolicy | DiffusionPolicy] = {self._written: writer, IMAGE: drawer}
        self._own = {self._written: next(iter(writer.max_steps)), IMAGE: IMAGE}  # names that the parts give them
        self._writer, self._drawer, self._asked = writer, drawer, settings
        self._trained, self._referenced = tuple(trained), tuple(referenced)
        for name, part in self._parts.items():
            if name not in trained:
                part.module.requires_grad_(False)
        self.module: nn.Module = nn.ModuleDict({WRITER: writer.module, DRAWER: drawer.module})
        self.steps_per_forward: Mapping[str, int | None] = {
            name: part.steps_per_forward[self._own[name]] for name, part in self._parts.items()
        }

    @property
    def max_steps(self) -> Mapping[str, int]:
        return {name: part.max_steps[self._own[name]] for name, part in self._parts.items()}

    @property
    def version(self) -> int:
        return self._drawer.version

    @version.setter
    def version(self, number: int) -> None:
        self._writer.version = self._drawer.version = number

    @property
    def rollout(self) -> int:
        return self._drawer.rollout

    @rollout.setter
    def rollout(self, number: int) -> None:
        self._writer.rollout = self._drawer.rollout = number

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Write, and draw what was written; completions hold both."""
        asked = [rewritten(prompt, self._asked.instruction, KEY) for prompt in prompts]
        written = self._writer.sample(asked, evaluation=evaluation)
        texts = [completion.text or "" for completion in written.completions]
        stream = 1 + isinstance(self._writer, TokenWriter)
        drawn_from = [
            # Other random streams than the writer's, whose texts begin at the same seeds and tokens at the next ones.
            replace(rewritten(prompt, self._asked.drawn, KEY, text=text), seed=(prompt.seed * 2 + stream) % SEEDS)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        if isinstance(self._writer, TokenWriter):
            argument = self._writer.family.argument
            drawn_from = [
                replace(prompt, columns={**prompt.columns, argument: value})
                for prompt, value in zip(drawn_from, self._writer.handed_on(written), strict=True)
            ]
        drawn = self._drawer.sample(drawn_from, evaluation=evaluation)
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments={self._written: written.segments[self._own[self._written]], **drawn.segments},
            completions=[
                replace(picture, text=text.text, truncated=text.truncated)
                for text, picture in zip(written.completions, drawn.completions, strict=True)
            ],
            policy_version=self.version,
        )

    def check(self, prompt: Prompt) -> None:
        """See `unified_rl.protocols.ChecksPrompts`; what the pipeline is asked is not known beforehand."""
        self._writer.check(rewritten(prompt, self._asked.instruction, KEY))

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """By the policy that drew the segment."""
        return self._parts[name].log_prob(self._own[name], segment, steps)

    def num_levels(self, name: str, segment: Segment) -> int:
        """Noise levels of the pipeline's schedule."""
        assert name == IMAGE, "what is written is not noised"
        return self._drawer.num_levels(name, segment)

    def predict(self, name: str, segment: Segment, step: int, seeds: Sequence[int]) -> Denoised:
        """The pipeline's prediction for finished samples that were noised again."""
        assert name == IMAGE, "what is written is not noised"
        return self._drawer.predict(name, segment, step, seeds)

    def sample_with_grad(self, name: str, segment: Segment, *, kind: str, step: int, seeds: Sequence[int]) -> Tensor:
        """The pictures of written prompts once more, with gradients by the pipeline's weights."""
        assert name == IMAGE, "what is written has no gradient"
        return self._drawer.sample_with_grad(name, segment, kind=kind, step=step, seeds=seeds)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Both models are their frozen references, as far as their objectives asked for one."""
        if not self._referenced:
            raise RuntimeError("this policy was built without a reference")
        with ExitStack() as stack:
            for name in self._referenced:
                stack.enter_context(self._parts[name].reference())
            yield

    def probes(self) -> Sequence[Probe]:
        """Those of both models."""
        return [*self._writer.probes(), *self._drawer.probes()]

    def save(self, directory: Path) -> None:
        """Each trained model in a folder of its own, `writer` and `drawer`."""
        for name, folder in self._folders(directory):
            folder.mkdir(parents=True, exist_ok=True)
            self._parts[name].save(folder)

    def restore(self, directory: Path) -> None:
        """Load what `save` wrote."""
        for name, folder in self._folders(directory):
            self._parts[name].restore(folder)

    def _folders(self, directory: Path) -> list[tuple[str, Path]]:
        places = {self._written: WRITER, IMAGE: DRAWER}
        return [(name, directory / places[name]) for name in self._parts if name in self._trained]


def load_chain(recipe: "Recipe", *, evaluation: DiffusionSampling, device: torch.device) -> ChainPolicy:
    """Load both models of a recipe with a writer; a writer that is a component of the pipeline only once.

    Args:
        evaluation: sampling settings of evaluation of the pipeline; the writer's are those of training.

    Raises:
        RecipeError: if the writer's tokens are not for this pipeline.
    """
    settings = recipe.policy.writer
    assert settings is not None
    trained = [name for name in recipe.policy.segments if recipe.trains(name)]
    referenced = [name for name in trained if recipe.objective_for(name).needs_reference]
    entropy = [recipe.objective_for(name) for name in trained if name != IMAGE]
    block = settings.block
    sampling: Any = block.sampling
    kind = CausalLMPolicy if block.family == "causal_lm" else TokenWriter
    folder = Path(block.model).absolute()
    is_component = folder.parent == Path(recipe.policy.model).absolute()
    writer = kind.load(
        block,
        evaluation=sampling,
        with_reference=settings.segment in referenced,
        entropy_gradient=any(one.entropy_coef > 0 or one.entropy_target is not None for one in entropy),
        device=device,
    )
    if isinstance(writer, TokenWriter):
        check_tokens(recipe.policy, writer.family.argument, writer.family.pixels)
    drawer = DiffusionPolicy.load(
        recipe.policy,
        evaluation=evaluation,
        with_reference=IMAGE in referenced,
        device=device,
        seed=recipe.seed,
        without=(folder.name,) if is_component else (),
    )
    return ChainPolicy(writer, drawer, settings, trained=trained, referenced=referenced)

"""Two policies small enough to know everything about, and the parts of a run around them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unified_rl.assemble import Parts
from unified_rl.data.prompts import PromptSampler
from unified_rl.engine.local import LocalEngine
from unified_rl.health import Health
from unified_rl.memory import Memory
from unified_rl.policies.critic import add_critics
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.schema import Recipe
from unified_rl.rewards.scoring import reward_of
from unified_rl.run_folder.tracking import QuietConsole, RunFolder
from unified_rl.snapshots import Snapshots
from unified_rl.transitions import gaussian
from unified_rl.types import Completion, Prompt, Segment, StepStates, StepStats, Trajectory


class _Toy:
    """What both toys share: a start that is also the reference, and a policy version."""

    version = 0
    rollout = 0

    def __init__(self, start: Tensor) -> None:
        self.module = nn.Module()
        self.module.weight = nn.Parameter(start.clone())
        self._start = start.clone()
        self._now: Tensor = self.module.weight

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._now = self._start
        try:
            yield
        finally:
            self._now = self.module.weight

    @contextmanager
    def watched(self) -> Iterator[None]:
        yield

    def trunk(self) -> nn.Module:
        raise TypeError("a toy's states are computed by no trunk")

    def save(self, directory: Path) -> None:
        torch.save(self.module.state_dict(), directory / "toy.pt")

    def restore(self, directory: Path) -> None:
        self.module.load_state_dict(torch.load(directory / "toy.pt"))


class Bandit(_Toy):
    """S tokens, each drawn from the same softmax over V arms; a completion's text is its arms."""

    steps_per_forward: Mapping[str, int | None] = {"text": None}

    def __init__(self, logits: Sequence[float], num_steps: int = 2, sampler_bias: float = 0.0) -> None:
        """`sampler_bias`: what the sampler adds to every log-prob that it reports."""
        super().__init__(torch.tensor(logits))
        self.max_steps = {"text": num_steps}
        self._bias = sampler_bias

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        steps = self.max_steps["text"]
        with torch.no_grad():
            probabilities = self._now.softmax(0)
            draws = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
            tokens = torch.stack([probabilities.multinomial(steps, True, generator=draw) for draw in draws])
            log_probs = self._now.log_softmax(0)[tokens] + self._bias
        mask = torch.ones_like(tokens, dtype=torch.bool)
        segment = Segment(
            actions={"tokens": tokens}, rollout_log_probs=log_probs, loss_mask=mask, turn_ids=torch.zeros_like(tokens)
        )
        texts = [Completion(text=" ".join(map(str, row)), images=()) for row in tokens.tolist()]
        groups = torch.tensor([prompt.group_id for prompt in prompts])
        return Trajectory(group_ids=groups, segments={"text": segment}, completions=texts, policy_version=self.version)

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        tokens = segment.actions["tokens"]
        assert isinstance(tokens, Tensor)
        log_probs = self._now.log_softmax(0)
        entropy = -(log_probs.exp() * log_probs).sum().expand(tokens.shape)
        return StepStats(log_probs=log_probs[tokens][:, steps], entropy=entropy[:, steps], mean=None, std=None)

    def states(self, name: str, segment: Segment, steps: slice, *, trunk: nn.Module | None = None) -> StepStates:
        """Which step it is, and the share of arm 0 so far."""
        tokens = segment.actions["tokens"]
        assert isinstance(tokens, Tensor)
        num_rows, num_steps = tokens.shape
        zeros = (tokens == 0).float()
        place = torch.eye(num_steps).expand(num_rows, -1, -1)
        state = torch.cat([place, (zeros.cumsum(1) - zeros)[..., None] / num_steps], dim=2)
        return StepStates(state=state[:, steps], level=None)


class Walker(_Toy):
    """S Gaussian steps of D dims, each from the last state plus one trained drift; a completion's text is its end."""

    steps_per_forward: Mapping[str, int | None] = {"image": 1}

    def __init__(self, drift: Sequence[float], num_steps: int = 3, std: float = 0.5) -> None:
        super().__init__(torch.tensor(drift))
        self.max_steps = {"image": num_steps}
        self._std = torch.tensor(std)

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        draws = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        states = [torch.zeros(len(prompts), len(self._start))]
        log_probs = []
        with torch.no_grad():
            for _ in range(self.max_steps["image"]):
                noise = torch.stack([torch.randn(len(self._start), generator=draw) for draw in draws])
                mean = states[-1] + self._now
                states.append(mean + self._std * noise)
                log_probs.append(gaussian.log_prob(states[-1], mean, self._std).mean_over_dims)
        matrix = torch.stack(log_probs, dim=1)
        segment = Segment(
            actions={"states": torch.stack(states, dim=1)},
            rollout_log_probs=matrix,
            loss_mask=torch.ones_like(matrix, dtype=torch.bool),
            turn_ids=torch.zeros(matrix.shape, dtype=torch.int64),
        )
        texts = [Completion(text=str(float(end.mean())), images=()) for end in states[-1]]
        groups = torch.tensor([prompt.group_id for prompt in prompts])
        return Trajectory(group_ids=groups, segments={"image": segment}, completions=texts, policy_version=self.version)

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        states = segment.actions["states"]
        assert isinstance(states, Tensor)
        at, reached = states[:, :-1][:, steps], states[:, 1:][:, steps]
        means = at + self._now
        columns = [
            gaussian.log_prob(reached[:, step], means[:, step], self._std).mean_over_dims
            for step in range(means.shape[1])
        ]
        std = self._std.reshape(1, 1, 1).expand(1, means.shape[1], 1)
        return StepStats(log_probs=torch.stack(columns, dim=1), entropy=None, mean=means, std=std)

    def states(self, name: str, segment: Segment, steps: slice, *, trunk: nn.Module | None = None) -> StepStates:
        """Where it is, and how much of the walk is left."""
        states = segment.actions["states"]
        assert isinstance(states, Tensor)
        num_rows, num_steps = len(states), states.shape[1] - 1
        level = 1.0 - torch.arange(num_steps).expand(num_rows, -1) / num_steps
        return StepStates(state=states[:, :-1][:, steps], level=level[:, steps])


def zeros_chosen(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """Share of the tokens that are arm 0."""
    return [text.split().count("0") / len(text.split()) for text in completions]


def walked(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """Where the walk ended."""
    return [float(text) for text in completions]


def build_parts(folder: Path, policy: Any, family: str | None = None, **changes: Any) -> Parts:
    """A run of a toy: `changes` are keys of the recipe, `family` what the recipe takes the toy for."""
    walks = isinstance(policy, Walker)
    raw: dict[str, Any] = {
        "policy": {"model": "toy", "family": family or ("diffusion" if walks else "causal_lm")},
        "data": {"prompts": "toy:prompts"},
        "rewards": [{"name": "toy:reward"}],
        "num_steps": 4,
        "group_size": 8,
        "prompts_per_step": 2,
        "optimizer": {"lr": 0.05},
        "engine": {"micro_batch": 8},
        "checkpoint": {"every": 1000},
        **changes,
    }
    recipe = parse_recipe(raw, folder)
    rows = [{"prompt": name} for name in "abc"]
    policy = with_critics(policy, recipe)
    sampler = PromptSampler(
        rows, seed=recipe.seed, group_size=recipe.group_size, prompts_per_step=recipe.prompts_per_step
    )
    engine = LocalEngine(policy.module, recipe.optimizer, num_steps=recipe.num_steps)
    return Parts(
        recipe=recipe,
        policy=policy,
        engine=engine,
        snapshots=Snapshots(engine, recipe.all_snapshots),
        rewards=[reward_of(walked if walks else zeros_chosen, name="reward")],
        sampler=sampler,
        exam=[],
        run=RunFolder(folder / "run"),
        console=QuietConsole(),
        memory=Memory(recipe),
        health=Health(recipe),
    )


def with_critics(policy: Any, recipe: Recipe) -> Any:
    """The toy as `assemble` would give it to the trainer."""
    if any(objective.advantage == "gae" for objective in recipe.objective.values()):
        return add_critics(policy, recipe, [Prompt(text="a", images=(), columns={}, group_id=0, seed=0)])
    return policy


def again(parts: Parts, folder: Path, policy: Any) -> Parts:
    """The same run in the same folder with a fresh policy, engine and memory, as after a crash."""
    parts.run.close()
    policy = with_critics(policy, parts.recipe)
    engine = LocalEngine(policy.module, parts.recipe.optimizer, num_steps=parts.recipe.num_steps)
    return replace(
        parts,
        policy=policy,
        engine=engine,
        snapshots=Snapshots(engine, parts.recipe.all_snapshots),
        run=RunFolder(folder / "run"),
        memory=Memory(parts.recipe),
        health=Health(parts.recipe),
    )

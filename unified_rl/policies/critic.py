"""A policy with a value function beside it: PPO's critic, for any policy that can show the states of its steps.

The critic's parameters are trained by the same engine, in one module with the policy's, so that sharding, gradient
clipping and checkpoints hold for both.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unified_rl.errors import RecipeError
from unified_rl.protocols import Policy, Probe, ProbedPolicy, WatchedPolicy
from unified_rl.recipe.critic import Critic
from unified_rl.recipe.schema import Recipe
from unified_rl.types import Prompt, Segment, StepStates, StepStats, Trajectory

CRITIC_FILE = "critic.safetensors"
"""Beside the policy's own files in a checkpoint."""


class VectorValue(nn.Module):
    """The value of states that are vectors [B, s, H]: of tokens' hidden states, normalised, or of latents without axes
    and their noise level. Two layers."""

    def __init__(self, num_features: int, width: int, *, with_level: bool) -> None:
        super().__init__()
        self.norm = nn.Identity() if with_level else nn.LayerNorm(num_features)
        self.hidden = nn.Linear(num_features + with_level, width)
        self.out = _zero_linear(width)

    def forward(self, states: StepStates) -> Tensor:
        """[B, s] in units of the reward."""
        features = self.norm(states.state.float())
        if states.level is not None:
            features = torch.cat([features, states.level.to(features)[..., None]], dim=-1)
        return self.out(nn.functional.silu(self.hidden(features)))[..., 0]


class FieldValue(nn.Module):
    """The value of latents [B, s, C, ...] with 1 to 3 axes of space and time, at their noise levels: two strided
    convolutions, pooled to a coarse grid, which any resolution fits."""

    GRID = {1: 8, 2: 4, 3: 2}
    """Cells along each axis, by the number of axes."""

    def __init__(self, num_channels: int, num_axes: int, width: int) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[num_axes]
        pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[num_axes]
        cells = self.GRID[num_axes] ** num_axes
        self.layers = nn.Sequential(
            convolution(num_channels + 1, width, 3, stride=2, padding=1),
            nn.SiLU(),
            convolution(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            pool(self.GRID[num_axes]),
            nn.Flatten(1),
        )
        self.hidden = nn.Linear(width * cells, width)
        self.out = _zero_linear(width)

    def forward(self, states: StepStates) -> Tensor:
        """[B, s] in units of the reward."""
        state, level = states.state.float(), states.level
        assert level is not None, "latents come with their noise levels"
        flat = state.flatten(0, 1)
        levels = level.to(flat).flatten().view(-1, *[1] * (flat.ndim - 1)).expand(-1, 1, *flat.shape[2:])
        hidden = nn.functional.silu(self.hidden(self.layers(torch.cat([flat, levels], dim=1))))
        return self.out(hidden)[..., 0].view(state.shape[:2])


def _zero_linear(width: int) -> nn.Linear:
    """A last layer that begins with the value 0: returns of the first rollout are then plain rewards."""
    layer = nn.Linear(width, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def value_network(states: StepStates, width: int) -> nn.Module:
    """A value function for states of this shape.

    Raises:
        RecipeError: if there is none for it.
    """
    shape = states.state.shape[2:]
    if len(shape) == 1:
        return VectorValue(shape[0], width, with_level=states.level is not None)
    if states.level is not None and 2 <= len(shape) <= 4:
        return FieldValue(shape[0], len(shape) - 1, width)
    raise RecipeError(f"objective.advantage: gae has no critic for states of shape {tuple(shape)}; use group_std")


def add_critics(policy: Policy, recipe: Recipe, prompts: Sequence[Prompt]) -> "CriticPolicy":
    """The policy with a critic for each segment whose advantages want one.

    Args:
        prompts: one or more, that are sampled for the shapes of the states.

    Raises:
        RecipeError: if the policy cannot show its states, or they have no value network.
    """
    if not isinstance(policy, WatchedPolicy):
        raise RecipeError(
            "objective.advantage: gae needs states of steps, which this policy cannot show; use group_std"
        )
    examples = policy.sample(prompts).segments
    wanted = {name: recipe.objective_for(name) for name in examples if recipe.trains(name)}
    critics = {name: objective.critic for name, objective in wanted.items() if objective.advantage == "gae"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return CriticPolicy(policy, critics, examples)


class CriticPolicy:
    """A policy and its critics, one for each segment that has one. See `unified_rl.protocols.Policy`."""

    def __init__(self, policy: WatchedPolicy, critics: Mapping[str, Critic], examples: Mapping[str, Segment]) -> None:
        """
        Args:
            policy: shows the states of its steps.
            critics: settings, by segment.
            examples: a segment of each of them, for the shapes of states.

        Raises:
            RecipeError: if a segment's states have no value network.
        """
        self._policy, self._settings = policy, critics
        self._in_reference = False
        self._values = nn.ModuleDict()
        self._trunks = nn.ModuleDict()
        for name, settings in critics.items():
            with torch.no_grad():
                states = policy.states(name, examples[name], slice(None))
            self._values[name] = value_network(states, settings.width).to(states.state.device)
            if settings.network == "separate" and states.level is None:
                self._trunks[name] = policy.trunk()
        parts = {"policy": policy.module, "critics": self._values, "trunks": self._trunks}
        self.module: nn.Module = nn.ModuleDict(parts)
        self.steps_per_forward, self.max_steps = policy.steps_per_forward, policy.max_steps

    @property
    def version(self) -> int:
        """Number of optimiser steps taken."""
        return self._policy.version

    @version.setter
    def version(self, number: int) -> None:
        self._policy.version = number

    @property
    def rollout(self) -> int:
        """Number of the rollout that is drawn."""
        return self._policy.rollout

    @rollout.setter
    def rollout(self, number: int) -> None:
        self._policy.rollout = number

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """As the policy alone."""
        return self._policy.sample(prompts, evaluation=evaluation)

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """As the policy alone, with the critic's values."""
        if self._in_reference or name not in self._settings:
            return self._policy.log_prob(name, segment, steps)
        with self._policy.watched():
            stats = self._policy.log_prob(name, segment, steps)
        if stats.states is None or name in self._trunks:
            return replace(stats, values=self.values(name, segment, steps), states=None)
        return replace(stats, values=self._value(name, stats.states), states=None)

    def values(self, name: str, segment: Segment, steps: slice) -> Tensor:
        """[B, s] values of the states in which the steps were drawn (with gradients if they are enabled)."""
        trunk = self._trunks[name] if name in self._trunks else None  # noqa: SIM401 (a ModuleDict has no get)
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and (trunk is not None or self._settings[name].trunk_gradient)
        ):
            states = self._policy.states(name, segment, steps, trunk=trunk)
        return self._value(name, states)

    def _value(self, name: str, states: StepStates) -> Tensor:
        settings = self._settings[name]
        if name not in self._trunks and not settings.trunk_gradient:
            states = replace(states, state=states.state.detach())
        return self._values[name](states)

    def probes(self) -> Sequence[Probe]:
        """As the policy alone."""
        return self._policy.probes() if isinstance(self._policy, ProbedPolicy) else []

    @contextmanager
    def reference(self) -> Iterator[None]:
        """As the policy alone; nothing asks a reference for values."""
        self._in_reference = True
        try:
            with self._policy.reference():
                yield
        finally:
            self._in_reference = False

    def save(self, directory: Path) -> None:
        """The policy in its own format, and the critic's trained parameters in a file of its own."""
        self._policy.save(directory)
        trained = {name: value.detach().contiguous() for name, value in self._critic_parameters().items()}
        save_file(trained, directory / CRITIC_FILE)

    def restore(self, directory: Path) -> None:
        """Load what `save` wrote."""
        self._policy.restore(directory)
        saved = load_file(directory / CRITIC_FILE)
        with torch.no_grad():
            for name, parameter in self._critic_parameters().items():
                parameter.copy_(saved[name])

    def _critic_parameters(self) -> dict[str, nn.Parameter]:
        owned = {"critics": self._values, "trunks": self._trunks}
        return {
            f"{part}.{name}": parameter
            for part, module in owned.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

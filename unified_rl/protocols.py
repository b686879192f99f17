"""The contracts between the trainer and its parts. Everything above a policy sees only these."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from unified_rl.types import Denoised, Prompt, Recorded, Segment, StepStates, StepStats, Trajectory


class Policy(Protocol):
    """A generator whose stochastic steps can be drawn and evaluated again.

    The replay contract: `log_prob` of a stored trajectory, with the weights that sampled it, equals its
    `rollout_log_probs`.
    """

    module: nn.Module
    """What the engine trains; parameters with `requires_grad` are the trained ones."""
    steps_per_forward: Mapping[str, int | None]
    """Per segment, the most steps that one forward evaluates; None: all."""
    version: int
    """Number of optimiser steps taken; the trainer counts it."""
    rollout: int
    """Number of the rollout that is drawn, from 0; the trainer counts it. Settings that change over a training (where
    the noise of a sampling loop goes) are functions of it."""

    @property
    def max_steps(self) -> Mapping[str, int]:
        """Per segment, the most steps that a trajectory can have."""
        ...

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Draw one trajectory per prompt, each from its own seed, without gradients. `evaluation` uses the
        evaluation's sampling settings in place of the behaviour policy's."""
        ...

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Evaluate the recorded decisions of one segment at `steps` (with gradients if they are enabled)."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside it, the policy is the frozen reference (the adapter switched off, or a frozen copy).

        Raises:
            RuntimeError: if the policy was built without a reference.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write what was trained in the ecosystem's own format (`save_pretrained`)."""
        ...

    def restore(self, directory: Path) -> None:
        """Load what `save` wrote into the trained module."""
        ...


@runtime_checkable
class DenoisingPolicy(Policy, Protocol):
    """A policy that can also be trained on its finished samples, noised again."""

    def num_levels(self, name: str, segment: Segment) -> int:
        """Noise levels of the schedule that drew a segment: the steps that `predict` can be asked for."""
        ...

    def predict(self, name: str, segment: Segment, step: int, seeds: Sequence[int]) -> Denoised:
        """The prediction for the segment's B finished samples, noised to the level of `step` with the noise of B seeds
        (with gradients if they are enabled)."""
        ...


@runtime_checkable
class WatchedPolicy(Policy, Protocol):
    """A policy that can show the states of its steps, for a critic."""

    def states(self, name: str, segment: Segment, steps: slice, *, trunk: nn.Module | None = None) -> StepStates:
        """The states in which steps were drawn; where the policy's own weights compute them, with gradients if they are
        enabled, and by those of `trunk` if it is given."""
        ...

    def watched(self) -> AbstractContextManager[None]:
        """Inside it, `log_prob` also tells `StepStats.states` where that costs no second forward."""
        ...

    def trunk(self) -> nn.Module:
        """A trained copy of what computes the states."""
        ...


@runtime_checkable
class ValuedPolicy(Policy, Protocol):
    """A policy with a critic: `log_prob` tells `StepStats.values`."""

    def values(self, name: str, segment: Segment, steps: slice) -> Tensor:
        """[B, s] values of the states in which steps were drawn, in units of the reward."""
        ...


@runtime_checkable
class EncodesAhead(Protocol):
    """A policy that may want to see all prompts before the first one is drawn."""

    def encode_ahead(self, prompts: Iterable[Prompt]) -> None: ...


@runtime_checkable
class ChecksPrompts(Protocol):
    """A policy that can tell beforehand which prompts it refuses."""

    def check(self, prompt: Prompt) -> None:
        """
        Raises:
            RecipeError: if sampling would refuse the prompt (too long, its text and pictures do not fit together).
        """
        ...


@runtime_checkable
class RecordingPolicy(Policy, Protocol):
    """A policy that can take over what was recorded elsewhere."""

    def record(self, prompts: Sequence[Prompt], recorded: Sequence[Recorded]) -> Trajectory:
        """Trajectories that end in the recorded completions; log-probs are 0 where they are unknown."""
        ...


@runtime_checkable
class TellsTokens(Policy, Protocol):
    """A policy whose samples are tokens, which it can tell."""

    def told(self, trajectory: Trajectory) -> list[Recorded]:
        """What `RecordingPolicy.record` makes the same trajectory of."""
        ...


@runtime_checkable
class DifferentiablePolicy(Policy, Protocol):
    """A policy whose pictures can be differentiated by its weights."""

    def num_levels(self, name: str, segment: Segment) -> int:
        """Steps of the schedule that drew a segment."""
        ...

    def sample_with_grad(self, name: str, segment: Segment, *, kind: str, step: int, seeds: Sequence[int]) -> Tensor:
        """The segment's B pictures once more, [B, 3, H, W] in [0, 1], with gradients of the steps from `step` on.

        Args:
            kind: as in `reward_gradient.kind` of a recipe.
            seeds: of fresh noise, where the kind needs it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A change of how a policy computes that may take a replay gap away, and so tells its cause."""

    change: str
    """As it ends the sentence "the gap is so large ...", for instance "in float32"."""
    remedy: str
    """What a user does if it helps."""
    active: Callable[[], AbstractContextManager[None]]
    """Inside it, both `sample` and `log_prob` compute with the change."""


@runtime_checkable
class ProbedPolicy(Policy, Protocol):
    """A policy that knows what may set its replay apart from its rollout."""

    def probes(self) -> Sequence[Probe]:
        """The changes that can be made to it as it stands; only tried when a run is about to stop."""
        ...


class Reward(Protocol):
    """TRL's convention: one score per completion; None or NaN excludes the sample."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Sequence[float | None]: ...


class Engine(Protocol):
    """Owns the optimiser, gradient accumulation and sharding of one module."""

    rank: int
    world_size: int
    module: nn.Module

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        ...

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """Bytes that this rank has sent to others for training since the start, by collective; none alone."""
        ...

    def window(self) -> AbstractContextManager[None]:
        """Surrounds the forward and backward of one window."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this window. Gradients of windows and ranks are *summed*: the caller's loss already
        carries the global denominator."""
        ...

    def discard(self) -> None:
        """Drop the gradients of the windows since the last step, one of which may have failed; not where gradients are
        sharded (ZeRO 2 and 3)."""
        ...

    def step(self) -> float:
        """Clip, update and zero the gradients; returns the global gradient norm before clipping. A non-finite norm
        skips the update on every rank."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its part of the parameters."""
        ...

    def shards(self) -> dict[str, Tensor]:
        """By name, where this rank holds the trained parameters (all of them, or its part), to be read or written in
        place between windows; `shards_changed` follows a write, on every rank."""
        ...

    def shards_changed(self) -> None:
        """Make whatever was gathered from the shards follow them; called by every rank."""
        ...

    def full_weights(self) -> AbstractContextManager[None]:
        """Inside it, rank 0 sees whole weights also where they are sharded; called by every rank."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes that `save` writes, about, on all ranks together."""
        ...

    def save(self, directory: Path) -> None:
        """Write optimiser, scheduler and module state; called by every rank, whose files are complete when all have
        returned."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote; called by every rank."""
        ...


class Console(Protocol):
    """Where a run shows what it does."""

    def log(self, message: str) -> None: ...
    def metrics(self, row: Mapping[str, float]) -> None: ...
    def track(self, items: Iterable[Any], description: str, total: int) -> Iterable[Any]: ...

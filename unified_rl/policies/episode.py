"""One episode of a policy in an environment, while it is acted; and what happens when the environment fails."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from unified_rl.data.environments import Closes, Environment, Observation, Turn, limited
from unified_rl.errors import RecipeError
from unified_rl.imports import one_line
from unified_rl.recipe.environment import EnvironmentBlock
from unified_rl.types import Completion, Prompt

MEASURED = ("actions", "episode_return", "success", "num_turns", "failed")
"""What rewards receive of an episode by name."""
_log = logging.getLogger(__name__)


class EnvironmentFailedError(Exception):
    """An environment cannot begin an episode, or failed in too many."""


@dataclass(slots=True, kw_only=True)
class Episode:
    """One trajectory while it is acted."""

    prompt: Prompt
    environment: Environment
    timeout: float | None
    seen: Observation
    inputs: list[Any] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
    total: float = 0.0
    ended: bool = False
    success: bool = False
    failure: str = ""
    """How the environment failed on the last action, if it did."""

    def act(self, action: str) -> None:
        """Let the environment take an action. If it fails, the episode ends.

        Raises:
            RecipeError: if it gives something else than a turn.
        """
        self.actions.append(action)
        try:
            with limited(self.timeout):
                turn = self.environment.step(action)
        except Exception as error:  # the user's code
            self.failure, self.ended = _told(error), True
            return
        if not isinstance(turn, Turn) or not isinstance(turn.observation, Observation):
            kind = type(turn).__name__
            raise RecipeError(f"policy.environment.name: step must return a Turn with an Observation, not {kind}")
        self.pictures += turn.observation.images[-1:]
        self.total += float(turn.reward)
        self.seen, self.ended, self.success = turn.observation, bool(turn.ended), bool(turn.success)

    def completion(self) -> Completion:
        """What rewards may see. Of an episode in which the environment failed, there is no return and no success."""
        known = not self.failure
        return Completion(
            text="\n".join(self.actions),
            images=tuple(self.pictures),
            truncated=not self.ended,
            measured={
                "actions": self.actions,
                "episode_return": self.total if known else None,
                "success": float(self.success) if known else None,
                "num_turns": float(len(self.actions)),
                "failed": float(not known),
            },
        )


def begin(prompt: Prompt, make: Callable[[], Environment], block: EnvironmentBlock) -> Episode:
    """A fresh environment, and what it shows first.

    Raises:
        RecipeError: if it gives something else than an observation, or the task has a column that episodes fill.
        EnvironmentFailedError: if it cannot begin.
    """
    for name in MEASURED:
        if name in prompt.columns:
            raise RecipeError(f"data: the column {name} is what an episode is found to have; rename it")
    try:
        with limited(block.timeout):
            environment = make()
            seen = environment.reset({**prompt.columns, "prompt": prompt.text}, prompt.seed)
    except RecipeError:
        raise
    except Exception as error:  # the user's code
        what = f"policy.environment {block.name} cannot begin the task {str(prompt.text)[:60]!r}"
        raise EnvironmentFailedError(f"{what}: {_told(error)}") from error
    if not isinstance(seen, Observation):
        raise RecipeError(f"policy.environment.name: reset must return an Observation, not {type(seen).__name__}")
    return Episode(
        prompt=prompt, environment=environment, timeout=block.timeout, seen=seen, pictures=list(seen.images[-1:])
    )


def check_failures(episodes: Sequence[Episode], block: EnvironmentBlock) -> None:
    """Tell of episodes in which the environment failed.

    Raises:
        EnvironmentFailedError: if they are more than the recipe allows.
    """
    failed = [episode for episode in episodes if episode.failure]
    if not failed:
        return
    first = failed[0]
    where = f"on action {len(first.actions)} ({first.actions[-1]!r}) of the task {str(first.prompt.text)[:60]!r}"
    what = f"policy.environment {block.name} failed in {len(failed)} of {len(episodes)} episodes, first {where}"
    if len(failed) > block.max_failures * len(episodes):
        raise EnvironmentFailedError(f"{what}: {first.failure}; more than max_failures = {block.max_failures:g}")
    _log.warning("%s: %s; these are left out", what, first.failure)


def close(episodes: Sequence[Episode]) -> None:
    """Let environments free what they hold."""
    for episode in episodes:
        if isinstance(episode.environment, Closes):
            episode.environment.close()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"

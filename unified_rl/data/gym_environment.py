"""Environments of gymnasium, shown as pictures and acted in by words or by numbers of bins."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

from unified_rl.data.environments import Observation, Turn
from unified_rl.errors import RecipeError

WHERE = "policy.environment.arguments"


class GymEnvironment:
    """An environment that gymnasium makes from an id, with `render_mode="rgb_array"`.

    Discrete actions are written as one of `actions`, or as their number. Continuous ones (a bounded Box) are written
    as one bin number a dimension, `bins` equal bins between its bounds, whose middle is meant (RT-2, arXiv:2307.15818,
    section 3.2). A text that is no action ends the episode without success.
    """

    def __init__(
        self,
        id: str,
        *,
        actions: Sequence[str] | None = None,
        bins: int = 256,
        text: str = "{prompt}",
        make: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            id: as `gymnasium.make` takes it; `module:ID` imports the module that registers it.
            actions: words for the discrete actions, by number.
            text: what the policy is asked, of {prompt} and the texts in the environment's dictionary of observations
                (for instance {mission}).
            make: further arguments of `gymnasium.make`.

        Raises:
            RecipeError: if gymnasium has no such environment, or its actions cannot be written so.
        """
        try:
            self._environment = gymnasium.make(id, render_mode="rgb_array", **(make or {}))
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise RecipeError(f"policy.environment.name: gymnasium makes no {id}: {error}") from error
        space = self._environment.action_space
        self._num_actions, self._box = 0, None
        if isinstance(space, spaces.Discrete):
            self._num_actions = int(space.n)
            if actions is not None and len(actions) != space.n:
                raise RecipeError(f"{WHERE}.actions: {len(actions)} words for {space.n} actions of {id}")
        elif not isinstance(space, spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
            raise RecipeError(
                f"policy.environment.name: actions of {id} are {space}; only Discrete and bounded vectors are"
                " supported: write a class with reset and step around it"
            )
        elif actions is not None:
            raise RecipeError(f"{WHERE}.actions: {id} has continuous actions, written as numbers of bins")
        else:
            self._box = space
        self._words = None if actions is None else {word: number for number, word in enumerate(actions)}
        self._bins, self._text, self._prompt = bins, text, ""
        self._last: Observation | None = None

    def reset(self, task: Mapping[str, Any], seed: int) -> Observation:
        """Begin with the task's column `seed`, which decides all that the environment draws.

        Raises:
            RecipeError: if the task has none.
        """
        if "seed" not in task:
            raise RecipeError("data.prompts: gymnasium environments take where they start from a column seed; add it")
        self._prompt = task["prompt"]
        observation, _ = self._environment.reset(seed=int(task["seed"]))
        return self._seen(observation)

    def step(self, action: str) -> Turn:
        """Act. The task is done if the environment says `is_success` or `success`; where it says neither, if it
        terminates with a positive reward."""
        meant = self._meant(action)
        if meant is None:
            assert self._last is not None, "reset comes first"
            return Turn(observation=self._last, reward=0.0, ended=True)
        observation, reward, terminated, truncated, info = self._environment.step(meant)
        said = [info[key] for key in ("is_success", "success") if key in info]
        return Turn(
            observation=self._seen(observation),
            reward=float(reward),
            ended=terminated or truncated,
            success=bool(said[0]) if said else terminated and float(reward) > 0,
        )

    def close(self) -> None:
        """Free what it renders with."""
        self._environment.close()

    def _seen(self, observation: Any) -> Observation:
        told = observation if isinstance(observation, dict) else {}
        text = self._text.format(prompt=self._prompt, **{key: said for key, said in told.items() if type(said) is str})
        self._last = Observation(text=text, images=(Image.fromarray(np.asarray(self._environment.render())),))
        return self._last

    def _meant(self, action: str) -> Any:
        """The action that a text stands for; None if it is none."""
        words = action.split()
        if self._words is not None:
            return self._words.get(" ".join(words))
        if not all(word.isascii() and word.isdecimal() for word in words):
            return None
        numbers = [int(word) for word in words]
        if self._box is None:
            return numbers[0] if len(numbers) == 1 and numbers[0] < self._num_actions else None
        if len(numbers) != len(self._box.low) or max(numbers) >= self._bins:
            return None
        share = (np.array(numbers) + 0.5) / self._bins
        return (self._box.low + share * (self._box.high - self._box.low)).astype(self._box.dtype)

"""Environments that a policy acts in: the contract, and how a recipe's one is found and made."""

import functools
import importlib.util
import inspect
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from unified_rl.errors import RecipeError
from unified_rl.imports import check_import, load_import

KEY = "policy.environment.name"
GYMNASIUM = "gymnasium:"
"""How the names of gymnasium's environments begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a policy sees in one turn."""

    text: str
    """What it is asked: the task, and whatever of the past it should know."""
    images: tuple[Any, ...] = ()
    """Pictures (PIL)."""

    def __post_init__(self) -> None:
        """
        Raises:
            TypeError: if something else than pictures stands there.
        """
        for image in self.images:
            if not isinstance(image, Image.Image):
                raise TypeError(f"an observation's images are PIL pictures, not {type(image).__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What an action led to."""

    observation: Observation
    """Of the next turn; the last picture of an episode that has ended."""
    reward: float
    ended: bool
    success: bool = False
    """Whether the task is done."""


class Environment(Protocol):
    """One episode at a time. It must depend on `task`, `seed` and the actions alone, so that a run can be repeated."""

    def reset(self, task: Mapping[str, Any], seed: int) -> Observation:
        """Begin an episode.

        Args:
            task: the dataset's row, its prompt as `prompt`. A group has one task: whatever its trajectories shall
                share (where they start, for instance) comes from here.
            seed: of the trajectory, for what shall differ within a group.
        """
        ...

    def step(self, action: str) -> Turn:
        """Act.

        Args:
            action: the text that the policy wrote; what it means, and what happens if it means nothing, is the
                environment's to say.
        """
        ...


@runtime_checkable
class Closes(Protocol):
    """An environment that holds what Python does not clean up by itself (a simulator, a window)."""

    def close(self) -> None:
        """Called once, after the episode."""
        ...


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Interrupt what takes longer, where it runs Python or waits for the system. In a process's main thread.

    Raises:
        TimeoutError: inside it.
    """
    if seconds is None:
        yield
        return

    def expire(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_environment(name: str) -> None:
    """Make sure that a recipe's environment exists, without importing it.

    Args:
        name: `package.module:attr` or `file.py:attr` of a class or function, or `gymnasium:ID`.

    Raises:
        RecipeError: if it does not, with the nearest one that does.
    """
    if not name.startswith(GYMNASIUM):
        check_import(name, KEY)
    elif importlib.util.find_spec("gymnasium") is None:
        raise RecipeError(f"{KEY}: {name} needs gymnasium; pip install 'unified-rl[gymnasium]'")


def load_environment(name: str, arguments: Mapping[str, Any]) -> Callable[[], Environment]:
    """What makes an environment, from its name as in `check_environment`.

    Raises:
        RecipeError: if it cannot be imported, takes other arguments, or gymnasium cannot make it.
    """
    if name.startswith(GYMNASIUM):
        from unified_rl.data.gym_environment import GymEnvironment

        made: Any = functools.partial(GymEnvironment, name.removeprefix(GYMNASIUM))
    else:
        made = load_import(name, KEY)
    if not callable(made):
        raise RecipeError(f"{KEY}: {name} is no class or function that makes environments")
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        raise RecipeError(f"policy.environment.arguments: {name}: {error}") from error
    make = functools.partial(made, **arguments)
    if name.startswith(GYMNASIUM):
        make()  # only that tells what is wrong, and a model need not be loaded for it
    return make

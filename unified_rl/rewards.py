"""Rewards: finding them by name, calling them in TRL's convention, and checking what they return.

Finding and checking must not import torch, because `validate` and `list` answer at once; scoring does, when it runs.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from unified_rl.errors import RecipeError, nearest
from unified_rl.imports import check_import, load_import, one_line
from unified_rl.recipe import RewardBlock

if TYPE_CHECKING:
    from torch import Tensor

    from unified_rl.types import Completion, Prompt, Scores

ENTRY_POINTS = "unified_rl.rewards"
"""The entry point group in which packages list their rewards."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class RewardError(RecipeError):
    """A reward failed or returned something that is no list of scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedReward:
    """A reward that can be called."""

    name: str
    """As metrics show it."""
    weight: float
    """Weight in the total; 0: measured only."""
    function: functools.partial
    """The reward with the recipe's arguments bound."""


def list_rewards() -> dict[str, str]:
    """The rewards that installed packages offer: name -> import reference, sorted by name."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {point.name: point.value for point in sorted(points, key=lambda point: point.name)}


def check_reward(block: RewardBlock, index: int) -> None:
    """Make sure that a reward exists, without importing it.

    Args:
        block: the reward in the recipe.
        index: its place in the recipe's list, for the error's key path.

    Raises:
        RecipeError: if there is no such entry point, file, module or name, with the nearest one that exists.
    """
    where = f"rewards.{index}.name"
    check_import(_reference(block.name, where), where)


def check_rewards(blocks: Sequence[RewardBlock]) -> None:
    """`check_reward` for all of a recipe's rewards; two that metrics would show under one name are refused too.

    Raises:
        RecipeError: as in `check_reward`, or for the second of two equal names.
    """
    shown: set[str] = set()
    for index, block in enumerate(blocks):
        check_reward(block, index)
        name = _shown_name(block.name)
        if name in shown:
            raise RecipeError(f"rewards.{index}.name: another reward is shown as {name!r} already; rename its function")
        shown.add(name)


def load_rewards(blocks: Sequence[RewardBlock]) -> list[LoadedReward]:
    """Import a recipe's rewards and bind their arguments.

    Raises:
        RecipeError: as in `check_rewards`; if an import fails; if what it gives is no function of `completions`, or
            has no parameter for one of the arguments.
    """
    check_rewards(blocks)
    return [_load_reward(block, index) for index, block in enumerate(blocks)]


def score(rewards: Sequence[LoadedReward], prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
    """Let every reward judge B completions.

    Each is called as `function(prompts=..., completions=..., **columns)` with lists of length B. A completion is its
    picture (PIL), a list of them if it has several, else its text, in TRL's conversational form
    (`[{"role": "assistant", "content": text}]`) if its prompt is chat messages. Columns are those of the prompts that
    the function has parameters for, None where a row lacks one, and `images`, the lists of condition pictures, if there
    are any. Coroutine functions run at the same time, on an event loop of their own.

    Returns:
        float32 tensors on the CPU: `total` [B], the weighted sum of the rewards with weight != 0, NaN where any of
        these excludes the sample; `breakdown` [B] of every reward, NaN where it returned None, NaN or an infinite
        number.

    Raises:
        RewardError: if a reward raises (the cause is chained), misses a column, or does not return one number or None
            per completion.
    """
    import torch  # here and not above: see the module's docstring

    from unified_rl.types import Scores

    num = len(completions)
    arguments = _arguments(prompts, completions)
    returned = [_call(reward, arguments) for reward in rewards] if num else [[] for _ in rewards]
    returned = _await_all(rewards, returned)
    breakdown: dict[str, Tensor] = {}
    total = torch.zeros(num)
    for reward, scores in zip(rewards, returned, strict=True):
        values = torch.tensor(_numbers(reward.name, scores, num), dtype=torch.float32)
        breakdown[reward.name] = values.where(values.isfinite(), torch.nan)
        if reward.weight != 0:
            total = total + reward.weight * breakdown[reward.name]
    return Scores(total=total, breakdown=breakdown)


def _reference(name: str, where: str) -> str:
    """The import reference of a reward named by reference or entry point."""
    if ":" in name:
        return name
    if name.endswith(".py"):
        raise RecipeError(f"{where}: {name} is a file; add the name of its function, as in {name}:reward")
    known = list_rewards()
    if name not in known:
        raise RecipeError(f"{where}: no reward {name!r}{nearest(name, list(known))}")
    return known[name]


def _shown_name(name: str) -> str:
    return name.rpartition(":")[2]


def _load_reward(block: RewardBlock, index: int) -> LoadedReward:
    where = f"rewards.{index}.name"
    function = load_import(_reference(block.name, where), where)
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"a {type(function).__name__}"
        raise RecipeError(f"{where}: {block.name} is {kind}; name a function (or a callable object)")
    try:
        inspect.signature(function)
    except ValueError as error:
        raise RecipeError(f"{where}: {block.name} does not tell its parameters; wrap it in a function") from error
    if not _accepts(function, "completions"):
        raise RecipeError(f"{where}: {block.name} has no parameter 'completions'; see docs/rewards.md")
    for name in block.arguments:
        if name in ("prompts", "completions") or not _accepts(function, name):
            valid = [known for known in _named(function) if known not in ("prompts", "completions")]
            hint = nearest(name, valid) if valid else ""
            raise RecipeError(f"rewards.{index}.arguments.{name}: {block.name} has no such argument{hint}")
    bound = functools.partial(function, **block.arguments)
    return LoadedReward(name=_shown_name(block.name), weight=block.weight, function=bound)


def _named(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters that can be given by name."""
    parameters = inspect.signature(function).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in _POSITIONAL}


def _accepts(function: Callable, name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return name in _named(function) or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _arguments(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, list]:
    """Everything that rewards may see, as lists over the batch: prompts, completions and columns."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns: dict[str, list] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    if any(prompt.images for prompt in prompts):
        columns["images"] = [list(prompt.images) for prompt in prompts]
    seen = [_seen(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return {**columns, "prompts": [prompt.text for prompt in prompts], "completions": seen}


def _seen(prompt: Prompt, completion: Completion) -> Any:
    if completion.images:
        return completion.images[0] if len(completion.images) == 1 else list(completion.images)
    assert completion.text is not None, "a completion has a text or pictures"
    if isinstance(prompt.text, str):
        return completion.text
    return [{"role": "assistant", "content": completion.text}]


def _call(reward: LoadedReward, arguments: Mapping[str, list]) -> Any:
    """The scores that a reward returns, or the awaitable of them."""
    bound = reward.function.keywords
    given = {
        name: value for name, value in arguments.items() if name not in bound and _accepts(reward.function.func, name)
    }
    for name, parameter in _named(reward.function.func).items():
        if parameter.default is parameter.empty and name not in given and name not in bound:
            columns = ", ".join(name for name in arguments if name not in ("prompts", "completions")) or "none"
            raise RewardError(f"reward {reward.name!r} needs the column {name!r}; the data have: {columns}")
    try:
        return reward.function(**given)
    except Exception as error:  # the user's code
        raise _failed(reward, error) from error


def _await_all(rewards: Sequence[LoadedReward], returned: Sequence[Any]) -> list[Any]:
    """Run the coroutines among the results together; the other results are passed through."""
    waiting = {index: result for index, result in enumerate(returned) if inspect.isawaitable(result)}
    if not waiting:
        return list(returned)

    async def gather() -> list[Any]:
        return await asyncio.gather(*waiting.values(), return_exceptions=True)

    # In a thread, because a notebook's own event loop may be running in this one.
    with ThreadPoolExecutor(max_workers=1) as pool:
        finished = dict(zip(waiting, pool.submit(asyncio.run, gather()).result(), strict=True))
    for index, result in finished.items():
        if isinstance(result, BaseException):
            raise _failed(rewards[index], result) from result
    return [finished.get(index, result) for index, result in enumerate(returned)]


def _failed(reward: LoadedReward, error: BaseException) -> RewardError:
    return RewardError(f"reward {reward.name!r} failed: {type(error).__name__}: {one_line(error)}")


def _numbers(name: str, scores: Any, num: int) -> list[float]:
    """What a reward returned, as `num` floats; NaN for None."""
    advice = "return one (a number, or None to exclude it) per completion"
    if isinstance(scores, str | bytes | Mapping) or not _is_sequence(scores):
        raise RewardError(f"reward {name!r} returned a {type(scores).__name__}, not a list of scores; {advice}")
    if len(scores) != num:
        raise RewardError(f"reward {name!r} returned {len(scores)} scores for {num} completions; {advice}")
    return [_number(name, value, index, advice) for index, value in enumerate(scores)]


def _is_sequence(scores: Any) -> bool:
    import torch

    if isinstance(scores, torch.Tensor | np.ndarray):
        return scores.ndim > 0
    return isinstance(scores, Sequence)


def _number(name: str, value: Any, index: int, advice: str) -> float:
    import torch

    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        raise RewardError(f"reward {name!r} returned {value!r} for completion {index}; {advice}")
    try:
        return float(value)
    except OverflowError:
        return math.inf

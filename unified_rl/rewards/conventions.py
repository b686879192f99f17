"""The calling conventions of rewards, recognised by their parameters, made one.

| parameters | convention | called |
| --- | --- | --- |
| completions | TRL, ms-swift | once a batch |
| first, second | pairwise | once a group, all its pairs at once |
| solution_str or solution_image | verl, verl-omni | once a completion |
| reward_inputs; reward_input | EasyR1 batch; sequential | once a batch; once a completion |
| queries | OpenRLHF | once a batch |
| images, metadata | flow_grpo, ddpo | once a batch |
| a class with required_fields | Flow-Factory | once a batch, or once a group |

Coroutine functions are awaited. An attribute `groupwise = True` asks for one call a group; `differentiable = True` for
pictures as a float tensor [B, 3, H, W] in [0, 1] in place of PIL.
"""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unified_rl.errors import RecipeError, nearest
from unified_rl.rewards import foreign
from unified_rl.rewards.types import Judged, RewardBatch, RewardError, WrongAnswerError, numbers

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
OF_TRL = {"completions", "completion_ids"}
JUDGED = {*OF_TRL, "first", *(name for _, names, _ in foreign.CONVENTIONS for name in names)}
"""Parameters of what judges, and of nothing that makes a judge."""
TRAINERS = ("trainer_state", "environments")
"""What TRL's trainer gives besides, and no other."""
GIVEN = ("prompts", "completions", "log_metric", "log_extra")
"""Parameters of TRL's convention that no argument may take."""
Caller = Callable[[Callable, RewardBatch], Any]
"""(the user's function, a batch) to a list of scores, `Judged`, or an awaitable of one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformReward:
    """A reward of any convention."""

    function: Callable
    caller: Caller
    convention: str
    groupwise: bool
    """It must see whole groups."""
    differentiable: bool
    with_gradient: Callable | None = None
    """Gives the same scores of pictures as one tensor, with their gradients."""

    def judge(self, batch: RewardBatch) -> Judged:
        """Ask about a batch; of a groupwise reward, about each of its groups.

        Raises:
            RewardError: if the data lack a column that it needs.
            WrongAnswerError: if it returned no list of scores.
            Exception: whatever the reward raises.
        """
        if not self.groupwise:
            return self._ask(batch)
        values = [float("nan")] * len(batch)
        metrics: dict[str, float] = {}
        groups: dict[int, list[int]] = {}
        for row, group in enumerate(batch.group_ids):
            groups.setdefault(group, []).append(row)
        for rows in groups.values():
            judged = self._ask(batch.rows(rows))
            for row, value in zip(rows, judged.values, strict=True):
                values[row] = value
            for name, value in judged.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(groups)
        return Judged(values=values, metrics=metrics)

    def _ask(self, batch: RewardBatch) -> Judged:
        answer = self.caller(self.function, batch)
        if inspect.isawaitable(answer):
            answer = _wait(answer)
        return answer if isinstance(answer, Judged) else Judged(values=numbers(answer, len(batch)))


def make_reward(target: Any, arguments: Mapping[str, Any], *, shown: str, where: str, device: str) -> UniformReward:
    """Recognise what a name in a recipe refers to.

    Args:
        target: a function, a class (constructed here, with the arguments), a callable object, or a factory f(device).
        arguments: of the recipe.
        shown: how the recipe calls it.
        where: the recipe key of the reward; errors begin with it.
        device: for classes and factories with a parameter of that name.

    Raises:
        RecipeError: if it is none of the conventions, or has no parameter for one of the arguments.
    """
    if inspect.isclass(target) and "required_fields" in dir(target):
        groupwise = any(base.__name__ == "GroupwiseRewardModel" for base in target.__mro__)
        build: Callable[..., Any] = target
        instance = build(*foreign.flow_factory_start(target, arguments, device))
        return UniformReward(
            function=instance,
            caller=foreign.call_flow_factory,
            convention="Flow-Factory",
            groupwise=groupwise,
            differentiable=False,
        )
    if not callable(target):
        raise RecipeError(f"{where}.name: {shown} is a {type(target).__name__}; name a function or a class")
    if inspect.isclass(target) or _is_factory(target):
        made_by, target, arguments = target, _construct(target, arguments, shown, where, device), {}
        if not callable(target):
            if inspect.isfunction(made_by):
                raise RecipeError(f"{where}.name: {shown} has no parameter 'completions', and makes no reward either")
            raise RecipeError(f"{where}.name: objects of {shown} cannot be called; give the class a __call__")
    parameters = _parameters(target, shown, where)
    convention, caller = _recognise(parameters, shown, where)
    _check_arguments(parameters, arguments, shown, where)
    return UniformReward(
        function=functools.partial(target, **arguments),
        caller=caller,
        convention=convention,
        groupwise=convention == "pairwise" or marked(target, "groupwise"),
        differentiable=marked(target, "differentiable"),
        with_gradient=target.with_gradient if "with_gradient" in dir(target) else None,
    )


def _recognise(parameters: Mapping[str, inspect.Parameter], shown: str, where: str) -> tuple[str, Caller]:
    names = {name for name, parameter in parameters.items() if parameter.kind in _BY_NAME}
    if {"first", "second"} <= names:
        return "pairwise", call_pairwise
    for convention, needed, caller in foreign.CONVENTIONS:
        if needed <= names and not names & OF_TRL:
            return convention, caller
    if names & OF_TRL or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return "TRL", call_trl
    raise RecipeError(f"{where}.name: {shown} has no parameter 'completions'; see docs/rewards.md")


def _parameters(target: Callable, shown: str, where: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except ValueError as error:
        raise RecipeError(f"{where}.name: {shown} does not tell its parameters; wrap it in a function") from error


def _is_factory(target: Callable) -> bool:
    """flow_grpo's and ddpo's form: f(device) or f() gives the reward."""
    if not inspect.isfunction(target):
        return False
    parameters = inspect.signature(target).parameters
    needed = [name for name, each in parameters.items() if each.default is each.empty and each.kind in _BY_NAME]
    open_ended = any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in parameters.values())
    return needed == ["device"] or (not needed and not open_ended and not JUDGED & parameters.keys())


def _construct(target: Callable, arguments: Mapping[str, Any], shown: str, where: str, device: str) -> Any:
    parameters = _parameters(target, shown, where)
    _check_arguments(parameters, arguments, shown, where)
    placed = {"device": device} if "device" in parameters and "device" not in arguments else {}
    return target(**arguments, **placed)


def _check_arguments(
    parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any], shown: str, where: str
) -> None:
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    valid = [name for name, parameter in parameters.items() if parameter.kind in _BY_NAME and name not in GIVEN]
    for name in arguments:
        if name in GIVEN or (name not in valid and not open_ended):
            hint = nearest(name, valid) if valid else ""
            raise RecipeError(f"{where}.arguments.{name}: {shown} has no such argument{hint}")


def marked(target: Any, attribute: str) -> bool:
    """Whether a function or object carries a marker."""
    return bool(getattr(target, attribute, False))


def _wait(answer: Any) -> Any:
    async def result() -> Any:
        return await answer

    return _loops.runner.run(result())


class _Loops(threading.local):
    """One event loop a thread for all calls, as in TRL: clients that a reward keeps from call to call belong to it."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()


_loops = _Loops()


# --- the project's own conventions ---


def call_trl(function: Callable, batch: RewardBatch) -> Any:
    """`function(prompts=..., completions=..., **columns)`, with those columns that it has parameters for."""
    completions: Any = batch.completions()
    if marked(function.func if isinstance(function, functools.partial) else function, "differentiable"):
        completions = foreign.picture_tensor(batch.pictures)
    metrics: dict[str, list[float]] = {}
    given = {
        **batch.columns,
        "prompts": list(batch.prompts),
        "completions": completions,
    }
    logs = {
        "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
        "log_extra": lambda name, values: None,  # shown by TRL in its table of samples; there is no such table here
    }
    chosen = for_parameters(function, given, logs)
    with foreign.no_grad():
        answer = function(**chosen)
    means = functools.partial(_with_metrics, len(batch), metrics)
    return _then(answer, means) if inspect.isawaitable(answer) else means(answer)


def _with_metrics(num: int, metrics: Mapping[str, Sequence[float]], answer: Any) -> Judged:
    return Judged(
        values=numbers(answer, num), metrics={name: float(np.mean(values)) for name, values in metrics.items()}
    )


async def _then(answer: Any, finish: Callable[[Any], Judged]) -> Judged:
    return finish(await answer)


def for_parameters(function: Callable, given: Mapping[str, Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function has parameters for; `extras` only where they are named.

    Raises:
        RewardError: if a parameter without default is not among them.
    """
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    bound = function.keywords if isinstance(function, functools.partial) else {}
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind in _BY_NAME}
    chosen = {name: value for name, value in given.items() if name not in bound and (open_ended or name in named)}
    chosen |= {name: value for name, value in extras.items() if name in named and name not in given}
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in chosen and name not in bound:
            if name in TRAINERS:
                raise RewardError(f"needs TRL's {name!r}, which is not given here; give the parameter a default")
            columns = ", ".join(name for name in given if name not in GIVEN) or "none"
            raise RewardError(f"needs the column {name!r}; the data have: {columns}")
    return chosen


def call_pairwise(function: Callable, batch: RewardBatch) -> Any:
    """The mean win rate of each completion of one group against the others (Pref-GRPO, arXiv 2508.20751, eq. 4).

    `function(prompts=..., first=..., second=..., **columns)` gets every pair once, either completion being first as
    often as it goes, and returns for each pair the probability that the first is better (0.5: a tie; None leaves the
    pair out). A completion without pairs is excluded.
    """
    num = len(batch)
    pairs = [(i, j) if (i + j) % 2 else (j, i) for i in range(num) for j in range(i + 1, num)]
    if not pairs:
        return [None] * num
    completions, left = batch.completions(), [first for first, _ in pairs]
    given = {
        **{name: [values[row] for row in left] for name, values in batch.columns.items()},
        "prompts": [batch.prompts[row] for row in left],
        "first": [completions[row] for row in left],
        "second": [completions[row] for _, row in pairs],
    }

    def finish(answer: Any) -> Judged:
        wins: list[list[float]] = [[] for _ in range(num)]
        for (first, second), value in zip(pairs, numbers(answer, len(pairs)), strict=True):
            if np.isnan(value):
                continue
            if not 0.0 <= value <= 1.0:
                raise WrongAnswerError(f"returned {value!r} for a pair; return the probability that the first wins")
            wins[first].append(value)
            wins[second].append(1.0 - value)
        return Judged(values=[float(np.mean(won)) if won else float("nan") for won in wins])

    answer = function(**for_parameters(function, given, {}))
    return _then(answer, finish) if inspect.isawaitable(answer) else finish(answer)

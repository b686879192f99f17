"""Rewards: finding them by name, having them judge a rollout, and what counts in the end.

Finding and checking must not import torch, because `validate` and `list` answer at once; scoring does, when it runs.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified_rl.errors import RecipeError, nearest
from unified_rl.imports import check_import, load_import
from unified_rl.recipe.reward import Gate, RewardBlock
from unified_rl.rewards.conventions import make_reward
from unified_rl.rewards.process import ProcessReward, ThreadedReward
from unified_rl.rewards.runner import Outcome, RewardRunner, merge
from unified_rl.rewards.types import RewardBatch, RewardError, RewardFailedError

if TYPE_CHECKING:
    from unified_rl.types import Completion, Prompt, Scores

POLL_SECONDS = 0.2
TOKENS = "completion_ids"
"""TRL's name for the token ids of texts, which rewards get as a column."""
ENTRY_POINTS = "unified_rl.rewards"
"""The entry point group in which packages list their rewards."""
REMOTE = "unified_rl.rewards.remote:RemoteReward"
"""What stands behind a reward that is named by its address."""
LEARNED = "reward_models.learned:LearnedReward"
"""What stands behind a reward that is named by the folder that `train-reward` wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedReward:
    """A reward that can be asked, and how its answers count."""

    name: str
    """As metrics show it."""
    runner: RewardRunner
    weight: float = 1.0
    """Weight in the total; 0: measured only."""
    held_out: bool = False
    clip: tuple[float, float] | None = None
    normalise: str = "none"
    only_if: Gate | None = None
    max_failures: float = 0.1


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
    check_import(reference_of(block.name, where), where)
    if block.memory_mib is not None and not sys.platform.startswith("linux"):
        raise RecipeError(f"rewards.{index}.memory_mib: only Linux tells how much memory a process takes")


def check_rewards(blocks: Sequence[RewardBlock]) -> None:
    """`check_reward` for all of a recipe's rewards, and what they say of each other.

    Raises:
        RecipeError: as in `check_reward`; for the second of two that metrics would show under one name; for a gate
            that names no other reward.
    """
    names = [block.shown_name for block in blocks]
    for index, block in enumerate(blocks):
        check_reward(block, index)
        if names[index] in names[:index]:
            raise RecipeError(
                f"rewards.{index}.name: another reward is shown as {names[index]!r} already; rename its function"
            )
        if block.only_if is not None:
            where = f"rewards.{index}.only_if.reward"
            others = [name for place, name in enumerate(names) if place != index]
            if block.only_if.reward not in others:
                raise RecipeError(
                    f"{where}: no other reward {block.only_if.reward!r}{nearest(block.only_if.reward, others)}"
                )
            if blocks[names.index(block.only_if.reward)].held_out:
                raise RecipeError(f"{where}: {block.only_if.reward} is held out, so it is not asked in training")


def load_rewards(blocks: Sequence[RewardBlock], *, device: str = "cpu") -> list[LoadedReward]:
    """Start a recipe's rewards, all at once, and wait until they are ready.

    Args:
        device: for rewards that name none.

    Raises:
        RecipeError: as in `check_rewards`; if an import fails; if what it gives follows none of the conventions, or
            has no parameter for one of the arguments.
    """
    check_rewards(blocks)
    started: list[ProcessReward | ThreadedReward] = []
    try:
        for index, block in enumerate(blocks):
            started.append(_start(block, index, device))
        for reward in started:
            if isinstance(reward, ProcessReward):
                reward.start()
    except BaseException:  # also an interruption: what was started holds memory
        for reward in started:
            reward.close()
        raise
    return [
        LoadedReward(
            name=block.shown_name,
            runner=RewardRunner(reward, batch_size=block.batch_size, retries=block.retries, cache=block.cache),
            weight=block.weight,
            held_out=block.held_out,
            clip=block.clip,
            normalise=block.normalise,
            only_if=block.only_if,
            max_failures=block.max_failures,
        )
        for block, reward in zip(blocks, started, strict=True)
    ]


def close_rewards(rewards: Sequence[LoadedReward]) -> None:
    """End their processes; a call that is under way is given up."""
    for reward in rewards:
        reward.runner.close()


def reward_of(function: Callable, *, name: str, weight: float = 1.0, **arguments: Any) -> LoadedReward:
    """A reward that is at hand as a Python function (or class), inside this process.

    Args:
        arguments: bound to it, as a recipe's.
    """
    reward = make_reward(function, arguments, shown=name, where=name, device="cpu")
    return LoadedReward(name=name, weight=weight, runner=RewardRunner(ThreadedReward(reward)))


def score(
    rewards: Sequence[LoadedReward],
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    evaluation: bool = True,
) -> Scores:
    """Let every reward judge B completions; see `Scoring`."""
    scoring = Scoring(rewards, prompts, evaluation=evaluation)
    scoring.add(completions)
    return scoring.finish()


class Scoring:
    """The completions of one rollout on their way through the rewards, which work while more are sampled."""

    def __init__(self, rewards: Sequence[LoadedReward], prompts: Sequence[Prompt], *, evaluation: bool = False) -> None:
        """Args:
        prompts: of the whole rollout of this process.
        evaluation: held-out rewards are asked too.
        """
        self._rewards = [reward for reward in rewards if evaluation or not reward.held_out]
        self._prompts = prompts
        self._completions: list[Completion] = []
        self._missing = Counter(prompt.group_id for prompt in prompts)
        self._submitted: dict[str, list[tuple[list[int], Future[Outcome]]]] = {r.name: [] for r in self._rewards}

    def add(self, completions: Sequence[Completion]) -> None:
        """Hand over the completions of the next prompts. Returns at once. Rewards that see whole groups wait until a
        group is complete."""
        first = len(self._completions)
        self._completions += completions
        rows = list(range(first, len(self._completions)))
        touched = dict.fromkeys(self._prompts[row].group_id for row in rows)
        self._missing.subtract(self._prompts[row].group_id for row in rows)
        complete = {group for group in touched if self._missing[group] == 0}
        grouped = [row for row in range(len(self._completions)) if self._prompts[row].group_id in complete]
        for reward in self._rewards:
            chosen = grouped if reward.runner.groupwise else rows
            if chosen:
                self._submitted[reward.name].append((chosen, reward.runner.submit(self._batch(chosen))))

    def finish(self, meanwhile: Callable[[], None] = lambda: None) -> Scores:
        """Wait for the answers; called by all processes.

        Args:
            meanwhile: called several times a second, by all processes alike, as long as any of them waits; it may
                raise, and the answers are given up.

        Returns:
            float32 tensors on the CPU: see `Scores`.

        Raises:
            RewardError: on all processes alike, if a reward cannot judge these data.
            RewardFailedError: likewise, if one failed for more than its `max_failures`, or hangs in a thread.
        """
        from unified_rl.engine import distributed  # torch, see the module's docstring
        from unified_rl.rewards.composition import compose, shares_of

        assert len(self._completions) == len(self._prompts), "every prompt has its completion"
        waits = True
        while waits:
            with distributed.agreed("waiting for rewards"):
                waits = not self._wait(POLL_SECONDS)
            waits = distributed.broadcast_flag(waits)
            if waits:
                meanwhile()
        values, outcomes = {}, {}
        for reward in self._rewards:
            parts = [(rows, future.result()) for rows, future in self._submitted[reward.name]]
            outcomes[reward.name] = merge([outcome for _, outcome in parts])
            values[reward.name] = [float("nan")] * len(self._prompts)
            for rows, outcome in parts:
                for row, value in zip(rows, outcome.values, strict=True):
                    values[reward.name][row] = value
            outcomes[reward.name] = self._without_spoiled(outcomes[reward.name], values[reward.name])
        report = shares_of(self._rewards, outcomes)
        return compose(self._rewards, values, report)

    def _without_spoiled(self, outcome: Outcome, values: list[float]) -> Outcome:
        """Take back what a reward said of completions that are none (black, to it): they are failures."""
        spoiled = [row for row, completion in enumerate(self._completions) if completion.spoiled]
        if not spoiled:
            return outcome
        judged = sum(not math.isnan(values[row]) for row in spoiled)
        for row in spoiled:
            values[row] = math.nan
        reason = "got pictures that were decoded to NaN; policy.dtype: float32 or bfloat16, or another VAE"
        return replace(outcome, failed=outcome.failed + judged, reason=reason)

    def _wait(self, seconds: float) -> bool:
        """Wait for the answers, not longer than told; whether all are there.

        Raises:
            RewardFailedError: for a reward that hangs and cannot be killed.
        """
        futures = [future for submitted in self._submitted.values() for _, future in submitted]
        missing = concurrent.futures.wait(futures, timeout=seconds).not_done
        for reward in self._rewards:
            if reward.runner.overdue:
                limit = reward.runner.reward.timeout
                raise RewardFailedError(
                    f"reward {reward.name!r} gave no answer within {limit:g} s, and in a thread it cannot be killed; "
                    "isolation: process"
                )
        return not missing

    def _batch(self, rows: Sequence[int]) -> RewardBatch:
        """What rewards may see of some rows."""
        names = dict.fromkeys(name for prompt in self._prompts for name in prompt.columns)
        prompts = [self._prompts[row] for row in rows]
        columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        if any(prompt.images for prompt in self._prompts):
            columns["images"] = [list(prompt.images) for prompt in prompts]
        completions = [self._completions[row] for row in rows]
        if all(completion.tokens is not None for completion in completions):
            columns[TOKENS] = [list(completion.tokens or ()) for completion in completions]
        for name in dict.fromkeys(name for completion in completions for name in completion.measured):
            columns[name] = [completion.measured.get(name) for completion in completions]
        return RewardBatch(
            prompts=[prompt.text for prompt in prompts],
            texts=[completion.text for completion in completions],
            pictures=[list(completion.images) for completion in completions],
            columns=columns,
            group_ids=[prompt.group_id for prompt in prompts],
        )


def reference_of(name: str, where: str) -> str:
    """The import reference of a reward named by reference, address, folder or entry point."""
    if name.startswith(("http://", "https://")):
        return REMOTE
    if ":" in name:
        return name
    if "/" in name and not (Path(name) / "reward.json").is_file():
        raise RecipeError(f"{where}: no folder {name} that train-reward wrote")
    if "/" in name:
        return LEARNED
    if name.endswith(".py"):
        raise RecipeError(f"{where}: {name} is a file; add the name of its function, as in {name}:reward")
    known = list_rewards()
    if name not in known and (Path(name) / "reward.json").is_file():
        raise RecipeError(f"{where}: {name} is a folder; write ./{name}")
    if name not in known:
        raise RecipeError(f"{where}: no reward {name!r}{nearest(name, list(known))}")
    return known[name]


def arguments_of(block: RewardBlock, reference: str) -> Mapping[str, Any]:
    """What a reward is made with: the recipe's arguments, and the address or folder that its name is."""
    if reference in (REMOTE, LEARNED):
        return {"url" if reference == REMOTE else "folder": block.name, **block.arguments}
    return block.arguments


def _start(block: RewardBlock, index: int, device: str) -> ProcessReward | ThreadedReward:
    where = f"rewards.{index}"
    reference = reference_of(block.name, f"{where}.name")
    arguments = arguments_of(block, reference)
    if block.isolation == "process":
        return ProcessReward(
            reference,
            arguments,
            shown=block.name,
            where=where,
            device=block.device or device,
            timeout=block.timeout,
            memory_mib=block.memory_mib,
        )
    target = load_import(reference, f"{where}.name")
    reward = make_reward(target, arguments, shown=block.name, where=where, device=block.device or device)
    return ThreadedReward(reward, timeout=block.timeout)


__all__ = [
    "LoadedReward",
    "RewardError",
    "RewardFailedError",
    "Scoring",
    "check_reward",
    "check_rewards",
    "close_rewards",
    "list_rewards",
    "load_rewards",
    "reward_of",
    "score",
]

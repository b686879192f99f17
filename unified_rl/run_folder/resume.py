"""Going on from a checkpoint: which one, whether it fits this recipe, and everything as it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unified_rl.assemble import Parts
from unified_rl.engine import distributed
from unified_rl.errors import RecipeError
from unified_rl.run_folder import random_state
from unified_rl.run_folder.checkpoint import CheckpointError, find_checkpoint, load_state, set_aside_later

HARMLESS = (
    *("engine", "evaluation", "checkpoint", "guard", "trackers", "record_rollouts", "max_replay_gap"),
    "optimizer.max_skipped",
)
"""Keys that may change on resume without being named: they say how, not what, is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place between two rollouts."""

    step: int
    """Optimiser steps taken."""
    rollout: int
    """Rollouts taken; an early stop makes them more than steps / updates_per_rollout."""


def resume(parts: Parts, resume: str, allow: Sequence[str] = ()) -> Position:
    """Go on from a checkpoint or begin anew; returns where from. Nothing is evaluated or written but events, and
    checkpoints of later steps than this one are set aside.

    Args:
        resume: "auto", "never", or the folder of a checkpoint.
        allow: keys that may differ from the checkpoint's recipe.

    Raises:
        RecipeError: if there is no such checkpoint, or it is of a recipe that differs in other keys.
    """
    say = parts.console.log
    try:
        found = find_checkpoint(parts.run.path, resume, lambda message: _report(parts, message))
        position = Position(step=0, rollout=0)
        if found is not None:
            state = load_state(found)
            check_changes(changes(state["recipe"], parts.recipe.model_dump(mode="json")), allow, parts)
            _check_data(state["data"], parts.sampler.fingerprint, allow)
            parts.engine.load(found / "trainer")
            parts.snapshots.load(found / "trainer" / "snapshots")
            parts.memory.restore(state["memory"])
            position = Position(step=state["step"], rollout=state["rollout"])
            parts.policy.version = position.step
            parts.run.log_event("info", f"resumed from {found.name}")
            say(f"resumed from {found}")
            if position.step >= parts.recipe.num_steps:
                say(f"nothing left to do: the run has its {parts.recipe.num_steps} steps")
            _restore_random(state["random"], parts)
    except CheckpointError as error:
        raise RecipeError(f"--resume {resume}: {error}") from error
    for name in set_aside_later(parts.run.path, position.step if found else -1):
        _report(parts, f"{name} is of a later step than this run goes on from; kept as superseded_{name}")
    return position


def _report(parts: Parts, message: str) -> None:
    parts.run.log_event("warning", message)
    parts.console.log(f"warning: {message}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys (a.b.c) whose values differ: key -> (before, now); a key that one of them lacks counts as None."""
    found = {}
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found.update(changes(old, new, f"{prefix}{key}."))
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


def check_changes(found: Mapping[str, tuple[Any, Any]], allow: Sequence[str], parts: Parts) -> None:
    """Say what differs; let it pass if all of it is harmless or allowed.

    Raises:
        RecipeError: naming the keys that are not.
    """
    refused = []
    for key, (old, new) in found.items():
        fine = _covered(key, HARMLESS) or _covered(key, allow)
        # Without a decay, the length of a run changes no step of it.
        fine = fine or (key == "num_steps" and parts.recipe.optimizer.decay == "none")
        if fine:
            _report(parts, f"resumed with another {key}: {old} -> {new}")
        else:
            refused.append(f"{key}: {old} -> {new}")
    if refused:
        keys = " ".join(f"--allow-change {line.partition(':')[0]}" for line in refused)
        raise RecipeError(
            f"--resume: the checkpoint's recipe differs ({'; '.join(refused)}); undo that, choose another --output, "
            f"or go on with it: {keys}"
        )


def _covered(key: str, blocks: Sequence[str]) -> bool:
    return any(key == block or key.startswith(f"{block}.") for block in blocks)


def _check_data(before: str, now: str, allow: Sequence[str]) -> None:
    if before != now and not _covered("data.prompts", allow):
        raise RecipeError(
            "data.prompts: the prompts are not those that the checkpoint was trained on; "
            "put them back, or go on with them: --allow-change data.prompts"
        )


def _restore_random(states: Sequence[dict[str, Any]], parts: Parts) -> None:
    rank = distributed.rank()
    if len(states) != distributed.world_size():
        _report(
            parts,
            f"the checkpoint was written by {len(states)} processes, now there are {distributed.world_size()}: "
            "the same prompts and updates, but the generators of rewards and data functions start anew",
        )
    if rank < len(states):
        random_state.restore(states[rank])

"""When a run saves, what it saves beside the weights, what a failed save means, and which checkpoint an exploited
reward leaves."""

import math
from typing import Any

from unified_rl.assemble import Parts
from unified_rl.engine import distributed
from unified_rl.engine.watch import enter
from unified_rl.errors import ExploitedError
from unified_rl.recipe.schema import Recipe
from unified_rl.run_folder import random_state
from unified_rl.run_folder.checkpoint import CheckpointError, best_checkpoint, save_checkpoint, set_aside_later
from unified_rl.run_folder.tracking import read_jsonl


def is_due(recipe: Recipe, before: int, step: int) -> bool:
    """Whether the rollout from `before` to `step` crossed a multiple of checkpoint.every, or the end."""
    return step == recipe.num_steps or step // recipe.checkpoint.every > before // recipe.checkpoint.every


class Saver:
    """Saves a run. A save that fails (the disk is full) is reported and costs the checkpoint, not the run: training
    goes on and the next one that is due tries again. Only a run that ends with unsaved work has failed."""

    def __init__(self, parts: Parts, step: int) -> None:
        """`step`: where the run goes on from, which needs no saving."""
        self._parts = parts
        self._saved_step = step

    def save(self, step: int, rollout: int, held_out: float | None) -> None:
        """Write the checkpoint of a position between two rollouts; called by every rank.

        Args:
            held_out: the held-out reward of just these weights, if they were evaluated.
        """
        parts = self._parts
        if step == self._saved_step:
            return
        enter("checkpoint")
        try:
            save_checkpoint(
                parts.run.path,
                step,
                policy=parts.policy,
                engine=parts.engine,
                snapshots=parts.snapshots,
                state=state_of(parts, step, rollout, held_out),
                keep=parts.recipe.checkpoint.keep,
            )
        except CheckpointError as error:
            parts.run.log_event("error", f"step {step}: no checkpoint: {error}")
            parts.console.log(f"error: no checkpoint at step {step}, training goes on: {error}")
        else:
            self._saved_step = step

    def check_saved(self, step: int) -> None:
        """
        Raises:
            CheckpointError: if the run ends at `step` and could not be saved there.
        """
        if step != self._saved_step:
            raise CheckpointError(f"the run ends at step {step}, which could not be saved; see events.jsonl")


def state_of(parts: Parts, step: int, rollout: int, held_out: float | None) -> dict[str, Any]:
    """What a resumed run needs beside weights and optimiser, as JSON; called by every rank."""
    return {
        "step": step,
        "rollout": rollout,
        "memory": parts.memory.state(),
        "random": distributed.gather_objects([random_state.capture()]),
        "recipe": parts.recipe.model_dump(mode="json"),
        "data": parts.sampler.fingerprint,
        "held_out": held_out,
    }


def end_exploited(parts: Parts, step: int, reason: str) -> int:
    """End a run at `step`, which is saved, because its reward is exploited; called by every rank.

    Returns:
        The exit code, 0: the checkpoints after the best one were set aside, so that it is now the newest.

    Raises:
        ExploitedError: if guard.action is stop, or no checkpoint is better than the base model.
    """
    guard = parts.recipe.guard
    mine = _best_of(parts) if distributed.is_main() else ("", math.nan)
    best, value = distributed.gather_objects([mine])[0]
    judge = guard.judge or "the trained reward"
    praise = f"{best} is the best checkpoint by {judge} ({value:.3g})" if best else f"{judge} likes the base model best"
    if guard.action == "stop" or not best:
        raise ExploitedError(f"{reason}. Stopped at step {step}; {praise}")
    set_aside_later(parts.run.path, int(best.removeprefix("step_")))
    message = f"{reason}. Rolled back from step {step}: {praise}; to go on from it, change the recipe"
    parts.run.log_event("warning", message)
    parts.console.log(f"warning: {message}")
    return 0


def _best_of(parts: Parts) -> tuple[str, float]:
    """The name of the best checkpoint and its held-out number; "" if none was evaluated, or the base is better."""
    found = best_checkpoint(parts.run.path)
    judge = parts.recipe.guard.judge
    key = "reward" if judge is None else f"rewards/{judge}/mean"
    if found is None:
        return "", math.nan
    path, value = found
    base = read_jsonl(parts.run.path / "eval.jsonl")[0][key]
    return (path.name, value) if base is None or value > base else ("", math.nan)

"""The recipe's `guard` block: what an alarm about an exploited reward leads to."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unified_rl.errors import nearest
from unified_rl.recipe.block import Block

if TYPE_CHECKING:
    from unified_rl.recipe.schema import Recipe


class Guard(Block):
    """Evaluations give an alarm where the trained reward rises and something else says that samples get worse."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """warn: say so and go on. stop: save, end the run and exit with 1. rollback: end it, set the checkpoints after the
    best one aside, and exit with 0."""
    alarms: Literal["judges", "all"] = "judges"
    """Which alarms are acted on. judges: a reward with weight 0 fell. all: also the statistics of samples changed."""
    patience: int = Field(default=1, ge=1)
    """So many evaluations in a row have to give an alarm."""
    judge: str | None = None
    """The reward with weight 0, as metrics show it, that says which checkpoint is best; None: the trained reward."""


def guard_conflicts(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """(key path, reason and alternative) for what the block cannot mean."""
    guard = recipe.guard
    judges = [reward.shown_name for reward in recipe.rewards if reward.weight == 0]
    if guard.judge is not None and guard.judge not in judges:
        hint = nearest(guard.judge, judges) if judges else "; add one"
        yield "guard.judge", f"no reward {guard.judge!r} with weight 0{hint}"
    if guard.action == "warn":
        return
    if recipe.data.evaluation is None:
        yield "guard.action", f"{guard.action} needs evaluations; give data.evaluation"
    if guard.alarms == "judges" and not judges:
        yield "guard.alarms", "judges: there is no reward with weight 0; add one, or say alarms: all"
    if guard.action == "rollback" and guard.judge is None:
        hint = f"for instance {judges[0]}" if judges else "a reward with weight 0"
        yield (
            "guard.judge",
            f"rollback needs to know whose word counts, {hint}; the trained reward is the exploited one",
        )
    if guard.action == "rollback" and recipe.checkpoint.every % recipe.evaluation.every:
        yield (
            "checkpoint.every",
            f"{recipe.checkpoint.every} is no multiple of evaluation.every = {recipe.evaluation.every}, so rollback "
            "could not tell which checkpoint is best",
        )

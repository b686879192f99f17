"""Which samples an update without a finite gradient was made of, so that they can be drawn again and looked at."""

from collections.abc import Sequence

from unified_rl.assemble import Parts
from unified_rl.engine import distributed
from unified_rl.types import Rows
from unified_rl.windows import Window

MOST = 8
"""Samples of a process that are named one by one."""


def skipped_update(parts: Parts, windows: Sequence[Window], bad: Sequence[int]) -> str:
    """What is said of an update of the current rollout; called by every process.

    Args:
        bad: this process's first window whose loss was not finite, if there is one: a finite loss too can have a
            gradient that is not.
    """
    blamed = [windows[number] for number in bad] or list(windows)
    count = parts.recipe.samples_per_rollout
    rows = sorted({row for window in blamed for row in _numbers(window.rows, count)})
    told = distributed.gather_objects([[bool(bad), rows, [] if parts.recipe.resample else _seeds(parts, rows)]])
    certain = any(found for found, _, _ in told)
    named = [
        f"process {rank}: {_samples(rows, seeds)}"
        for rank, (found, rows, seeds) in enumerate(told)
        if rows and (found or not certain)
    ]
    why = "the loss is not finite for" if certain else "every loss is finite, the gradient is not; it was trained on"
    return f"update skipped, rollout {parts.policy.rollout}: {why} {'; '.join(named)}"


def _numbers(rows: Rows, count: int) -> list[int]:
    return list(range(count)[rows]) if isinstance(rows, slice) else list(rows)


def _seeds(parts: Parts, rows: Sequence[int]) -> list[str]:
    """Prompt and seed of each row of this process, of which a rollout is a function."""
    engine = parts.engine
    prompts = parts.sampler.rollout(parts.policy.rollout, rank=engine.rank, world_size=engine.world_size)
    return [f"{str(prompts[row].text)[:60]!r}, seed {prompts[row].seed}" for row in rows[:MOST]]


def _samples(rows: Sequence[int], seeds: Sequence[str]) -> str:
    shown = [f"{row} ({seed})" for row, seed in zip(rows, seeds, strict=False)] or [str(row) for row in rows[:MOST]]
    more = f" and {len(rows) - MOST} more" if len(rows) > MOST else ""
    return f"samples {', '.join(shown)}{more}"

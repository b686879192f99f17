"""Dynamic sampling: groups whose rewards are all tied teach nothing, so other prompts take their places (DAPO, Yu et
al. 2025, arXiv 2503.14476, section 3.2, with a bound on the work)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unified_rl.advantages import group_advantages
from unified_rl.engine import distributed
from unified_rl.rollout import Rollout
from unified_rl.types import Prompt, Scores, Trajectory, concat_trajectories

FAR = 10**9
"""Spare rollouts are numbered from here, far from those that a run can reach."""


def tied_slots(rewards: Tensor, group_size: int) -> set[int]:
    """The groups, by their place in the rollout, without two different rewards.

    Args:
        rewards: [P * group_size] of all processes, the members of a group behind each other; NaN excludes.
    """
    slots = torch.arange(len(rewards)) // group_size
    teaching = slots[group_advantages(rewards, slots, normalise="group_mean").ne(0.0)]
    return set(range(len(rewards) // group_size)) - set(teaching.tolist())


def replace_tied(
    rollout: Rollout,
    *,
    rounds: int,
    index: int,
    group_size: int,
    prompts_of: Callable[[int], Sequence[Prompt]],
    draw: Callable[[Sequence[Prompt]], Rollout],
) -> tuple[Rollout, dict[str, float]]:
    """Redraw tied groups up to `rounds` times; what is still tied then stays.

    Every process draws equally many samples, because sharded ones sample together.

    Args:
        index: the rollout's number; spare prompts are a function of it, so that a resumed run draws the same.
        prompts_of: this process's prompts of a rollout, by number.
        draw: samples and judges prompts.

    Returns:
        The rollout, and the metrics num_resampled (groups that were replaced) and num_redrawn (samples that it took).
    """
    num_rows, rank = len(rollout.prompts), distributed.rank()
    replaced, redrawn = 0, 0
    for number in range(rounds):
        tied = tied_slots(distributed.gather_rows(rollout.scores.total), group_size)
        if not tied:
            break
        mine = [row for row in range(num_rows) if (rank * num_rows + row) // group_size in tied]
        others = [row for row in range(num_rows) if row not in set(mine)]
        share = int(distributed.max_over_ranks([float(len(mine))])[0])
        chosen = mine + others[: share - len(mine)]
        spare = prompts_of(FAR + index * rounds + number)
        fresh = draw([spare[row] for row in chosen])
        rewards = torch.full((num_rows,), torch.nan, dtype=fresh.scores.total.dtype)
        rewards[chosen] = fresh.scores.total
        accepted = tied - tied_slots(distributed.gather_rows(rewards), group_size)
        order = list(range(num_rows))
        for place, row in enumerate(mine):
            if (rank * num_rows + row) // group_size in accepted:
                order[row] = num_rows + place
        rollout = _pick(rollout, fresh, order)
        replaced += len(accepted)
        redrawn += share * distributed.world_size()
    return rollout, {"num_resampled": float(replaced), "num_redrawn": float(redrawn)}


def _pick(first: Rollout, second: Rollout, order: Sequence[int]) -> Rollout:
    """The rows `order` of two rollouts laid end to end."""
    prompts = [*first.prompts, *second.prompts]
    rows = list(order)

    def picked(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat([values, second[name]])[rows] for name, values in first.items()}

    scores = Scores(
        total=torch.cat([first.scores.total, second.scores.total])[rows],
        breakdown=picked(first.scores.breakdown, second.scores.breakdown),
        shaped=picked(first.scores.shaped, second.scores.shaped),
        report=first.scores.report,
    )
    joined = concat_trajectories([first.trajectory, second.trajectory])
    return replace(first, prompts=[prompts[row] for row in order], trajectory=_take(joined, order), scores=scores)


def _take(trajectory: Trajectory, rows: Sequence[int]) -> Trajectory:
    return replace(
        trajectory,
        group_ids=trajectory.group_ids[list(rows)],
        segments={name: segment.rows(list(rows)) for name, segment in trajectory.segments.items()},
        completions=[trajectory.completions[row] for row in rows],
    )

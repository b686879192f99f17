"""From what rewards said to what is trained on: too many failures, clipping, normalising, gates, weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unified_rl.engine import distributed
from unified_rl.rewards.runner import Outcome
from unified_rl.rewards.types import RewardError, RewardFailedError
from unified_rl.types import Scores

if TYPE_CHECKING:
    from unified_rl.rewards.scoring import LoadedReward


def shares_of(rewards: Sequence[LoadedReward], outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """How rewards fared, over all processes: `failures/<name>` (completions), `reward_log/<name>/<metric>` (what it
    told beside its scores), and `time/reward_work`, the seconds that they worked on this process.

    Raises:
        RewardError: on all processes alike, for a reward that cannot judge these data.
        RewardFailedError: likewise, for one that failed too often.
    """
    everyone = distributed.gather_objects(
        [
            (reward.name, len(found.values), found.failed, found.fatal, found.reason, dict(found.metrics))
            for reward in rewards
            for found in [outcomes[reward.name]]
        ]
    )
    report: dict[str, float] = {}
    for reward in rewards:
        mine = [row for row in everyone if row[0] == reward.name]
        total, failed = sum(row[1] for row in mine), sum(row[2] for row in mine)
        reason = next((row[4] for row in mine if row[4]), "")
        if any(row[3] for row in mine):
            raise RewardError(f"reward {reward.name!r} {reason}")
        if failed > reward.max_failures * total:
            share = "" if failed == total else f" (in {failed} of {total} completions, more than max_failures)"
            raise RewardFailedError(f"reward {reward.name!r} {reason}{share}")
        report[f"failures/{reward.name}"] = float(failed)
        for name in sorted({name for row in mine for name in row[5]}):
            weighted = [(row[5][name], row[1]) for row in mine if name in row[5]]
            count = sum(num for _, num in weighted)
            report[f"reward_log/{reward.name}/{name}"] = sum(value * num for value, num in weighted) / max(count, 1)
    report["time/reward_work"] = sum(outcome.seconds for outcome in outcomes.values())
    return report


def compose(
    rewards: Sequence[LoadedReward], values: Mapping[str, Sequence[float]], report: Mapping[str, float]
) -> Scores:
    """What counts. Called by all processes, because normalising looks at the whole rollout.

    Args:
        values: [B] of each reward; NaN where it abstained or failed.
    """
    breakdown = {name: torch.tensor(list(column), dtype=torch.float32) for name, column in values.items()}
    shaped: dict[str, Tensor] = {}
    total = torch.zeros(len(next(iter(breakdown.values()))) if breakdown else 0)
    for reward in rewards:
        column = breakdown[reward.name]
        if reward.clip is not None:
            column = column.clamp(*reward.clip)
        if reward.normalise == "batch":
            column = standardised(column)
        if reward.only_if is not None:
            gate = breakdown[reward.only_if.reward]
            column = column.where(gate >= reward.only_if.at_least, reward.only_if.otherwise)
            column = column.where(~gate.isnan() & ~breakdown[reward.name].isnan(), torch.nan)
        shaped[reward.name] = column
        if reward.weight != 0:
            total = total + reward.weight * column
    return Scores(total=total, breakdown=breakdown, shaped=shaped, report=dict(report))


def standardised(values: Tensor) -> Tensor:
    """[B] with zero mean and unit (population) std over the values of all processes; NaN stays. Equal values give 0."""
    known = values[~values.isnan()].double()
    count, total = distributed.sum_over_ranks([float(len(known)), float(known.sum())])
    mean = total / max(count, 1.0)
    (squares,) = distributed.sum_over_ranks([float((known - mean).square().sum())])
    std = math.sqrt(squares / max(count, 1.0))
    return ((values.double() - mean) / max(std, 1e-6)).float()

"""Numbers of one optimiser step, summed over windows and processes."""

import math
import resource
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unified_rl.engine import distributed
from unified_rl.protocols import Engine

PHASES = ("rollout", "reward", "update")
"""What each process does by itself, and `slowest` compares."""


@dataclass(slots=True)
class StepMetrics:
    """Sums over trained steps; `reduce` turns them into means over all processes."""

    loss: float = 0.0
    num_steps: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    shares: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Numbers whose denominators are in them already, as in the loss: they are only summed."""
    seconds: float = 0.0
    """Of this process's own forwards and backwards."""
    replay_gap: float = 0.0
    clip_range: float = math.inf
    """The smallest clip range that a recipe gave in nats, as what the ratio was compared with."""
    gaps: list[float] = field(default_factory=list)
    """The largest replay gap up to each window."""
    bad: list[int] = field(default_factory=list)
    """The first window whose loss was not finite, if there is one."""

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the values [B, s] of the unmasked steps."""
        self.sums[name] += float(values.detach()[mask].double().sum())

    def reduce(self) -> dict[str, float]:
        """The step's metrics, equal on every process."""
        names, shares = sorted(self.sums), sorted(self.shares)
        loss, num_steps, *totals = distributed.sum_over_ranks(
            [self.loss, self.num_steps, *(self.sums[name] for name in names), *(self.shares[name] for name in shares)]
        )
        means = {name: total / max(num_steps, 1.0) for name, total in zip(names, totals, strict=False)}
        means |= dict(zip(shares, totals[len(names) :], strict=True))
        gap, negative_range = distributed.max_over_ranks([self.replay_gap, -self.clip_range])
        bounds = {"clip_range": -negative_range} if math.isfinite(negative_range) else {}
        return {"loss": loss, **means, **bounds, "replay_gap": gap}


def reward_metrics(total: Tensor, breakdown: dict[str, Tensor]) -> dict[str, float]:
    """Mean and std of the trained reward and the mean of each reward over the samples that they count.

    Args:
        total, breakdown: [N] of all processes; NaN marks excluded samples.
    """
    valid = total[~total.isnan()].double()
    metrics = {
        "reward": float(valid.mean()) if len(valid) else float("nan"),
        "reward_std": float(valid.std()) if len(valid) > 1 else 0.0,
        "num_excluded": float(total.isnan().sum()),
    }
    for name, values in breakdown.items():
        metrics[f"rewards/{name}/mean"] = float(values.double().nanmean())
    return metrics


def slowest(phase: str, seconds: float) -> dict[str, float]:
    """How much longer the slowest process took for a phase than the mean of all, and which it is; called by every
    process. Under ZeRO-3, whose processes wait for each other in every forward, all take as long."""
    if distributed.world_size() == 1:
        return {}
    times = distributed.gather_objects([seconds])
    mean = sum(times) / len(times)
    return {f"slowest/{phase}": max(times) / mean if mean else 1.0, f"slowest/{phase}_process": times.index(max(times))}


class Traffic:
    """What this process has sent to others since the last optimiser step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before, self._in_rollout = dict(engine.sent_bytes), 0

    def end_rollout(self) -> None:
        """What was sent until now belongs to the rollout."""
        self._in_rollout = sum(self._engine.sent_bytes.values()) - sum(self._before.values())

    def end_step(self) -> dict[str, float]:
        """`comm/bytes` of the whole step, of its rollout (`comm/rollout_bytes`) and of each collective; empty alone."""
        now = dict(self._engine.sent_bytes)
        sent = {name: float(count - self._before[name]) for name, count in now.items()}
        in_rollout, self._before, self._in_rollout = self._in_rollout, now, 0
        if not sent:
            return {}
        named = {f"comm/{name}_bytes": count for name, count in sent.items()}
        return {"comm/bytes": sum(sent.values()), "comm/rollout_bytes": float(in_rollout), **named}


RANK_KEYS = ("time/rollout", "time/reward_work", "time/update", "comm/bytes", "comm/rollout_bytes")


def of_ranks(row: Mapping[str, float]) -> dict[str, list[float]]:
    """What each process says of an optimiser step (seconds, bytes sent, peak memory), in their order; called by all."""
    own = {**{key: row[key] for key in RANK_KEYS if key in row}, "memory/peak_mib": peak_mib()}
    ranks = distributed.gather_objects([own])
    return {key: [one[key] for one in ranks] for key in own}


def peak_mib() -> float:
    """Peak memory of this process so far, in MiB: on the device if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

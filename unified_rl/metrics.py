"""Numbers of one optimiser step, summed over windows and processes."""

import resource
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unified_rl.engine import distributed


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
    gaps: list[float] = field(default_factory=list)
    """The largest replay gap up to each window."""

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
        return {"loss": loss, **means, "replay_gap": distributed.max_over_ranks([self.replay_gap])[0]}


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


def peak_mib() -> float:
    """Peak memory of this process so far, in MiB: on the device if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

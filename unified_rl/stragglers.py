"""Which process is slower than the others, and at what: what the `slowest/*` metrics of several steps say."""

from collections.abc import Mapping

from unified_rl.metrics import PHASES

PATIENCE = 3
"""Rows in a row in which the same process must be the slow one before a warning."""


class Stragglers:
    """Watches the rows of metrics.jsonl. A process is named once for a phase, and again only after it kept up."""

    def __init__(self, factor: float, world_size: int) -> None:
        """`factor`: how many times as long as the mean of the others is too long."""
        self._factor, self._world_size = factor, world_size
        self._calm = (1.0 + factor) / 2
        """Below it a process has kept up: between the two nothing changes, so that a warning does not flicker."""
        self._late: dict[str, tuple[int, int]] = {}
        """By phase: the process that is late, and in how many rows."""
        self._told: dict[str, int] = {}

    def observe(self, row: Mapping[str, float]) -> list[str]:
        """The warnings that a row adds; phases that it lacks stay as they were."""
        found = []
        for phase in PHASES:
            if f"slowest/{phase}" in row:
                rank, times = int(row[f"slowest/{phase}_process"]), self._times_others(row[f"slowest/{phase}"])
                before, rows = self._late.get(phase, (rank, 0))
                if times >= self._factor:
                    rows = rows + 1 if rank == before else 1
                elif times < self._calm or rank != before:
                    rows = 0
                self._late[phase] = (rank, rows)
                if not rows:
                    self._told.pop(phase, None)
                elif rows >= PATIENCE and self._told.get(phase) != rank:
                    self._told[phase] = rank
                    found.append(
                        f"straggler: process {rank} takes {times:.1f} times as long as the others for its own {phase}, "
                        f"{rows} times in a row; the others wait for it"
                    )
        return found

    def _times_others(self, times_mean: float) -> float:
        """Of the longest time: by the mean of the others instead of by that of all."""
        others = (self._world_size - times_mean) / (self._world_size - 1)
        return times_mean / max(others, 1e-9)

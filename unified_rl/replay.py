"""Whether replay gives the log-probs of a rollout, asked before they change any weight; and if not, why.

The trainer looks twice. Of the first rollout after a start, the first window of each segment is evaluated before the
first update, so that a broken setup ends at once. Of every rollout, the log-probs that its first update computes anyway
are compared before the optimiser steps. What fails is measured: the same rows once more at other batch shapes, and with
whatever the policy suspects switched off (`ProbedPolicy`).
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from unified_rl.assemble import Parts
from unified_rl.data.recorded import RecordedSampler
from unified_rl.engine import distributed
from unified_rl.errors import RecipeError
from unified_rl.protocols import ProbedPolicy
from unified_rl.rollout import Rollout
from unified_rl.snapshots import TRAINED
from unified_rl.types import Segment, concat_trajectories
from unified_rl.update import largest_gap, replay_gap, window_loss, window_stats
from unified_rl.windows import Window

SAME = "nothing changed"
ROLLOUT_SHAPE = "at the rollout's batch shape"
AGAIN = "between two replays"
ADVICE = {
    ROLLOUT_SHAPE: "set engine.rollout_batch equal to engine.micro_batch, or policy.dtype: float32",
    SAME: "the model or its scheduler carries a state from one call to the next; make each call start afresh",
}
"""What to do, by the change that takes the gap away."""
UNREPEATABLE = (
    "two replays of the same rows differ: something is drawn at random or remembered between calls (dropout, a cache "
    "that is not reset, a scheduler with a memory)"
)


class ReplayCheck:
    """Compares a rollout with its replay."""

    def __init__(self, parts: Parts, rollout: Rollout) -> None:
        self._parts, self._rollout = parts, rollout

    @property
    def by_update(self) -> bool:
        """Whether the first update itself evaluates the weights that drew the rollout."""
        return self._is_drawn and self._parts.recipe.rollout_weights == TRAINED

    @property
    def _is_drawn(self) -> bool:
        return not isinstance(self._parts.sampler, RecordedSampler)

    def ahead(self, windows: Sequence[Window], *, starts: bool) -> float | None:
        """The gap of the first window of each segment, without gradients; None where the update will tell.

        Args:
            starts: this process trains its first rollout.

        Raises:
            RecipeError: on every process, if it is above the recipe's limit on any.
        """
        if not self._is_drawn or (self.by_update and not starts):
            return None
        first = {window.target.name: window for window in reversed(windows) if window.loss is window_loss}
        gaps = []
        with torch.no_grad(), self._drawing():
            for window in first.values():
                gaps.append(replay_gap(window, window_stats(self._parts.policy, window).log_probs))
        (gap,) = distributed.max_over_ranks([max(gaps, default=0.0)])
        self.judge(gap, gaps, [*first.values()])
        return None if self.by_update else gap

    def judge(self, gap: float, gaps: Sequence[float], windows: Sequence[Window]) -> None:
        """Stop rather than train on wrong ratios; called by all processes.

        Args:
            gap: the largest of all processes.
            gaps: of this process's windows; every process has as many windows, in the same order of segments and steps.

        Raises:
            RecipeError: with a diagnosis, if the gap is above the recipe's limit.
        """
        limit = self._parts.recipe.max_replay_gap
        if gap <= limit:
            return
        # One window for all: where weights are sharded, all must call the model equally often.
        worst = distributed.max_over_ranks(gaps)
        measured, untold = self._measure(windows[worst.index(max(worst))])
        message = diagnosis(gap, limit, measured, self._advice())
        self._parts.run.log_event("error", f"{message}; measured: {measured}; not measured: {untold}")
        for change, found in measured.items():
            self._parts.console.log(f"replay gap {found:.2e} {change}")
        for change, reason in untold.items():
            self._parts.console.log(f"replay gap not measured {change}: {reason}")
        raise RecipeError(message)

    def _drawing(self) -> AbstractContextManager[None]:
        """The weights that drew the rollout."""
        return self._parts.snapshots.use(self._parts.recipe.rollout_weights)

    def _probes(self) -> list[tuple[str, str, Callable[[], AbstractContextManager[None]]]]:
        policy = self._parts.policy
        if not isinstance(policy, ProbedPolicy):
            return []
        return [(probe.change, probe.remedy, probe.active) for probe in policy.probes()]

    def _advice(self) -> dict[str, str]:
        return {**{change: remedy for change, remedy, _ in self._probes()}, **ADVICE}

    def _measure(self, window: Window) -> tuple[dict[str, float], dict[str, str]]:
        """By change: the gap with it, and for what could not be computed the reason. The same on every process."""
        measures: dict[str, Callable[[], float]] = {
            AGAIN: lambda: self._repeated(window),
            ROLLOUT_SHAPE: lambda: self._in_rollout_batches(window),
            SAME: lambda: self._redrawn(window, nullcontext),
        }
        for change, _, active in self._probes():
            measures[change] = lambda active=active: self._redrawn(window, active)  # type: ignore[misc]
        measured, untold = {}, {}
        for change, measure in measures.items():
            gap, reason = 0.0, ""
            try:
                with torch.no_grad(), self._drawing():
                    gap = measure()
            except (RuntimeError, ValueError, TypeError) as error:  # a pipeline that cannot go without guidance, memory
                reason = f"{type(error).__name__}: {error}"
            reasons = [each for each in distributed.gather_objects([reason]) if each]
            (gap,) = distributed.max_over_ranks([gap])
            if reasons:
                untold[change] = reasons[0]
            else:
                measured[change] = gap
        return measured, untold

    def _repeated(self, window: Window) -> float:
        """Between two evaluations of a window."""
        before, after = (window_stats(self._parts.policy, window).log_probs for _ in range(2))
        return largest_gap(before, after, window.target.loss_mask[window.rows, window.steps])

    def _in_rollout_batches(self, window: Window) -> float:
        """Of a window's rows, evaluated among those that they were sampled with."""
        target, gap = window.target, 0.0
        for batch, inside in self._batches(window):
            segment = target.segment.rows(batch)
            scored = self._parts.policy.log_prob(target.name, segment, window.steps).log_probs
            gap = max(gap, _gap(segment, scored, window.steps, inside))
        return gap

    def _redrawn(self, window: Window, active: Callable[[], AbstractContextManager[None]]) -> float:
        """Of a window's rows, drawn once more at the rollout's batch shape under a change, and evaluated under it."""
        policy, name = self._parts.policy, window.target.name
        prompts, batches = self._rollout.prompts, self._batches(window)
        with active():
            drawn = concat_trajectories([policy.sample([prompts[row] for row in batch]) for batch, _ in batches])
            offsets = itertools.accumulate((len(batch) for batch, _ in batches), initial=0)
            rows = [start + row for start, (_, inside) in zip(offsets, batches, strict=False) for row in inside]
            segment = drawn.segments[name].rows(rows)
            scored = policy.log_prob(name, segment, window.steps).log_probs
        return _gap(segment, scored, window.steps, range(len(rows)))

    def _batches(self, window: Window) -> list[tuple[list[int], list[int]]]:
        """The rows of the batches of the rollout that hold a window's rows, and where in the batch these are.

        As many on every process: where weights are sharded, all must call the model equally often.
        """
        engine, num_rows = self._parts.recipe.engine, window.target.segment.num_rows
        size = engine.rollout_batch or engine.micro_batch
        wanted = window.rows if isinstance(window.rows, list) else list(range(num_rows)[window.rows])
        starts = sorted({row - row % size for row in wanted})
        (most,) = distributed.max_over_ranks([float(len(starts))])
        found = [(list(range(start, min(start + size, num_rows))), wanted) for start in starts]
        split = [(batch, [row - batch[0] for row in rows if row in batch]) for batch, rows in found]
        return split + [(split[-1][0], [])] * (int(most) - len(split))


def _gap(segment: Segment, log_probs: Tensor, steps: slice, rows: Sequence[int]) -> float:
    """Of some rows of a segment from its rollout, in nats."""
    own = list(rows)
    drawn, mask = segment.rollout_log_probs[:, steps], segment.loss_mask[:, steps]
    return largest_gap(log_probs[own], drawn[own], mask[own])


def diagnosis(gap: float, limit: float, measured: dict[str, float], advice: dict[str, str]) -> str:
    """One line: the gap, which changes take it away, and what to do.

    Args:
        measured: gap by change, with `AGAIN` for the difference between two replays.
    """
    start = f"max_replay_gap: replay differs from the rollout by {gap:.2e} nats, more than {limit:.0e}"
    if measured.get(AGAIN, 0.0) > limit:
        return f"{start}; {UNREPEATABLE}"
    gone = [change for change, found in measured.items() if change in advice and found <= limit]
    left = [change for change, found in measured.items() if change in advice and found > limit]
    if SAME in gone:  # then so it does with every other change, which says nothing
        gone, left = [SAME], []
    if not gone:
        tried = f" ({', '.join(left)})" if left else ""
        return f"{start}; no change that was tried takes it away{tried}: replay does not compute what sampling did"
    causes = "; ".join(f"it is {measured[change]:.1e} {change}: {advice[change]}" for change in gone)
    return f"{start}; {causes}" + (f"; it stays {', '.join(left)}" if left else "")

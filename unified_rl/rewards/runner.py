"""Calling rewards while the trainer goes on: a queue for each, batches, retries, a circuit breaker, a cache.

A reward never stops a run by itself: what it could not judge is excluded and counted, and `rewards` decides, on all
processes alike, whether that was too much.
"""

import hashlib
import math
import pickle
import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from unified_rl.rewards.process import CallFailedError, ProcessReward, ThreadedReward
from unified_rl.rewards.types import Judged, RewardBatch, RewardError

FIRST_PAUSE = 0.5
"""Seconds before the first retry; each further one waits about twice as long."""
LONGEST_PAUSE = 30.0
FAILURES_TO_BREAK = 3
"""Calls in a row, retries included, after which a reward is left alone for a while."""
FIRST_BREAK, LONGEST_BREAK = 30.0, 600.0
CACHE_ROWS = 100_000
_jitter = random.Random()
"""Not the global generator, which belongs to what is trained with: a retry would move it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a batch."""

    values: list[float]
    """NaN where the reward abstained or failed."""
    failed: int = 0
    """Completions that it could not judge."""
    reason: str = ""
    """Of the last failure."""
    fatal: bool = False
    """It cannot judge these data at all."""
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


class RewardRunner:
    """One reward's queue; batches are judged one after the other, off the calling thread."""

    def __init__(
        self,
        reward: ProcessReward | ThreadedReward,
        *,
        batch_size: int | None = None,
        retries: int = 0,
        cache: bool = False,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self.reward = reward
        self._batch_size, self._retries, self._first_pause = batch_size, retries, first_pause
        self._cache: OrderedDict[str, float] | None = OrderedDict() if cache else None
        self._began = math.inf
        self._last = CallFailedError("")
        self._tasks: queue.SimpleQueue[tuple[Future[Outcome], RewardBatch] | None] = queue.SimpleQueue()
        # A daemon: a reward that hangs must not hold up the end of the run.
        threading.Thread(target=self._work, name="reward", daemon=True).start()
        self._failures, self._break, self._closed_until = 0, FIRST_BREAK, -math.inf

    @property
    def groupwise(self) -> bool:
        return self.reward.groupwise

    def submit(self, batch: RewardBatch) -> Future[Outcome]:
        """Have a batch judged; the result never raises for what the reward does."""
        future: Future[Outcome] = Future()
        self._tasks.put((future, batch))
        return future

    @property
    def overdue(self) -> bool:
        """Whether it is in a call that takes longer than its timeout, and that nothing can end."""
        return time.monotonic() - self._began > self.reward.timeout

    def close(self) -> None:
        """End the queue and the reward's process."""
        self._tasks.put(None)
        self.reward.close()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, batch = task
            try:
                future.set_result(self._judge(batch))
            except BaseException as error:  # the thread that waits for the result raises it
                future.set_exception(error)

    def _judge(self, batch: RewardBatch) -> Outcome:
        started = time.perf_counter()
        keys = [_key(batch, row) for row in range(len(batch))] if self._cache is not None else []
        values = [self._cache.get(key, None) for key in keys] if self._cache is not None else [None] * len(batch)
        asked = [row for row, value in enumerate(values) if value is None]
        if self.groupwise and asked:  # a group is judged as a whole
            asked = list(range(len(batch)))
        size = self._batch_size if self._batch_size is not None and not self.groupwise else max(1, len(asked))
        found: list[float] = [math.nan if value is None else value for value in values]
        failed, reason, metrics = 0, "", {}
        for start in range(0, len(asked), size):
            rows = asked[start : start + size]
            try:
                judged = self._call(batch.rows(rows))
            except CallFailedError as error:
                failed, reason = failed + len(rows), str(error)
                continue
            except RewardError as error:
                return Outcome(values=[math.nan] * len(batch), failed=len(batch), reason=str(error), fatal=True)
            failed += len(judged.failures)
            reason = next(reversed(judged.failures.values())) if judged.failures else reason
            metrics = dict(judged.metrics)
            for place, (row, value) in enumerate(zip(rows, judged.values, strict=True)):
                found[row] = value
                if self._cache is not None and place not in judged.failures:
                    self._remember(keys[row], value)
        seconds = time.perf_counter() - started
        return Outcome(values=found, failed=failed, reason=reason, seconds=seconds, metrics=metrics)

    def _call(self, batch: RewardBatch) -> Judged:
        """Ask, again after a growing random pause, and not at all for a while after too many failures in a row."""
        for attempt in range(self._retries + 1):
            if time.monotonic() < self._closed_until:
                raise CallFailedError(f"{self._last} ({self._failures} times in a row; it rests for a while)")
            if attempt:
                pause = min(LONGEST_PAUSE, self._first_pause * 2 ** (attempt - 1))
                time.sleep(pause * _jitter.uniform(0.5, 1.5))
            self._began = time.monotonic()
            try:
                judged = self.reward.judge(batch)
            except CallFailedError as error:
                self._last = error
                self._count_failure()
                continue
            finally:
                self._began = math.inf
            self._failures, self._break = 0, FIRST_BREAK
            return judged
        raise self._last

    def _count_failure(self) -> None:
        self._failures += 1
        if self._failures >= FAILURES_TO_BREAK:
            self._closed_until = time.monotonic() + self._break
            self._break = min(LONGEST_BREAK, 2 * self._break)

    def _remember(self, key: str, value: float) -> None:
        assert self._cache is not None
        self._cache[key] = value
        if len(self._cache) > CACHE_ROWS:
            self._cache.popitem(last=False)


def _key(batch: RewardBatch, row: int) -> str:
    """A name of all that a reward sees of one completion."""
    columns = sorted((name, values[row]) for name, values in batch.columns.items())
    return hashlib.sha256(
        pickle.dumps((batch.prompts[row], batch.texts[row], list(batch.pictures[row]), columns))
    ).hexdigest()


def merge(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of the parts of a rollout as one."""
    reasons = [outcome.reason for outcome in outcomes if outcome.reason]
    names = {name for outcome in outcomes for name in outcome.metrics}
    total = sum(len(outcome.values) for outcome in outcomes)
    return Outcome(
        values=[value for outcome in outcomes for value in outcome.values],
        failed=sum(outcome.failed for outcome in outcomes),
        reason=reasons[-1] if reasons else "",
        fatal=any(outcome.fatal for outcome in outcomes),
        seconds=sum(outcome.seconds for outcome in outcomes),
        metrics={
            name: sum(outcome.metrics.get(name, 0.0) * len(outcome.values) for outcome in outcomes) / max(total, 1)
            for name in sorted(names)
        },
    )

"""Stopping on request. While a run starts there is nothing to save: the first SIGTERM or Ctrl-C ends it at once. From
then on the first one ends it after a checkpoint, and the second one at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit codes of a run that stopped on request."""


class Abandoned(Exception):  # noqa: N818  # not an error
    """The rollout was given up because a stop was asked for; nothing was trained on it."""


class Stopped(BaseException):
    """A stop was asked for while there was nothing to save. Not an `Exception`: those that libraries swallow while they
    load (an optional import, a fallback) must not swallow it."""


class StopSignal:
    """Whether a stop was asked for, on any process.

    A rollout that is being drawn or judged is abandoned: a resumed run draws it again. One whose updates have begun
    is finished, because checkpoints lie between rollouts.
    """

    def __init__(self) -> None:
        # Written by the handler alone: a signal may come in any line, also in one that would write it at the same time.
        self._heard = 0
        self._agreed = 0
        self._saves = False

    def requested(self) -> bool:
        """Whether any process was asked to stop; called by all."""
        from unified_rl.engine import distributed  # torch, which takes seconds: signals are heard before

        # Not only whether but which, so that all exit with the same code.
        self._agreed = int(distributed.max_over_ranks([float(max(self._heard, self._agreed))])[0])
        return self._agreed > 0

    def check(self) -> None:
        """
        Raises:
            Abandoned: on every process, if any was asked to stop; called by all.
        """
        if self.requested():
            raise Abandoned

    @property
    def exit_code(self) -> int:
        return STOPPED[signal.Signals(self._agreed or self._heard)]

    def save_first(self) -> None:
        """From now on the first signal does not raise: whoever asks `requested` saves and ends."""
        self._saves = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals in this block.

        Raises:
            Stopped: where one comes before `save_first`.
        """

        def hear(number: int, _frame: object) -> None:
            self._heard = number
            # The second one shall work although the main thread is in a collective or a kernel that never ends, where
            # no handler of Python's would run.
            for each in STOPPED:
                signal.signal(each, signal.SIG_DFL)
            if not self._saves:
                raise Stopped

        before = {number: signal.signal(number, hear) for number in STOPPED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


UNASKED = StopSignal()
"""Never asked for, for rollouts outside of a run."""

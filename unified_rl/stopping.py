"""Stopping on request. The first SIGTERM or Ctrl-C ends the run after a checkpoint; the second one ends it at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from unified_rl.engine import distributed

STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit codes of a run that stopped and saved."""


class Abandoned(Exception):  # noqa: N818  # not an error
    """The rollout was given up because a stop was asked for; nothing was trained on it."""


class StopSignal:
    """Whether a stop was asked for, on any process.

    A rollout that is being drawn or judged is abandoned: a resumed run draws it again. One whose updates have begun
    is finished, because checkpoints lie between rollouts.
    """

    def __init__(self) -> None:
        self._signal = 0

    def requested(self) -> bool:
        """Whether any process was asked to stop; called by all."""
        # Not only whether but which, so that all exit with the same code.
        self._signal = int(distributed.max_over_ranks([float(self._signal)])[0])
        return self._signal > 0

    def check(self) -> None:
        """
        Raises:
            Abandoned: on every process, if any was asked to stop; called by all.
        """
        if self.requested():
            raise Abandoned

    @property
    def exit_code(self) -> int:
        return STOPPED[signal.Signals(self._signal)]

    @contextmanager
    def listening(self) -> Iterator[None]:
        def ask(number: int, _frame: object) -> None:
            if self._signal:
                # A handler that is Python's would wait for a collective that may never end.
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signal = number

        before = {number: signal.signal(number, ask) for number in STOPPED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


UNASKED = StopSignal()
"""Never asked for, for rollouts outside of a run."""

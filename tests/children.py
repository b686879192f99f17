"""`unified-rl` in a process that tells, when it does not do what is waited for, where it stands."""

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from tests import forks


def _cli(words: Sequence[str]) -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    return forks.cli(words)


class Child:
    """A running process."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self._fork = forks.Fork(_cli, words, environment={}, log=log)

    def output(self) -> str:
        return self._fork.output()

    def wait_until(self, done: Callable[[], bool], *, seconds: float = 240.0) -> None:
        """Wait for what it is expected to do while it runs; fails if it ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not done():
            if self._fork.returncode is not None:
                pytest.fail(f"ended with {self._fork.returncode}:\n{self.output()[-5000:]}")
            if time.monotonic() > deadline:
                self._fail(f"not done after {seconds:g} s")
            time.sleep(0.02)

    def end(self, number: int, *, seconds: float = 120.0) -> int:
        """Send a signal; the exit code."""
        os.kill(self._fork.pid, number)
        deadline = time.monotonic() + seconds
        while self._fork.returncode is None:
            if time.monotonic() > deadline:
                self._fail(f"not ended {seconds:g} s after {signal.Signals(number).name}")
            time.sleep(0.02)
        return self._fork.returncode

    def _fail(self, what: str) -> NoReturn:
        os.kill(self._fork.pid, signal.SIGUSR1)
        time.sleep(1.0)
        os.kill(self._fork.pid, signal.SIGKILL)
        self._fork.wait()
        pytest.fail(f"{what}; it stood at:\n{self.output()[-20000:]}")

"""`unified-rl` in a fresh interpreter that tells, when it does not do what is waited for, where it stands."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

MAIN = """
import faulthandler, signal, sys
faulthandler.register(signal.SIGUSR1, all_threads=True)
from unified_rl.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Child:
    """A running process. Its output goes to a file, because a pipe that nobody reads would hold it up when full."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen([sys.executable, "-c", MAIN, *words], stdout=file, stderr=file)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until(self, done: Callable[[], bool], *, seconds: float = 240.0) -> None:
        """Wait for what it is expected to do while it runs; fails if it ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not done():
            if self.process.poll() is not None:
                pytest.fail(f"ended with {self.process.returncode}:\n{self.output()[-5000:]}")
            if time.monotonic() > deadline:
                self._fail(f"not done after {seconds:g} s")
            time.sleep(0.02)

    def end(self, number: int, *, seconds: float = 120.0) -> int:
        """Send a signal; the exit code."""
        os.kill(self.process.pid, number)
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._fail(f"not ended {seconds:g} s after {signal.Signals(number).name}")

    def _fail(self, what: str) -> NoReturn:
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(1.0)
        self.process.kill()
        self.process.wait()
        pytest.fail(f"{what}; it stood at:\n{self.output()[-20000:]}")

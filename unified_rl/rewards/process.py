"""Where a reward runs: in a process that can be killed, or in a thread of this one.

Both answer a batch with `Judged`, or raise `CallFailedError` (which may be tried again) or `RewardError` (which may
not).
"""

import atexit
import contextlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from unified_rl.errors import RecipeError
from unified_rl.rewards.conventions import UniformReward
from unified_rl.rewards.types import Judged, RewardBatch, RewardError
from unified_rl.rewards.worker import answer, put, take

START_SECONDS = 600.0
"""For importing a reward and loading its model."""
POLL_SECONDS = 0.1
REAP_SECONDS = 5.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class CallFailedError(Exception):
    """One call of a reward gave no answer. The message says why, without the reward's name."""


class ThreadedReward:
    """A reward inside this process."""

    def __init__(self, reward: UniformReward, *, timeout: float = math.inf) -> None:
        """`timeout`: seconds of one call, after which the run is given up: nothing can end the call."""
        self.reward = reward
        self.groupwise = reward.groupwise
        self.timeout = timeout

    def judge(self, batch: RewardBatch) -> Judged:
        return _result(*answer(self.reward, batch))

    def close(self) -> None:
        pass


class ProcessReward:
    """A reward in a process of its own, which is started anew after it had to be killed."""

    def __init__(
        self,
        reference: str,
        arguments: Mapping[str, Any],
        *,
        shown: str,
        where: str,
        device: str,
        timeout: float,
        memory_mib: int | None,
    ) -> None:
        self._load = (reference, dict(arguments), shown, where, device)
        self._where, self._seconds, self._memory_mib = where, timeout, memory_mib
        self.timeout = math.inf
        """Calls end by themselves."""
        self.groupwise = False
        """Known after `start`."""
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        # Whoever ends the run closes this object while the thread that judges may be starting a process.
        self._lock, self._closed = threading.Lock(), False
        _alive.add(self)
        self._spawn()

    def start(self) -> None:
        """Wait until the reward is loaded.

        Raises:
            RecipeError: if it cannot be.
        """
        try:
            kind, content = self._receive(START_SECONDS)
        except CallFailedError as error:
            raise RecipeError(f"{self._where}.name: loading {self._load[2]} {error}") from error
        if kind == "refused":
            raise RecipeError(self._end(content))
        self.groupwise = content["groupwise"]

    def judge(self, batch: RewardBatch) -> Judged:
        if self._process is None:
            self._spawn()
            try:
                self.start()
            except RecipeError as error:
                raise CallFailedError(f"could not be started again: {error}") from error
        assert self._connection is not None
        try:
            put(self._connection, batch)
        except OSError as error:
            raise CallFailedError(self._end("did not take the batch")) from error
        except Exception as error:  # whatever pickle says about the user's columns
            raise RewardError(f"got data that cannot be sent to its process ({error}); isolation: thread") from error
        return _result(*self._receive(self._seconds))

    def close(self) -> None:
        """End the process, all that it started, and a call that is under way; from any thread. No other call works.

        The connection is left to the thread that may be reading it: the number of a descriptor that is closed under
        its hands could mean another file by then.
        """
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill(self._process)

    def _spawn(self) -> None:
        with self._lock:
            if self._closed:
                raise CallFailedError("was closed")
            self._connect()

    def _connect(self) -> None:
        ours, theirs = socket.socketpair()
        seconds = struct.pack("ll", int(self._seconds) + 1, 0)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # a half-sent message must not hold us either
            ours.setsockopt(socket.SOL_SOCKET, option, seconds)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "unified_rl.rewards.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that what it starts can be killed with it
            )
        self._connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it has ended already, which the wait for its answer tells
            put(self._connection, self._load)

    def _receive(self, timeout: float) -> tuple[str, Any]:
        """The next message.

        Raises:
            CallFailedError: if there is none in time, the process ended, or it took too much memory. It is gone then.
        """
        assert self._connection is not None and self._process is not None
        deadline = time.monotonic() + timeout
        try:
            while not self._connection.poll(POLL_SECONDS):
                used = _resident_mib(self._process.pid) if self._memory_mib is not None else 0
                if self._memory_mib is not None and used > self._memory_mib:
                    raise CallFailedError(self._end(f"took {used} MiB, more than memory_mib = {self._memory_mib}"))
                if time.monotonic() > deadline:
                    raise CallFailedError(self._end(f"gave no answer within {timeout:g} s"))
            return take(self._connection)
        except (EOFError, OSError) as error:
            raise CallFailedError(self._end("")) from error

    def _end(self, reason: str) -> str:
        """Kill the process; returns the reason, or how it ended by itself."""
        assert self._process is not None
        reason = reason or _how_it_ended(self._process)
        with self._lock:
            _kill(self._process)
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        return reason


def _result(kind: str, content: Any) -> Judged:
    if kind == "judged":
        return content
    raise RewardError(content) if kind == "unusable" else CallFailedError(content)


def _how_it_ended(process: subprocess.Popen) -> str:
    """Of one whose connection was cut; it is not reaped, so that nobody else can get its number."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # `close`, from another thread, has ended and reaped it
            return "was closed"
        if end is not None:
            by_itself = end.si_code == os.CLD_EXITED
            how = f"exit code {end.si_status}" if by_itself else f"signal {signal.Signals(end.si_status).name}"
            return f"ended its process ({how})"
        time.sleep(0.01)
    return "cut its connection"


def _resident_mib(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):  # it has just ended
        return 0
    return int(pages) * PAGE_BYTES // 2**20


_alive: weakref.WeakSet[ProcessReward] = weakref.WeakSet()


def _kill(process: subprocess.Popen) -> None:
    """Kill a process that was not reaped yet, and what it has started, also if it has ended by itself."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in a driver; whoever waits for it hangs too
        process.wait(timeout=REAP_SECONDS)


@atexit.register
def _close_all() -> None:
    for reward in list(_alive):
        reward.close()

"""Who is missing: a thread in every process of a run that notices when another process is gone or stuck.

Collectives fail without saying whom they waited for, or not at all. So each process tells the others, through the
rendezvous store and not through the collectives, what it is doing, twice a second or more slowly. A process that has
waited for the others for longer than the run's timeout names those that it waited for, shows where every process stands
(the stacks of its threads), and ends; the others see that and end too, also the one that hangs.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

FAILED = 1
"""Exit code of a process that ends because of others."""


@dataclass
class _Doing:
    """What the main thread does."""

    phase: str = "starting"
    since: float = field(default_factory=time.monotonic)
    waiting: float | None = None
    """When it began to wait for the others, while it does."""


_doing = _Doing()


def enter(phase: str) -> None:
    """Say what this process does from now on, for the others' messages."""
    _doing.phase, _doing.since = phase, time.monotonic()


@contextmanager
def waiting() -> Iterator[None]:
    """Surrounds a collective."""
    _doing.waiting = time.monotonic()
    try:
        yield
    finally:
        _doing.waiting = None


class _Idle:
    """Since when the main thread has rested in a collective that `waiting` does not surround: DeepSpeed's own."""

    PACKAGES = ("torch.distributed", "deepspeed")
    DEPTH = 4
    """Calls, from the innermost on, among which one of these packages' makes the rest a collective's."""

    def __init__(self) -> None:
        self._thread = threading.main_thread().ident or 0
        # A computing thread's own clock runs; elsewhere than on Linux there is none, and nothing is found.
        self._clock = time.pthread_getcpuclockid(self._thread) if sys.platform == "linux" else None
        self._ran, self._since = 0.0, math.inf

    def since(self) -> float | None:
        """None if it was at work since the last call, or rests elsewhere."""
        if self._clock is None:
            return None
        ran = time.clock_gettime(self._clock)
        rested, self._ran = ran - self._ran < 1e-3, ran
        if not rested or not self._in_collective():
            self._since = math.inf
            return None
        self._since = min(self._since, time.monotonic())
        return self._since

    def _in_collective(self) -> bool:
        loaded = [sys.modules[name].__path__[0] for name in self.PACKAGES if name in sys.modules]
        folders = tuple(f"{path}{os.sep}" for path in loaded)
        frame = sys._current_frames().get(self._thread)
        for _ in range(self.DEPTH):
            if frame is None:
                return False
            if frame.f_code.co_filename.startswith(folders):
                return True
            frame = frame.f_back
        return False


class Watch:
    """The thread of one process."""

    def __init__(self, rank: int, world_size: int, timeout_seconds: float) -> None:
        """`timeout_seconds`: how long to wait for others before the run is given up."""
        self._rank, self._world_size, self._timeout = rank, world_size, timeout_seconds
        self._interval = min(0.5, timeout_seconds / 20) if world_size <= 64 else 5.0
        self._gone_after = min(timeout_seconds, max(20 * self._interval, 5.0))
        self._prefix = f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._seen: dict[int, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._idle = _Idle()
        self._began: float | None = None
        """Since when this process waits for others, while it does."""
        self._store = self._connect()
        self._tell()
        self.report: Callable[[str], None] = lambda message: None
        """Called with the message before this process ends because of others."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def _connect(self) -> dist.TCPStore:
        # A connection of its own: the default one is held by whatever the main thread waits for.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self._timeout)
        )

    def start(self) -> None:
        """Begin; every process has been constructed before."""
        self._thread.start()

    def stop(self) -> None:
        """End quietly: the run is over."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def fail(self, message: str) -> None:
        """Tell the others that this process ends."""
        # Without a meeting point there is nobody to tell: the others notice that it is gone, and end by themselves.
        with suppress(dist.DistError, RuntimeError):
            self._store.set(f"{self._prefix}/failed", f"process {self._rank}: {message}")

    def suspects(self) -> str:
        """Which processes are gone or keep the others waiting, in words; empty if it cannot be told."""
        now = time.monotonic()
        found = []
        for rank, (said, changed) in sorted(self._seen.items()):
            _, phase, seconds, is_waiting = said.split("|")
            if now - changed > self._gone_after:
                found.append(f"process {rank} is gone (was in: {phase})")
            elif is_waiting == "0":
                found.append(f"process {rank} does not answer (in: {phase}, for {seconds} s)")
        return "; ".join(found)

    def gone(self) -> str:
        """As `suspects`, after waiting long enough to know who is gone, and of those only."""
        deadline = time.monotonic() + 2 * self._gone_after
        while "is gone" not in self.suspects() and time.monotonic() < deadline:
            time.sleep(self._interval)
        return "; ".join(part for part in self.suspects().split("; ") if "is gone" in part)

    def _tell(self) -> None:
        now = time.monotonic()
        seconds = now - _doing.since
        idle = self._idle.since()
        self._began = _doing.waiting if _doing.waiting is not None else idle
        is_waiting = int(self._began is not None)
        self._store.set(f"{self._prefix}/{self._rank}", f"{now}|{_doing.phase}|{seconds:.0f}|{is_waiting}")

    def _look(self) -> None:
        for rank in range(self._world_size):
            if rank != self._rank:
                said = self._store.get(f"{self._prefix}/{rank}").decode()
                if rank not in self._seen or self._seen[rank][0] != said:
                    self._seen[rank] = (said, time.monotonic())

    def _failed(self) -> str | None:
        """What a process has said before it ended; None if none has."""
        key = f"{self._prefix}/failed"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._tell()
                self._look()
                failed = self._failed()
            except (dist.DistError, RuntimeError) as error:
                # The process that keeps the store has ended. If that was the run's end, the main thread ends too.
                self._give_up(f"process 0, which keeps the meeting point, is gone ({type(error).__name__})", told=True)
                return
            if failed is not None:
                self._give_up(failed, told=True)
                return
            if self._began is not None and time.monotonic() - self._began > self._timeout:
                who = self.suspects() or "no other process is known to be late"
                self._give_up(f"waited for {self._timeout:.0f} s in: {_doing.phase}; {who}", told=False)
                return

    def _give_up(self, message: str, *, told: bool) -> None:
        """End this process, unless its main thread ends by itself soon.

        Args:
            told: the others know already.
        """
        if told and self._stop.wait(max(1.0, 4 * self._interval)):
            return
        if not told:
            self.fail(message)
        try:
            sys.stderr.write(f"error: process {self._rank} ends: {message}; its threads are at:\n")
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            self.report(message)
            sys.stderr.flush()
        finally:
            os._exit(FAILED)

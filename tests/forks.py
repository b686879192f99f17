"""Real processes that start in milliseconds: forked from a server that has imported the libraries once.

Each has its own memory, signals, exit code and files for its output. What differs from a fresh interpreter is that the
imports are over; generators are seeded anew, so that nothing is equal that would not be equal otherwise.
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


@dataclass(frozen=True)
class Ended:
    """How a process ended: as `subprocess.run` tells it."""

    returncode: int
    """Negative: the signal that ended it."""
    stdout: str
    stderr: str


class Fork:
    """A running process."""

    def __init__(self, target: Callable[..., int | None], *given: Any, environment: Mapping[str, str], log: Path):
        """
        Args:
            target: called with `given`; returns the exit code.
            environment: variables beside those of the tests.
            log: a path without suffix; the output is kept in `log`.out and `log`.err.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = _CONTEXT.Process(target=_begin, args=(target, given, dict(environment), str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None: it still runs."""
        return self._process.exitcode

    def output(self) -> str:
        """What it has said so far, first what it printed."""
        return "".join(self._read(kind) for kind in ("out", "err"))

    def _read(self, kind: str) -> str:
        file = Path(f"{self._log}.{kind}")
        return file.read_text(errors="replace") if file.exists() else ""

    def wait(self, timeout: float = 300.0) -> Ended:
        """Its end; a process that takes longer is killed."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self._process.join()
        out, err = self._read("out"), self._read("err")
        assert code is not None, f"not ended after {timeout} s: {err[-3000:]}"
        return Ended(returncode=code, stdout=out, stderr=err)


def _begin(target: Callable[..., int | None], given: tuple, environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    seed = time.time_ns() + os.getpid()
    random.seed(seed)
    numpy_random = sys.modules["numpy"].random
    numpy_random.seed(seed % 2**32)
    sys.modules["torch"].manual_seed(seed)
    sys.modules["torch"].set_num_threads(1)
    try:
        code = target(*given)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of multiprocessing, which would wait for what the target has left running.
    os._exit(code or 0)


def cli(words: Sequence[str]) -> int:
    """`unified-rl WORDS`."""
    return sys.modules["unified_rl.cli"].main(list(words))


def cli_killed(words: Sequence[str], step: int) -> int:
    """The same; SIGKILL comes when the metrics of an optimiser step were written, before its checkpoint."""
    folder = sys.modules["unified_rl.run_folder.tracking"].RunFolder
    write = folder.log_metrics

    def write_and_die(self: Any, row: Mapping[str, Any]) -> None:
        write(self, row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    folder.log_metrics = write_and_die
    return cli(words)


def run(words: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """`unified-rl WORDS` in one process."""
    return Fork(cli, list(words), environment=environment or {}, log=log).wait()


def run_together(
    num: int,
    target: Callable[..., int | None],
    *given: Any,
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> list[Ended]:
    """`target(*given)` in `num` processes that find each other by a launcher's variables; their ends, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**(environment or {}), "WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num)]
    forks = [Fork(target, *given, environment=own, log=Path(f"{log}_{rank}")) for rank, own in enumerate(variables)]
    return [fork.wait(timeout) for fork in forks]

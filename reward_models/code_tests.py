"""Programs that a model wrote, run against tests. Off unless `allow_execution: true`.

**This is no sandbox.** The program runs as a process of its own, without environment variables, in an empty folder,
with limits on time, memory, file size and the number of processes, and is killed with all that it started. It can
still read the user's files and reach the network. Give it to a container or a virtual machine that may be lost.
"""

import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from reward_models.text_rules import reply

_FENCE = re.compile(r"```(?:python)?\s*\n(.*?)```", re.DOTALL)


class CodeTests:
    """1.0 where the reply's last Python block, followed by the column `tests`, runs to its end, else 0.0.

    To its end: a program that exits before the tests, with whatever code, has not passed them.
    """

    def __init__(
        self,
        allow_execution: bool = False,
        seconds: float = 10.0,
        memory_mib: int = 1024,
        processes: int = 64,
    ) -> None:
        """Args:
        allow_execution: that programs of the model may run on this machine.
        processes: that the user running this may have at all (Linux; not for root).

        Raises:
            ValueError: without `allow_execution`.
        """
        if not allow_execution:
            raise ValueError("running a model's programs has to be allowed: allow_execution: true; it is no sandbox")
        self.seconds, self.memory, self.processes = seconds, memory_mib * 2**20, processes

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, tests: Sequence[str], **_: Any
    ) -> list[float]:
        return [
            float(self._passes(program(reply(completion)) + "\n\n" + test))
            for completion, test in zip(completions, tests, strict=True)
        ]

    def _passes(self, code: str) -> bool:
        mark = secrets.token_hex(16)
        ours, theirs = os.pipe()
        try:
            return self._runs(f"{code}\n\n__import__('os').write({theirs}, b'{mark}')\n", theirs) and (
                _written(ours) == mark.encode()
            )
        finally:
            os.close(ours)
            os.close(theirs)

    def _runs(self, code: str, descriptor: int) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", code],
                pass_fds=[descriptor],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=self._limit,
            )
            try:
                return child.wait(timeout=self.seconds) == 0
            except subprocess.TimeoutExpired:
                return False
            finally:
                _kill_group(child)

    def _limit(self) -> None:
        seconds = int(self.seconds) + 1
        for kind, limit in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, self.memory),
            (resource.RLIMIT_FSIZE, 16 * 2**20),
            (resource.RLIMIT_NPROC, self.processes),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (limit, limit))


def _written(descriptor: int) -> bytes:
    """What a pipe holds already."""
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 1000)
    except BlockingIOError:
        return b""


def program(text: str) -> str:
    """The last fenced Python block of a reply, or all of it."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def _kill_group(child: subprocess.Popen) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing of it is left
        return
    finally:
        child.wait()

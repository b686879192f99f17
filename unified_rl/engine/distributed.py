"""Processes of a run: joining the launcher that exists, starting one, and small collectives for the trainer.

Every helper is the identity (or nothing) with one process, so callers never ask how many there are. Tensors travel on
`device()` (gloo on CPU, nccl on CUDA) and come back on the device that they came from.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unified_rl.engine.watch import Watch, waiting
from unified_rl.errors import PeerError

GRACE_SECONDS = 30.0
"""How long processes may take to end (saving included) once one has failed or the launcher was told to stop."""


def _slurm_master(nodes: str) -> str:
    """First host of a SLURM node list: `gpu[07-09,12],big1` -> `gpu07`."""
    host = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if host is None:
        raise RuntimeError(f"SLURM_JOB_NODELIST={nodes!r} names no host; set MASTER_ADDR")
    return "".join(part or "" for part in host.groups())


def _adopt_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The torch variables for a process that `srun` started; empty if it did not start this one."""
    # Inside a batch script SLURM_PROCID and SLURM_NTASKS are set too, for a single process; srun adds SLURM_STEP_ID.
    in_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    if "RANK" in environment or "SLURM_PROCID" not in environment or in_batch_script:
        return {}
    adopted = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment.get("SLURM_NTASKS", "1"),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
    }
    if "MASTER_ADDR" not in environment:
        adopted["MASTER_ADDR"] = _slurm_master(environment.get("SLURM_JOB_NODELIST", "localhost"))
    if "MASTER_PORT" not in environment:
        # Two jobs that share a node must not meet; all processes of one job must agree without talking.
        adopted["MASTER_PORT"] = str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)
    return adopted


def initialise(timeout_seconds: float = 1800.0) -> None:
    """Join the processes that torchrun, deepspeed, SLURM or `spawn` started; otherwise stay one process, groupless.

    Args:
        timeout_seconds: how long to wait for a process that does not join in, before the run is given up.
    Raises:
        RuntimeError: if this machine has fewer CUDA devices than processes, or the variables are inconsistent.
    """
    if dist.is_initialized():
        return
    os.environ.update(_adopt_slurm(os.environ))
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise RuntimeError(f"local rank {local_rank()} has no GPU: {torch.cuda.device_count()} on this machine")
        torch.cuda.set_device(local_rank())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # Later than the watch, which can say who is missing.
        patience = timedelta(seconds=timeout_seconds + 30.0)
        dist.init_process_group(backend, timeout=patience)
        _watches.append(Watch(rank(), world_size(), timeout_seconds))
        barrier()
        _watches[0].start()


_watches: list[Watch] = []
"""At most one: who looks after the other processes."""


def watch() -> Watch | None:
    """The thread that notices when other processes are gone or stuck; None with one process."""
    return _watches[0] if _watches else None


def lost(error: Exception) -> str:
    """Which processes are gone, if `error` is what losing one looks like; else empty."""
    looks_lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection" in str(error)
    return _watches[0].gone() if _watches and looks_lost else ""


def rank() -> int:
    """Index of this process over all machines."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes over all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Index of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def _reduce(values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(list(values), dtype=torch.float64, device=device())
    with waiting():
        dist.all_reduce(total, op=operation)
        return total.tolist()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sum of equally long lists, in float64: counts stay exact up to 2**53."""
    return _reduce(values, dist.ReduceOp.SUM)


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise maximum of equally long lists, in float64. NaN must not be passed (its order is undefined)."""
    return _reduce(values, dist.ReduceOp.MAX)


def broadcast_flag(flag: bool) -> bool:
    """True on every process if it is true on any."""
    return max_over_ranks([float(flag)])[0] > 0


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """What fails in this block on one process ends it on all of them, in place of leaving the others waiting.

    Raises:
        PeerError: on the processes where nothing failed, if it did elsewhere.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = int(max_over_ranks([float(rank() + 1) if error else 0.0])[0])
    if error is not None:
        raise error
    if failed:
        raise PeerError(f"{what}: failed on process {failed - 1}")


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        # An all-reduce, because nccl's own barrier has to guess the device.
        _reduce([0.0], dist.ReduceOp.SUM)


def gather_rows(tensor: Tensor) -> Tensor:
    """Join the rows of all processes, in rank order; without gradients.

    Args:
        tensor: [N_rank, ...] of any dtype, N_rank and the other dimensions equal on all ranks.
    Returns:
        [N_rank * world_size, ...] on the device of `tensor`.
    Raises:
        AssertionError: on every rank, if the shapes differ.
    """
    if world_size() == 1:
        return tensor
    sizes = [float(tensor.shape[0]), float(tensor.numel()), float(tensor.element_size())]
    extremes = max_over_ranks(sizes + [-size for size in sizes])
    assert extremes[:3] == [-low for low in extremes[3:]], f"gather_rows needs equal rows, got {tuple(tensor.shape)}"
    # Bytes: the backends do not agree on which dtypes they gather (bool, bfloat16).
    payload = tensor.detach().to(device()).contiguous().flatten().view(torch.uint8)
    parts = [torch.empty_like(payload) for _ in range(world_size())]
    with waiting():
        dist.all_gather(parts, payload)
    return torch.cat(parts).view(tensor.dtype).view(-1, *tensor.shape[1:]).to(tensor.device)


def gather_objects(items: list[Any]) -> list[Any]:
    """Join lists of small JSON-able rows of all processes, in rank order; lengths may differ. Tuples become lists.

    Raises:
        TypeError: for what JSON cannot carry. (Not pickle: nothing that arrives here can run.)
    """
    if world_size() == 1:
        return list(items)
    payload = json.dumps(items).encode()
    longest = int(max_over_ranks([len(payload)])[0])
    # JSON ignores trailing blanks, so padding needs no lengths.
    padded = torch.frombuffer(bytearray(payload.ljust(longest)), dtype=torch.uint8)[None]
    return [item for row in gather_rows(padded) for item in json.loads(row.numpy().tobytes())]


def shutdown() -> None:
    """Leave the process group, if there is one."""
    while _watches:
        _watches.pop().stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def spawn(num_processes: int, argv: Sequence[str]) -> int:
    """Run `unified-rl ARGV` in `num_processes` processes of this machine and wait for them.

    The processes get torchrun's variables, but not its agent, which would turn every failure into exit code 1. SIGTERM
    and SIGINT are passed on. When one process fails, the others get `GRACE_SECONDS` to end, then SIGTERM, then SIGKILL.

    Args:
        argv: the arguments, without the one that asked for several processes.
    Returns:
        0 if every process returned 0, else the code of the first that did not (128 + signal if a signal ended it).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **{name: str(value) for name, value in shared.items()}, "MASTER_PORT": str(port)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // num_processes)))
    command = [sys.executable, "-m", "unified_rl.cli", *argv]
    prepare = _die_with_parent if sys.platform == "linux" else None
    children: list[subprocess.Popen] = []
    with _forwarding_signals(children) as received:
        try:
            for index in range(num_processes):
                if received:
                    break
                variables = {**environment, "RANK": str(index), "LOCAL_RANK": str(index)}
                # A session of its own: Ctrl-C must reach a process once, through us, and not a second time.
                child = subprocess.Popen(command, env=variables, start_new_session=True, preexec_fn=prepare)
                children.append(child)
            return _wait(children)
        finally:
            _signal_all(children, signal.SIGKILL)


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In a new child: ask Linux for SIGTERM if the launcher is killed, so that it leaves no orphans."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_all(children: Sequence[subprocess.Popen], number: int) -> None:
    for child in children:
        # A signal handler may come in the middle of `poll`, which then cannot tell that the child has just ended.
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)


@contextmanager
def _forwarding_signals(children: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGINT on to the children; yields the list of those that have come."""
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        _signal_all(children, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """Wait for all children, ending those that outlive a failed one; see `spawn` for what is returned."""
    code = 0
    deadline: float | None = None
    escalation = [signal.SIGTERM, signal.SIGKILL]
    while True:
        running = [child for child in children if child.poll() is None]
        failed = [child.returncode for child in children if child.returncode]
        if failed and not code:
            code = failed[0]
            index = [child.returncode for child in children].index(code)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            sys.stderr.write(f"process {index} {how}\n")
        if not running:
            return 128 - code if code < 0 else code
        if code and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline and escalation:
            _signal_all(running, escalation.pop(0))
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)

"""A process that is gone, stuck or has failed ends the run: soon, with its name, and without orphans."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import forks
from unified_rl.engine import build_engine, distributed, watch
from unified_rl.engine.watch import enter
from unified_rl.recipe.schema import EngineBlock, Optimizer


def hang() -> None:
    time.sleep(300)


def be_killed() -> None:
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGKILL)


def miss(deed: Callable[[], None]) -> None:
    """One of two processes does not come to a sum."""
    distributed.initialise(timeout_seconds=4)
    enter("rewards")
    if distributed.rank() == 1:
        deed()
    try:
        distributed.sum_over_ranks([1.0])
    except Exception as error:
        sys.exit("lost: " + distributed.lost(error))


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        (hang, "process 1 does not answer (in: rewards"),
        (be_killed, "process 1 is gone (was in: rewards)"),
    ],
)
def test_the_missing_process_is_named_and_nobody_stays(deed: Callable[[], None], said: str, tmp_path: Path):
    survivor, lost = forks.run_together(2, miss, deed, log=tmp_path / "log", timeout=90)
    assert said in survivor.stderr
    assert survivor.returncode == 1
    if deed is hang:
        assert lost.returncode == 1, "the one that hangs ends too"
        assert "in hang" in lost.stderr, "and shows where it hung"
    else:
        assert lost.returncode == -signal.SIGKILL


def rest_under_zero_3() -> None:
    """One of two processes does not come to the forward pass, in which the other one gathers weights from it."""
    distributed.initialise(timeout_seconds=4)
    block = EngineBlock(zero_stage=3, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    module = nn.Linear(8, 8)
    engine = build_engine(module, SimpleNamespace(engine=block, optimizer=Optimizer()), num_steps=1)
    enter("update")
    with engine.window():
        if distributed.rank() == 1:
            enter("lunch")
            time.sleep(300)
        engine.backward(module(torch.ones(2, 8)).sum())


def test_a_process_that_others_miss_in_deepspeeds_own_collectives(tmp_path: Path):
    """Which no code of ours surrounds, and which would only tell, 30 s later, that time is up."""
    ends = forks.run_together(2, rest_under_zero_3, log=tmp_path / "log")
    assert [end.returncode for end in ends] == [1, 1]
    assert "waited for 4 s in: update; process 1 does not answer (in: lunch" in ends[0].stderr
    assert "in rest_under_zero_3" in ends[1].stderr


class Leaving:
    """A meeting point whose keeper ends at some call: another process has said that it failed, and that is not read."""

    def __init__(self, at: str) -> None:
        self._at, self._said = at, dict[str, bytes]()

    def _left(self, call: str, key: str) -> None:
        if f"{call} {key.rpartition('/')[2]}" == self._at:
            raise dist.DistNetworkError("Connection reset by peer")

    def set(self, key: str, value: str) -> None:
        self._left("set", key)
        self._said[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._left("get", key)
        return self._said.get(key, b"0.0|rewards|0|0")

    def check(self, keys: list[str]) -> bool:
        self._left("check", keys[0])
        return self._at == "get failed"


def rest_beside_a_keeper_that_leaves(at: str) -> None:
    watch.Watch._connect = lambda self: Leaving(at)
    found = watch.Watch(rank=1, world_size=2, timeout_seconds=1)
    found.start()
    with watch.waiting():
        time.sleep(300)


@pytest.mark.parametrize("at", ["get 0", "check failed", "get failed", "set failed"])
def test_the_meeting_point_may_go_at_any_moment(at: str, tmp_path: Path):
    """The thread that watches must not die of it and leave a process that hangs for ever."""
    end = forks.Fork(rest_beside_a_keeper_that_leaves, at, environment={}, log=tmp_path / "log").wait(timeout=60)
    said = "does not answer (in: rewards" if at == "set failed" else ", which keeps the meeting point, is gone"
    assert end.returncode == watch.FAILED and said in end.stderr
    assert "in rest_beside_a_keeper_that_leaves" in end.stderr


ROWS = """
import os, time

def rows():
    if os.environ["RANK"] == "1":
        time.sleep(300)
    return [{"prompt": "how many circles are there ?"}] * 2

def reward(prompts, completions, **_):
    return [1.0 * index for index in range(len(completions))]
"""


def test_data_that_hang_on_one_process(tmp_path: Path):
    """A whole run, from the command on."""
    (tmp_path / "mine.py").write_text(ROWS)
    work = ["num_steps=2", "group_size=2", "prompts_per_step=2", "data.evaluation=null", "engine.threads=1"]
    mine = [f"data.prompts={tmp_path / 'mine.py'}:rows", f"rewards=[{{name: {tmp_path / 'mine.py'}:reward}}]"]
    words = [*work, *mine, "engine.timeout=6", "-n", "2", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "unified_rl.cli", "train", "quickstart_vlm", *words]
    marked = {**os.environ, "TEST_MARK": str(tmp_path)}
    done = subprocess.run(command, env=marked, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr[-3000:]
    named = "process 1 does not answer (in: starting"
    assert named in done.stderr and named in (tmp_path / "events.jsonl").read_text()
    assert not running(str(tmp_path))


def running(mark: str) -> list[str]:
    """Processes that were started with the mark in their environment and still live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST_MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue  # ended meanwhile, or another user's
    return found

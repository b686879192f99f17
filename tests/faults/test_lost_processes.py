"""A process that is gone, stuck or has failed ends the run: soon, with its name, and without orphans."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = """
import os, signal, sys, time
from unified_rl.engine import distributed
from unified_rl.engine.watch import enter

distributed.initialise(timeout_seconds=4)
enter("rewards")
if distributed.rank() == 1:
    {deed}
try:
    distributed.sum_over_ranks([1.0])
except Exception as error:
    sys.exit("lost: " + distributed.lost(error))
"""


def start_two(code: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("time.sleep(300)", "process 1 does not answer (in: rewards"),
        ("time.sleep(1.5); os.kill(os.getpid(), signal.SIGKILL)", "process 1 is gone (was in: rewards)"),
    ],
)
def test_the_missing_process_is_named_and_nobody_stays(deed: str, said: str):
    processes = start_two(WORKER.format(deed=deed))
    survivor, lost = [process.communicate(timeout=90)[1] for process in processes]
    assert said in survivor
    assert processes[0].returncode == 1
    if "kill" not in deed:
        assert processes[1].returncode == 1, "the one that hangs ends too"
        assert 'File "<string>", line 9 in <module>' in lost, "and shows where it hung"


REWARD = """
import os, time

def reward(prompts, completions, **_):
    if os.environ["RANK"] == "1":
        {deed}
    return [1.0 * index for index in range(len(completions))]
"""


def test_a_reward_that_hangs_on_one_process(tmp_path: Path):
    (tmp_path / "mine.py").write_text(REWARD.format(deed="time.sleep(300)"))
    work = ["num_steps=2", "group_size=2", "prompts_per_step=2", "data.evaluation=null", "engine.threads=1"]
    rewards = f"rewards=[{{name: {tmp_path / 'mine.py'}:reward, isolation: thread}}]"
    words = [*work, "engine.timeout=6", rewards, "-n", "2", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "unified_rl.cli", "train", "quickstart_vlm", *words]
    marked = {**os.environ, "TEST_MARK": str(tmp_path)}
    done = subprocess.run(command, env=marked, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr[-3000:]
    named = "process 1 does not answer (in: rewards"
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

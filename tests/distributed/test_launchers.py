"""Launchers other than our own: two nodes of torchrun, which here share one machine, srun, and DeepSpeed's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests import forks
from unified_rl.run_folder.tracking import read_jsonl


def test_two_nodes_of_torchrun(tmp_path: Path):
    """The command of docs/scale.md, run on both nodes, where no compiler nor any other program is found; one of the two
    launchers is told to stop, and the whole run does, saved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    empty = tmp_path / "empty"
    empty.mkdir()
    words = ["num_steps=100000", "group_size=2", "prompts_per_step=2", "data.evaluation=null", "engine.threads=1"]
    train = [
        "-m",
        "unified_rl.cli",
        "train",
        "quickstart_vlm",
        *words,
        "engine.zero_stage=2",
        "checkpoint.every=100000",
        "--output",
        str(tmp_path / "run"),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    place = ["--master-addr", "127.0.0.1", "--master-port", port]
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(rank), *place, *train],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(empty)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    run = tmp_path / "run"
    deadline = time.monotonic() + 240
    while not read_jsonl(run / "ranks.jsonl") and time.monotonic() < deadline and nodes[1].poll() is None:
        time.sleep(0.1)
    nodes[1].send_signal(signal.SIGTERM)
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert "exitcode  : 143" in errors[0] and "got signal: 15" in errors[1], errors
    row, ranks = read_jsonl(run / "metrics.jsonl")[0], read_jsonl(run / "ranks.jsonl")[0]
    assert row["samples_seen"] == 4 and row["comm/bytes"] > 0 == row["comm/rollout_bytes"]
    assert {"step", "time/rollout", "time/reward_work", "time/update", "memory/peak_mib"} <= set(ranks)
    assert ranks["comm/bytes"] == [row["comm/bytes"]] * 2 and max(ranks["memory/peak_mib"]) == row["memory/peak_mib"]
    assert not list(empty.iterdir()), "nothing was built"
    (saved,) = (run / "checkpoints").iterdir()
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["step"] == read_jsonl(run / "metrics.jsonl")[-1]["step"]


def test_what_srun_sets_is_understood(tmp_path: Path):
    """Two tasks of one step, on one node; each has the variables that srun gives it, and nothing of torch's."""
    words = ["num_steps=1", "group_size=2", "prompts_per_step=2", "data.evaluation=null", "engine.threads=1"]
    train = ["train", "quickstart_vlm", *words, "engine.zero_stage=1", "--output", str(tmp_path / "run")]
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    step["SLURM_JOB_NODELIST"] = "localhost"
    tasks = [
        forks.Fork(
            forks.cli,
            train,
            environment={**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            log=tmp_path / f"log_{rank}",
        )
        for rank in range(2)
    ]
    ends = [task.wait() for task in tasks]
    assert [end.returncode for end in ends] == [0, 0], ends[1].stderr[-3000:]
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["samples_seen"] == 4
    for phase in ("rollout", "update"):
        assert 1.0 <= row[f"slowest/{phase}"] <= 2.0 and row[f"slowest/{phase}_process"] in (0, 1)


SLOW = """
import os, time

def reward(prompts, completions, **_):
    time.sleep(0.3 if os.environ["RANK"] == "1" else 0.0)
    return [float(index % 2) for index in range(len(completions))]
"""


def test_the_deepspeed_launcher_and_a_straggler(tmp_path: Path):
    """DeepSpeed's own command, which hands each process a --local_rank before all other words; one of them is slow."""
    (tmp_path / "slow.py").write_text(SLOW)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["num_steps=4", "group_size=2", "prompts_per_step=2", "data.evaluation=null", "engine.threads=1"]
    rewards = f"rewards=[{{name: {tmp_path / 'slow.py'}:reward, isolation: thread}}]"
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", port]
    train = ["--module", "unified_rl.cli", "train", "quickstart_vlm", *words, rewards, "engine.zero_stage=1"]
    done = subprocess.run(
        [*launcher, *train, "--output", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[-1]["samples_seen"] == 16 and rows[-1]["slowest/reward_process"] == 1
    events = [json.loads(line)["message"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    named = [event for event in events if "straggler: process 1" in event and "its own reward" in event]
    assert len(named) == 1 and "straggler: process 1" in done.stdout, events

"""Launchers other than our own: two nodes of torchrun, which here share one machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests import forks


def test_two_nodes_of_torchrun(tmp_path: Path):
    """The command of docs/scale.md, run on both nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["num_steps=1", "group_size=2", "prompts_per_step=2", "data.evaluation=null", "engine.threads=1"]
    train = [
        "-m",
        "unified_rl.cli",
        "train",
        "quickstart_vlm",
        *words,
        "engine.zero_stage=2",
        "--output",
        str(tmp_path),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    place = ["--master-addr", "127.0.0.1", "--master-port", port]
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(rank), *place, *train],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["samples_seen"] == 4 and row["comm/bytes"] > 0
    manifest = json.loads((tmp_path / "checkpoints/step_000001/manifest.json").read_text())
    assert manifest["world_size"] == 2


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

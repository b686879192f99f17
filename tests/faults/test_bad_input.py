"""Bad input gives one clear line and exit code 2, before a model loads where it can be known, and loses nothing."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forks

SMALL = ["group_size=2", "prompts_per_step=1", "num_steps=1", "data.evaluation=null", "engine.threads=1"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    """In a fresh interpreter: what a wrong word costs."""
    return subprocess.run(
        [sys.executable, "-m", "unified_rl.cli", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("objective.clip_hgih=1", ("objective.clip_hgih", "clip_high")),
        ("optimizer.lr=fast", ("optimizer.lr", "number")),
        ("group_size=1", ("group_size",)),
        ("policy.model=no/such/folder", ("policy.model", "no/such/folder")),
        ("data.prompts=no_such_file.jsonl", ("data.prompts", "no_such_file.jsonl")),
        ("rewards.0.name=shapes_gradde", ("rewards.0.name", "shapes_graded")),
    ],
)
def test_one_line_before_anything_loads(override: str, parts: tuple[str, ...], tmp_path: Path):
    started = time.perf_counter()
    done = run("train", "quickstart", override, "--output", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert all(part in done.stderr for part in parts), done.stderr
    assert time.perf_counter() - started < 10, "no model was loaded"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "part"), [(b"a red circle\n\na blue square\n", ":2"), (b"a red circle\nbad \xff byte\n", ":2")]
)
def test_prompt_files_are_read_to_the_end_first(content: bytes, part: str, tmp_path: Path):
    (tmp_path / "prompts.txt").write_bytes(content)
    done = run("train", "quickstart", f"data.prompts={tmp_path / 'prompts.txt'}", "--output", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"prompts.txt{part}" in done.stderr


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("return [1.0]", "returned 1 scores for 2 completions"),
        ("return ['good'] * len(completions)", "reward"),
        ("raise RuntimeError('no server')", "no server"),
    ],
)
def test_a_wrong_reward_is_named_and_loses_nothing(body: str, part: str, tmp_path: Path):
    (tmp_path / "mine.py").write_text(f"def judge(prompts, completions, **columns):\n    {body}\n")
    (tmp_path / "kept.txt").write_text("kept")
    rewards = f"rewards=[{{name: {tmp_path / 'mine.py'}:judge}}]"
    done = forks.run(["train", "quickstart", *SMALL, rewards, "--output", str(tmp_path / "run")], log=tmp_path / "log")
    assert done.returncode == 1, "not the recipe is wrong, but the code that it names"
    told = done.stderr.splitlines()[-1]
    assert told.startswith("error: RewardFailedError: reward 'judge'") and part in told
    events = (tmp_path / "run/events.jsonl").read_text()
    assert part in events and "Traceback" in events
    assert (tmp_path / "run/recipe.yaml").exists() and (tmp_path / "kept.txt").exists()


def test_a_reward_may_exclude_samples(tmp_path: Path):
    """None is no zero: the excluded sample is counted and enters no statistic."""
    (tmp_path / "mine.py").write_text(
        "def judge(prompts, completions, **columns):\n"
        "    return [None if index == 0 else float(index) for index in range(len(completions))]\n"
    )
    rewards = f"rewards=[{{name: {tmp_path / 'mine.py'}:judge}}]"
    words = ["train", "quickstart", *SMALL, "group_size=4", rewards, "--output", str(tmp_path / "run")]
    done = forks.run(words, log=tmp_path / "log")
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert '"num_excluded": 1.0' in line and '"reward": 2.0' in line


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path):
    from unified_rl.run_folder.tracking import RunFolder

    held = RunFolder(tmp_path / "run")
    try:
        done = run("train", "quickstart", *SMALL, "--output", str(tmp_path / "run"))
    finally:
        held.close()
    assert done.returncode == 2 and str(tmp_path / "run") in done.stderr

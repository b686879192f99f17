"""Under ZeRO-3 every forward gathers weights from all processes: generation of unequal lengths must not part them, nor
rows with pictures on one process and without on the other."""

import json
from pathlib import Path

import pytest

from tests import forks

REWARD = """
def reward(prompts, completions, **_):
    return [float(len(str(text))) for text in completions]


def rows():
    from unified_rl.worlds import shapes

    blind = [{"prompt": f"how many {word} are there ?"} for word in ("shapes", "circles")]
    return [shapes.questions("train", 1)[0], *blind]
"""


def words_of(folder: Path) -> list[str]:
    """One process has rows with a picture and without, the other one without alone."""
    (folder / "mine.py").write_text(REWARD)
    return [
        "num_steps=2",
        "group_size=2",
        "prompts_per_step=3",
        f"data.prompts={folder / 'mine.py'}:rows",
        "data.evaluation=null",
        "policy.sampling.max_new_tokens=12",
        "engine.zero_stage=3",
        "engine.threads=1",
        "engine.timeout=60",
        # Small as these models are, all of them would be kept whole.
        "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
        f"rewards=[{{name: {folder / 'mine.py'}:reward}}]",
        "--output",
        str(folder),
    ]


def train(words: list[str], folder: Path) -> None:
    ends = forks.run_together(2, forks.cli, words, log=folder / "log")
    assert not any(end.returncode for end in ends), ends[0].stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["replay_gap"] < 1e-4 and rows[0]["grad_norm"] > 0


def test_processes_with_other_rows_and_shorter_answers_wait_for_the_others(tmp_path: Path):
    """Idefics3, whose pictures are rows of a batch."""
    train(["train", "quickstart_vlm", *words_of(tmp_path)], tmp_path)


def test_a_process_without_pictures_runs_a_tower_of_packed_patches_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Qwen2.5-VL, whose pictures are one sequence of patches, and whose positions depend on them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keys = ["policy.adapter={kind: none}", "minibatches=1", "engine.micro_batch=2", "engine.rollout_batch=3"]
    words = ["train", "qwen25vl_geometry3k_grpo", "--tiny", *words_of(tmp_path), *keys]
    train(words, tmp_path)

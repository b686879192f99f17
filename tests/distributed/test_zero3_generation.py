"""Under ZeRO-3 every forward gathers weights from all processes: generation of unequal lengths must not part them, nor
rows with pictures on one process and without on the other."""

import json
import subprocess
import sys
from pathlib import Path

REWARD = """
def reward(prompts, completions, **_):
    return [float(len(str(text))) for text in completions]


def rows():
    from unified_rl.worlds import shapes

    blind = [{"prompt": f"how many {word} are there ?"} for word in ("shapes", "circles")]
    return [shapes.questions("train", 1)[0], *blind]
"""


def test_processes_with_other_rows_and_shorter_answers_wait_for_the_others(tmp_path: Path):
    (tmp_path / "mine.py").write_text(REWARD)
    words = [
        "num_steps=2",
        # One process has rows with a picture and without, the other one without alone.
        "group_size=2",
        "prompts_per_step=3",
        f"data.prompts={tmp_path / 'mine.py'}:rows",
        "data.evaluation=null",
        "policy.sampling.max_new_tokens=24",
        "engine.zero_stage=3",
        "engine.threads=1",
        "engine.timeout=60",
        # Small as this model is, all of it would be kept whole.
        "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
        f"rewards=[{{name: {tmp_path / 'mine.py'}:reward}}]",
    ]
    command = [sys.executable, "-m", "unified_rl.cli", "train", "quickstart_vlm", *words, "-n", "2"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["replay_gap"] < 1e-4

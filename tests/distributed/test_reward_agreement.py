"""A reward that fails on one process stops all of them, alike and at once."""

import subprocess
import sys
from pathlib import Path

REWARD = """
import os

def odd(completions, **columns):
    if os.environ["RANK"] == "1":
        os._exit(7)
    return [1.0] * len(completions)
"""


def test_a_reward_that_dies_on_one_process(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(REWARD)
    keys = [f"rewards=[{{name: {tmp_path}/odd.py:odd, retries: 0}}]", "num_steps=1", "group_size=2"]
    keys += ["prompts_per_step=2", "engine.micro_batch=2", "evaluation.num_prompts=4", "engine.threads=1"]
    command = [sys.executable, "-m", "unified_rl.cli", "train", "quickstart_vlm", *keys, "-n", "2"]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    line = "reward 'odd' ended its process (exit code 7) (in 2 of 4 completions, more than max_failures)"
    assert done.stderr.count(f"error: RewardFailedError: {line}") == 2, "both processes say the same"

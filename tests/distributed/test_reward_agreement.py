"""A reward that fails on one process stops all of them, alike and at once."""

from pathlib import Path

from tests import forks

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
    words = ["train", "quickstart_vlm", *keys, "--output", str(tmp_path / "run")]
    ends = forks.run_together(2, forks.cli, words, log=tmp_path / "log")
    assert [end.returncode for end in ends] == [1, 1]
    line = "reward 'odd' ended its process (exit code 7) (in 2 of 4 completions, more than max_failures)"
    for end in ends:
        assert end.stderr.count(f"error: RewardFailedError: {line}") == 1, "both processes say the same"

"""The README's own example of a reward: scored on files, then trained."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from unified_rl.cli import main

README = Path(__file__).parent.parent.parent / "README.md"


def test_a_newcomers_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (code,) = re.findall(r"```python\n# my_rewards.py\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(code)
    for name, colour in {"red": (200, 0, 0), "grey": (90, 90, 90)}.items():
        Image.new("RGB", (8, 8), colour).save(f"{name}.png")
    assert main(["score", "--reward", "my_rewards.py:redness", "red.png", "grey.png"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [["redness", "sample"], ["1.0000", "red.png"], ["0.3333", "grey.png"], ["0.6667", "mean of 2"]]
    keys = ["rewards=[{name: my_rewards.py:redness}]", "num_steps=1", "group_size=2", "prompts_per_step=1"]
    keys += ["evaluation.num_prompts=2", "policy.sampling.num_inference_steps=2", "policy.sampling.noise_steps=1"]
    assert main(["train", "quickstart", *keys, "--output", "run"]) == 0
    (row,) = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert 0.0 <= row["rewards/redness/mean"] <= 1.0 and row["failures/redness"] == 0.0


def test_rows_of_text_are_scored_with_their_columns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"prompt": "?", "text": f"<answer>{word}</answer>", "answer": "red"} for word in ("red", "blue")]
    file = tmp_path / "replies.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", "--reward", "answer", "--reward", "answer_format", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"1.0000\t1.0000\t{file}:1",
        f"0.0000\t1.0000\t{file}:2",
        "0.5000\t1.0000\tmean of 2",
    ]
    assert main(["score", "--reward", "answer", str(tmp_path / "none.png")]) == 2


def test_an_edit_is_scored_with_its_condition(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As the samples.jsonl of a run has it."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "made.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "given.png")
    (tmp_path / "mine.py").write_text(
        "def same(completions, images):\n"
        "    return [float(made.tobytes() == given.tobytes()) for made, (given,) in zip(completions, images)]\n"
    )
    file = tmp_path / "samples.jsonl"
    rows = [{"prompt": "p", "images": ["made.png"], "condition_images": [name]} for name in ("given.png", "made.png")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", "--reward", f"{tmp_path}/mine.py:same", str(file)]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [
        "same",
        "0.0000",
        "1.0000",
        "0.5000",
    ]


def test_what_a_reward_fails_at_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png")
    (tmp_path / "mine.py").write_text("def odd(completions):\n    return ['x']\n")
    assert main(["score", "--reward", f"{tmp_path}/mine.py:odd", str(tmp_path / "made.png")]) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith("error: RewardFailedError: reward 'odd' returned 'x' for completion 0")
        and said.count("\n") == 1
    )
    assert main(["score", "--reward", f"{tmp_path}/mine.py:odd", str(tmp_path / "mine.py")]) == 2
    assert "mine.py cannot be read (no PNG, JPEG, WEBP)" in capsys.readouterr().err


def test_an_exploited_reward_raises_an_alarm(tmp_path: Path) -> None:
    """The base's evaluation is rewritten so that the next one looks exploited; the run says so."""
    keys = ["num_steps=1", "group_size=2", "prompts_per_step=1", "engine.micro_batch=2", "evaluation.num_prompts=4"]
    run = tmp_path / "run"
    assert main(["train", "quickstart_vlm", *keys, "--output", str(run)]) == 0
    first, second = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert {"stats/length", "stats/repetition", "stats/distinct"} <= set(first) and first["stats/length"] > 0.0
    events = run / "events.jsonl"
    assert not events.exists() or "exploited" not in events.read_text()
    first["stats/length"] = second["stats/length"] + 100.0
    (run / "eval.jsonl").write_text(json.dumps(first) + "\n")
    longer = ["num_steps=2", "--allow-change", "num_steps"]
    assert main(["train", "quickstart_vlm", *keys, *longer, "--output", str(run)]) == 0
    assert "the number of words went from" in events.read_text()

"""The run's folder: what is written, what survives a crash, and who may write; and the console's lines."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from unified_rl.errors import RecipeError
from unified_rl.plain_text import clean, prompt_text, redact
from unified_rl.run_folder.tracking import (
    NullRun,
    RunFolder,
    check_writable,
    make_console,
    metrics_line,
    open_run,
    read_jsonl,
    samples_folder,
)


def sample(**changes) -> dict:
    row = {
        "prompt": "a red circle",
        "text": None,
        "images": [Image.new("RGB", (4, 4), "red")],
        "rewards": {"shapes_graded": 0.5},
        "seed": 7,
        "condition_images": [],
    }
    return {**row, **changes}


def test_rows_are_json_objects_with_null_for_nan(tmp_path):
    run = RunFolder(tmp_path / "a" / "run")
    run.log_metrics({"step": 1, "reward": math.nan, "loss": math.inf, "kl": 0.25})
    run.log_evaluation({"step": 0, "reward": 0.5})
    run.log_event("warning", "odd\nmessage")
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "reward": null, "loss": null, "kl": 0.25}\n'
    assert read_jsonl(run.path / "eval.jsonl") == [{"step": 0, "reward": 0.5}]
    (event,) = read_jsonl(run.path / "events.jsonl")
    assert event["level"] == "warning" and event["message"] == "odd\nmessage" and event["time"].endswith("+00:00")


def test_second_run_in_a_folder_is_refused_until_the_first_closes(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(RecipeError, match=rf"another run \(pid {os.getpid()} on \S+\) is writing here"):
        RunFolder(tmp_path)
    run.close()
    run.close()
    RunFolder(tmp_path).close()
    assert not (tmp_path / "run.lock").exists()


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = "import sys,time,pathlib; from unified_rl.run_folder.tracking import RunFolder;"
    code += "r=RunFolder(pathlib.Path(sys.argv[1]));"
    holder = subprocess.Popen([sys.executable, "-c", code + "print('locked', flush=True); time.sleep(60)", tmp_path],
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(RecipeError, match=f"pid {holder.pid} on"):
        RunFolder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run.lock").read_text().startswith(f"pid {holder.pid} ")
    RunFolder(tmp_path).close()


def test_truncate_forgets_later_rows_and_samples_and_repairs_a_cut_line(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.log_metrics({"step": step})
    for step in (0, 2, 3):
        run.log_evaluation({"step": step})
        run.save_samples(step, [sample()])
    run.log_event("info", "stays")
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')  # killed while writing
    run.truncate(2)
    run.log_metrics({"step": 3})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_jsonl(tmp_path / "eval.jsonl")] == [0, 2]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_000000", "step_000002"]
    assert len(read_jsonl(tmp_path / "events.jsonl")) == 1
    run.truncate(-1)
    assert read_jsonl(tmp_path / "metrics.jsonl") == read_jsonl(tmp_path / "eval.jsonl") == []


def test_damage_inside_a_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_jsonl(tmp_path / "metrics.jsonl")


def test_samples_are_written_with_relative_names(tmp_path):
    run = RunFolder(tmp_path)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour?"}]},
    ]
    picture = Image.new("CMYK", (4, 4))
    rows = [
        sample(images=[picture, picture]),
        sample(prompt=messages, text="red", images=[], condition_images=[picture]),
    ]
    run.save_samples(10, [*rows, sample()])
    run.save_samples(10, rows)  # again, as a resumed run does
    folder = samples_folder(tmp_path, 10)
    assert folder == run.samples_folder(10) == tmp_path / "samples" / "step_000010"
    first, second = read_jsonl(folder / "samples.jsonl")
    assert first["images"] == ["000_0.png", "000_1.png"] and first["rewards"] == {"shapes_graded": 0.5}
    assert second["prompt"] == "system: be brief\nuser: which colour?" and second["text"] == "red"
    names = {*first["images"], *second["condition_images"], "samples.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    assert Image.open(folder / "000_1.png").size == (4, 4)


def test_only_the_first_process_writes(tmp_path):
    run = open_run(tmp_path / "run", rank=1)
    assert isinstance(run, NullRun)
    run.log_metrics({"step": 1})
    run.save_samples(1, [sample()])
    run.close()
    assert not (tmp_path / "run").exists()
    assert {name for name in vars(RunFolder) if not name.startswith("_")} - {"samples_folder"} <= set(dir(NullRun))


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_unwritable_output_is_the_users_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"--output .* not writable"):
        check_writable(tmp_path / place)
    assert time.monotonic() - started < 10


def test_metrics_line_is_compact():
    row = {"step": 12, "reward": 0.0, "rewards/a/mean": 0.25, "rewards/b/mean": 0.5, "kl": 0.0, "grad_norm": 1.5}
    row |= {"clip_fraction/low": 0.1, "clip_fraction/high": 0.2, "time/total": 2.34, "entropy": math.nan}
    row["replay_gap"] = math.nan
    assert metrics_line(row, 60) == (
        "step 12/60  reward 0  a 0.25  b 0.5  entropy nan  grad_norm 1.5  clipped 10%/20%  2.3 s/step  2 min left"
    )
    assert metrics_line({"step": 1, "reward": None}, None) == "step 1"
    assert metrics_line({"step": 1, "replay_gap": 1e-6, "time/total": 10.0}, 3).endswith(
        "1e-06  10.0 s/step  20 s left"
    )
    assert metrics_line({"step": 1, "time/total": 3600.0}, 3).endswith("2 h 0 min left")


def test_console_strips_terminal_tricks_and_secrets(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    console = make_console(num_steps=3)
    console.log("\x1b[2J\x1b]0;title\x07hello\x9b31m \x08[bold]world[/bold] 0123456789abcdef\u202e")
    assert list(console.track(iter([1, 2]), "rollout", 2)) == [1, 2]
    console.metrics({"step": 1, "reward": 0.5})
    assert capsys.readouterr().out == "hello31m [bold]world[/bold] ***\nstep 1/3  reward 0.5\n"


def test_quiet_console_shows_nothing(capsys):
    console = make_console(quiet=True)
    console.log("a")
    console.metrics({"step": 1})
    assert list(console.track([1], "rollout", 1)) == [1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("api_key: abc, temperature: 1", "api_key: ***, temperature: 1"),
        ('{"hf_token": "abc", "b": 2}', '{"hf_token": ***, "b": 2}'),
        ("max_new_tokens: 64", "max_new_tokens: 64"),
        ("ratio: token\nloss: clip", "ratio: token\nloss: clip"),
        ("sk-abcdefghijklmnopqrstu", "***"),
        ("password: null", "password: null"),
    ],
)
def test_redact(text, shown):
    assert redact(text) == shown


def test_clean_keeps_text():
    assert clean("tabs\tand\nnewlines, ünïcode 漢字") == "tabs\tand\nnewlines, ünïcode 漢字"
    assert prompt_text("plain") == "plain"
    assert json.loads(json.dumps(clean("\x00\x1b[31mred"))) == "red"

"""Trackers are told what the folder gets; whatever they do, the run and its folder are unharmed."""

import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from unified_rl.cli import main
from unified_rl.errors import RecipeError
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.tracker import TrackerBlock, check_trackers
from unified_rl.run_folder.tracking import RunFolder, read_jsonl

SAMPLE = {
    "prompt": "a red square",
    "text": None,
    "images": [Image.fromarray(np.full((4, 4, 3), 200, np.uint8))],
    "rewards": {"redness": 0.5},
    "seed": 1,
    "condition_images": [],
}


def followed(folder, *trackers, step=0):
    """A run's folder whose trackers listen, and the list of what the console shows."""
    run, shown = RunFolder(folder), []
    recipe = load_recipe("quickstart_vlm").model_copy(update={"trackers": [TrackerBlock(**one) for one in trackers]})
    run.follow(recipe, step, shown.append)
    return run, shown


def test_tensorboard_shows_metrics_evaluations_and_samples_and_hides_what_is_repeated(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, shown = followed(tmp_path, {"name": "tensorboard"})
    run.log_evaluation({"step": 0, "reward": 0.25})
    for step, reward in ((1, 0.5), (2, 9.0)):
        run.log_metrics({"step": step, "reward": reward, "kl": float("nan"), "entropy": None})
    run.save_samples(1, [SAMPLE])
    run.close()
    run, shown_later = followed(tmp_path, {"name": "tensorboard"}, step=1)
    run.log_metrics({"step": 2, "reward": 0.75})
    run.close()
    assert shown == shown_later == []
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["eval/reward", "reward"]
    assert [(event.step, event.value) for event in found.Scalars("reward")] == [(1, 0.5), (2, 0.75)]
    assert [(image.step, image.width) for image in found.Images("samples/000_0")] == [(1, 4)]


TRACKERS = """
import time

class Listening:
    def __init__(self, run, recipe, step, note):
        self.file = run / "heard.txt"
        self.file.write_text(f"{note} {recipe['num_steps']} {step}\\n")

    def write(self, line):
        self.file.write_text(self.file.read_text() + line + "\\n")

    def log(self, step, values):
        self.write(f"{step} {values}")

    def log_samples(self, step, samples):
        self.write(f"{step} {samples[0]['prompt']}")

    def close(self):
        self.write("closed")

class NotMade(Listening):
    def __init__(self, **context):
        raise ConnectionError("no route")

class Raises(Listening):
    def log(self, step, values):
        raise RuntimeError("the server said 500")

class Blocks(Listening):
    def log(self, step, values):
        time.sleep(3600)
"""


@pytest.fixture
def module(tmp_path):
    file = tmp_path / "my_trackers.py"
    file.write_text(textwrap.dedent(TRACKERS))
    return file


def test_a_class_of_ones_own_is_told_everything_in_order(module, tmp_path):
    tracker = {"name": f"{module}:Listening", "arguments": {"note": "hello"}}
    run, shown = followed(tmp_path / "run", tracker, step=3)
    run.log_metrics({"step": 4, "loss": 1.0})
    run.log_evaluation({"step": 4, "reward": 0.5})
    run.save_samples(4, [SAMPLE])
    run.close()
    heard = (tmp_path / "run" / "heard.txt").read_text().splitlines()
    assert heard == ["hello 60 3", "4 {'loss': 1.0}", "4 {'eval/reward': 0.5}", "4 a red square", "closed"]
    assert not shown


@pytest.mark.parametrize(
    ("name", "why", "num_rows"),
    [
        ("NotMade", "failed: ConnectionError: no route", 3),
        ("Raises", "failed: RuntimeError: the server said 500", 3),
        ("Blocks", "did not finish within 0.2 s", 3),
        ("Blocks", "is 1000 calls behind", 1100),
    ],
)
def test_a_broken_tracker_costs_one_warning(name, why, num_rows, module, tmp_path):
    run, shown = followed(tmp_path, {"name": f"{module}:{name}", "timeout": 0.2, "arguments": {"note": ""}})
    started = time.monotonic()
    for step in range(num_rows):
        run.log_metrics({"step": step, "loss": 1.0})
        time.sleep(0.02 if step < 3 else 0)
    run.close()
    assert time.monotonic() - started < 20
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == num_rows
    (event,) = read_jsonl(tmp_path / "events.jsonl")
    assert event["level"] == "warning" and f":{name} {why}; it is told nothing more" in event["message"]
    assert shown == [f"warning: {event['message']}"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("tensorbord", r"trackers\.0\.name: no tracker 'tensorbord'; did you mean 'tensorboard'\?"),
        ("no_such_module:Tracker", r"trackers\.0\.name: no module 'no_such_module' is installed"),
    ],
)
def test_what_cannot_be_is_told_before_anything_loads(name, error):
    with pytest.raises(RecipeError, match=error):
        check_trackers([TrackerBlock(name=name)])


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="wandb is not installed; pip install wandb"):
        check_trackers([TrackerBlock(name="wandb")])


def test_a_run_tells_its_trackers(module, tmp_path, capsys):
    trackers = f"trackers=[{{name: '{module}:Listening', arguments: {{note: x}}}}, {{name: '{module}:NotMade'}}]"
    words = ["num_steps=2", "prompts_per_step=1", "group_size=2", "data.evaluation=null", trackers]
    assert main(["train", "quickstart_vlm", *words, "--output", str(tmp_path / "run")]) == 0
    heard = (tmp_path / "run" / "heard.txt").read_text().splitlines()
    assert [line.split()[0] for line in heard] == ["x", "1", "1", "2", "2", "closed"]
    assert capsys.readouterr().out.count("NotMade failed") == 1

"""Every shipped recipe validates, and trains."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import forks
from tests.children import Child
from unified_rl.cli import main
from unified_rl.recipe.checks import check_recipe
from unified_rl.recipe.file import RECIPES, load_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SMALL = [
    "group_size=4",
    "prompts_per_step=2",
    "evaluation.num_prompts=4",
    "evaluation.every=2",
    "evaluation.num_saved=4",
    "engine.micro_batch=8",
    "engine.threads=1",
    "checkpoint.every=2",
]
LIKE_OTHERS = [
    "quickstart_classes",
    "quickstart_draft",
    "quickstart_edit",
    "quickstart_image_tokens",
    "quickstart_masked_diffusion",
    "quickstart_nft",
    "quickstart_ocr",
    "quickstart_vla",
]
"""Their checkpoints are written and read like those of a recipe that is resumed here."""
DENOISE = ["policy.sampling.num_inference_steps=4"]
SOME_NOISE = [*DENOISE, "policy.sampling.noise_steps=2"]
OWN = {
    "quickstart": SOME_NOISE,
    "quickstart_classes": SOME_NOISE,
    "quickstart_ddpo": [*SOME_NOISE, "objective.train_steps=2"],
    "quickstart_draft": DENOISE,
    "quickstart_edit": SOME_NOISE,
    "quickstart_masked_diffusion": DENOISE,
    "quickstart_nft": DENOISE,
    "quickstart_ocr": SOME_NOISE,
    # Of few episodes all may end alike, and then there is nothing to learn from.
    "quickstart_vla": ["group_size=16", "prompts_per_step=4"],
}
"""Fewer denoising steps, and what a recipe needs."""
KEYS = {
    "step", "samples_seen", "loss", "reward", "reward_std", "frac_reward_zero_std", "replay_gap", "grad_norm", "lr",
    "time/rollout", "time/reward", "time/update", "time/total", "samples_per_second", "memory/peak_mib",
}  # fmt: skip
OF_METHODS = {
    "policy_gradient": {"ratio/mean", "clip_fraction/low", "clip_fraction/high"},
    "nft": {"denoising_error", "kl"},
    "reward_gradient": {"with_grad"},
}
"""What each method that a shipped recipe uses reports beside."""


def command(name: str, folder: Path, *overrides: str) -> list[str]:
    return ["train", name, *SMALL, *OWN.get(name, []), *overrides, "--output", str(folder)]


def train(name: str, folder: Path, *overrides: str) -> forks.Ended:
    return forks.run(command(name, folder, *overrides), log=folder.parent / f"log_{folder.name}")


def rows(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@pytest.mark.parametrize("name", [*NAMES, *(str(path) for path in (RECIPES / "quickstart").glob("r1_*.yaml"))])
def test_a_recipe_passes_its_checks(name: str):
    check_recipe(load_recipe(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_fills_its_folder(name: str, tmp_path: Path):
    if "ocr" in name and shutil.which("tesseract") is None:
        pytest.skip("the program tesseract is not installed")
    if name in LIKE_OTHERS:
        assert main(command(name, tmp_path, "num_steps=2")) == 0
    else:
        done = train(name, tmp_path, "num_steps=2")
        assert done.returncode == 0, done.stderr[-2000:]
    metrics = rows(tmp_path, "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    methods = {objective.method for objective in load_recipe(name).objective.values()}
    reported = {*metrics[0], *(key.rpartition("/")[2] for key in metrics[0])}
    assert reported >= KEYS.union(*(OF_METHODS[method] for method in methods))
    assert metrics[0]["replay_gap"] <= (1e-4 if "vlm" in name else 1e-5)
    if "policy_gradient" in methods:
        assert metrics[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics[0]["grad_norm"] > 0
    evaluations = rows(tmp_path, "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2]
    assert {"reward", "num_samples"} <= set(evaluations[0])
    assert len(rows(tmp_path / "samples/step_000000", "samples.jsonl")) == 4
    manifest = json.loads((tmp_path / "checkpoints/step_000002/manifest.json").read_text())
    assert any(entry["path"].startswith("policy/") for entry in manifest["files"])
    assert load_recipe(str(tmp_path / "recipe.yaml")).num_steps == 2


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LIKE_OTHERS])
def test_a_resumed_run_ends_where_an_unbroken_one_does(name: str, tmp_path: Path):
    assert train(name, tmp_path / "whole", "num_steps=4").returncode == 0
    assert train(name, tmp_path / "parts", "num_steps=4", "checkpoint.keep=9").returncode == 0
    # Drop what came after step 2, as if the run had been killed there.
    late = tmp_path / "parts/checkpoints/step_000004"
    (late / "manifest.json").unlink()
    resumed = train(name, tmp_path / "parts", "num_steps=4")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "step_000002" in resumed.stdout
    file = "trainer/state_00000_00.safetensors"
    first, second = load_file(tmp_path / "whole/checkpoints/step_000004" / file), load_file(late / file)
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
    timeless = [
        [{key: value for key, value in row.items() if "time" not in key and "second" not in key and "mem" not in key}
         for row in rows(tmp_path / part, "metrics.jsonl")] for part in ("whole", "parts")
    ]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_sigterm_saves_and_exits_143(tmp_path: Path):
    words = command("quickstart_vlm", tmp_path / "run", "num_steps=2000", "checkpoint.every=1000")
    child = Child(words, tmp_path / "log")
    child.wait_until((tmp_path / "run/metrics.jsonl").exists)
    assert child.end(signal.SIGTERM) == 143, child.output()
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*/manifest.json")
    last = rows(tmp_path / "run", "metrics.jsonl")[-1]["step"]
    assert json.loads(saved.read_text())["step"] == last


def test_nothing_left_to_do_is_said(tmp_path: Path):
    assert train("quickstart_vlm", tmp_path, "num_steps=2").returncode == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    again = train("quickstart_vlm", tmp_path, "num_steps=2")
    assert again.returncode == 0 and "nothing left to do" in again.stdout
    assert (tmp_path / "metrics.jsonl").read_text() == before

"""Who installs a wheel has no checkout: its quickstarts must be in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from unified_rl.recipe.file import RECIPES

ROOT = Path(__file__).parents[2]
SMALL = ["num_steps=1", "group_size=4", "prompts_per_step=2", "evaluation.num_prompts=4", "engine.threads=1"]


def test_a_wheel_trains_a_quickstart_without_the_checkout(tmp_path: Path):
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"unified_rl", "reward_models"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "unified_rl.cli", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    listed = [line.split()[0] for line in run("list", "recipes").splitlines()]
    assert sorted(listed) == sorted(
        path.stem for folder in ("", "models") for path in (RECIPES / folder).glob("*.yaml")
    )
    run("train", "quickstart_vlm", *SMALL, "--output", "run")
    resolved = (tmp_path / "run/recipe.yaml").read_text()
    assert str(installed / "unified_rl/shipped_recipes/quickstart/shapes_vlm") in resolved

"""Recipes of masked-diffusion policies, before a model is loaded."""

import json
from pathlib import Path

import pytest

from unified_rl.errors import RecipeError
from unified_rl.recipe.checks import check_recipe
from unified_rl.recipe.explain import explain, plan
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.schema import Recipe


def recipe(folder: Path, *, sampling: dict | None = None, objective: dict | None = None) -> Recipe:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "AmusedPipeline"}))
    raw = {
        "policy": {"model": str(folder), "sampling": sampling or {}},
        "data": {"prompts": "unified_rl.worlds.shapes:train_drawing"},
        "rewards": [{"name": "shapes_strict"}],
        "objective": objective or {"preset": "dr_grpo"},
        "engine": {"micro_batch": 128},
    }
    return parse_recipe(raw, folder)


def test_the_family_is_found_and_its_steps_are_counted(tmp_path: Path):
    found = recipe(tmp_path)
    assert found.policy.family == "masked_diffusion" and found.policy.segments == ("image",)
    check_recipe(found)
    assert plan(found).steps_trained == plan(found).windows_per_update == 12
    assert "masked_diffusion" in explain(found)
    assert plan(recipe(tmp_path, objective={"train_steps": 3})).steps_trained == 3
    assert plan(recipe(tmp_path, sampling={"estimator": "random_mask", "num_masks": 3})).steps_trained == 3
    assert plan(recipe(tmp_path, sampling={"estimator": "coupled_mask", "num_masks": 3})).steps_trained == 6


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"mask_ratio": [0.9, 0.1]}, r"policy\.sampling\.mask_ratio: \[0\.9, 0\.1\] is no range"),
        ({"estimator": "coupled_mask", "num_masks": 6}, r"policy\.sampling\.num_masks: coupled_mask replays 12 states"),
        ({"estimator": "exact"}, r"policy\.sampling\.estimator: must be 'trajectory'"),
        ({"noise_level": 0.7}, r"policy\.sampling\.noise_level: unknown key"),
    ],
)
def test_wrong_sampling_is_said(tmp_path: Path, sampling: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, sampling=sampling)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kl": {"coef": 0.1, "estimator": "gaussian"}}, "use k3 for tokens"),
        ({"loss": "guard"}, "compares means of Gaussian steps"),
        ({"ratio": "sequence", "aggregation": "sequence_mean"}, "needs all steps in one forward"),
        ({"entropy_coef": 0.1}, "is not evaluated"),
    ],
)
def test_objectives_that_do_not_fit_are_refused(tmp_path: Path, objective: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, objective=objective)

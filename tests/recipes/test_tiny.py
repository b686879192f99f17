"""`--tiny`: every recipe for a real model trains its twin; what is shrunk and what is not."""

import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from unified_rl import cli
from unified_rl.data.sources import load_rows
from unified_rl.errors import RecipeError
from unified_rl.recipe.file import RECIPES, load_recipe
from unified_rl.recipe.policy import DiffusionSampling
from unified_rl.tiny import language, models
from unified_rl.tiny.twin import HUB, NUM_STEPS, brightness, letters, shrink, tiny_recipe
from unified_rl.worlds.edits import train_instructions

NAMES = sorted(path.stem for path in (RECIPES / "models").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Twins of this module's tests, written once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_for_a_real_model_trains_its_twin(name: str, tmp_path: Path):
    full = load_recipe(name)
    assert cli.main(["train", name, "--tiny", "--output", str(tmp_path)]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    # Generation with a cache rounds otherwise than scoring, in bfloat16 by an amount that depends on the CPU.
    rounds = full.policy.family == "causal_lm" and full.policy.dtype == "bfloat16"
    assert metrics[0].get("replay_gap", 0.0) <= (1e-2 if rounds else 1e-5)
    assert metrics[0]["grad_norm"] > 0
    resolved = load_recipe(str(tmp_path / "recipe.yaml"))
    assert resolved.policy.adapter == full.policy.adapter.model_copy(
        update={"rank": resolved.policy.adapter.rank, "alpha": resolved.policy.adapter.alpha}
    )
    assert resolved.policy.dtype == ("float32" if full.policy.adapter.kind == "none" else full.policy.dtype)
    if isinstance(full.policy.sampling, DiffusionSampling):
        assert resolved.policy.sampling.kernel == full.policy.sampling.kernel
    presets = [{name: part.preset for name, part in each.objective.items()} for each in (resolved, full)]
    assert presets[0] == presets[1]
    assert any((tmp_path / "checkpoints/step_000002/policy").rglob("*.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_for_a_real_model_names_a_model_with_a_twin_and_its_source(name: str):
    assert load_recipe(name).policy.model in HUB
    text = (RECIPES / "models" / f"{name}.yaml").read_text()
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert "arXiv" in comment and "Estimates" in comment


def test_rewards_of_recipes_are_offered_by_the_project():
    project = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text())["project"]
    offered = set(project["entry-points"]["unified_rl.rewards"])
    named = {reward.name for name in NAMES for reward in load_recipe(name).rewards if ":" not in reward.name}
    assert named <= offered


def test_every_known_model_has_a_twin():
    assert set(HUB.values()) == {*models.TWINS, *language.TWINS}


def test_what_is_shrunk_is_said_and_overrides_win():
    recipe, notes = tiny_recipe("flux_mix_grpo_hps", ["num_steps=3", "policy.adapter.rank=2"])
    assert recipe.num_steps == 3 and recipe.policy.adapter.rank == 2 and recipe.group_size == 4
    assert recipe.policy.sampling.noise_place == "window" and recipe.policy.sampling.noise_steps == 2
    assert recipe.evaluation.sampling == {"num_inference_steps": NUM_STEPS, "noise_level": 0.0}, "not 28 steps"
    assert recipe.policy.sampling.call["guidance_scale"] == 3.5 and recipe.policy.sampling.call["height"] == 32
    assert [reward.name for reward in recipe.rewards] == ["unified_rl.tiny.twin:brightness"]
    assert any("hps stood in for by brightness" in note for note in notes)
    assert any("black-forest-labs/FLUX.1-dev" in note for note in notes)


def test_what_ships_with_the_project_is_only_shortened():
    raw = {"policy": {"model": "quickstart/shapes_sd3"}, "rewards": [{"name": "shapes_strict"}], "num_steps": 60}
    small, notes = shrink(raw, RECIPES)
    assert small["rewards"] == raw["rewards"] and small["policy"] == raw["policy"] and small["num_steps"] == 2
    assert len(notes) == 1 and raw["num_steps"] == 60, "the recipe that was read stays as it is"


def test_pictures_of_a_dataset_are_shrunk_and_its_other_columns_kept():
    recipe, notes = tiny_recipe("flux_kontext_edit", [])
    rows, full = load_rows(recipe.data.prompts, "data.prompts"), train_instructions()
    assert len(rows) == 8 and any("data.prompts" in note for note in notes)
    assert rows[0]["images"][0].open().size == (32, 32) and full[0]["image"].size == (512, 512)
    assert [(row["prompt"], row["edit"]) for row in rows] == [(row["prompt"], row["edit"]) for row in full[:8]]


def test_heavy_rewards_are_stood_in_for_with_their_summed_weight():
    model = {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
    stand_in = "unified_rl.tiny.twin:brightness"
    raw = {"policy": model, "rewards": [{"name": "pick_score", "weight": 2.0}, {"name": "hps"}]}
    assert shrink(raw, RECIPES)[0]["rewards"] == [{"name": stand_in, "weight": 3.0}]
    light = [{"name": "compressibility", "weight": 2.0}, {"name": "mine.py:score"}]
    small = shrink({"policy": model, "rewards": light}, RECIPES)[0]
    assert small["rewards"] == [*light, {"name": stand_in, "weight": 1.0}]


def test_texts_are_shortened_and_traces_fit():
    small, _ = tiny_recipe("janus_pro_t2i_r1", [])
    assert small.policy.sampling.think.max_new_tokens == 8 and small.policy.sampling.guidance_scale == 5.0
    small, _ = tiny_recipe("qwen25_r1_cold_start", [])
    assert small.policy.sampling.max_new_tokens == 256 and small.policy.sampling.max_prompt_tokens is None
    assert small.group_size == 1 and [reward.shown_name for reward in small.rewards] == ["think_format", "letters"]


def test_a_model_without_a_twin_is_refused():
    with pytest.raises(RecipeError, match=r"no twin of black-forest-labs/FLUX.2-dev is known.*did you mean"):
        shrink({"policy": {"model": "black-forest-labs/FLUX.2-dev"}}, RECIPES)


def test_brightness_of_pictures_and_videos():
    white, black = Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), "black")
    assert brightness(["p", "q"], [white, [white, black]]) == [1.0, 0.5]


def test_letters_of_texts():
    assert letters(["p", "q", "r"], ["ab", "a1 .", ""]) == [1.0, 0.25, 0.0]

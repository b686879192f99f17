"""Recipes of image-token policies: family, segments, and what is trained of them, before a model is loaded."""

import json
from pathlib import Path

import pytest

from unified_rl.errors import RecipeError
from unified_rl.planning.footprint import estimate
from unified_rl.recipe.checks import check_recipe
from unified_rl.recipe.explain import explain, plan
from unified_rl.recipe.file import load_recipe, parse_recipe
from unified_rl.recipe.schema import Recipe


def recipe(
    folder: Path, *, sampling: dict | None = None, exam: dict | None = None, objective: dict | None = None, **config
) -> Recipe:
    described = {"model_type": "janus", "vision_config": {"num_image_tokens": 16}, **config}
    (folder / "config.json").write_text(json.dumps(described))
    raw = {
        "policy": {"model": str(folder), "sampling": sampling or {}},
        "evaluation": {"sampling": exam or {}},
        "data": {"prompts": "unified_rl.worlds.shapes:train_drawing"},
        "rewards": [{"name": "shapes_strict"}],
        "objective": objective or {"preset": "dr_grpo"},
    }
    return parse_recipe(raw, folder)


@pytest.mark.parametrize("kind", ["janus", "emu3"])
def test_the_family_is_found_from_the_model(tmp_path: Path, kind: str):
    found = recipe(tmp_path, model_type=kind)
    assert found.policy.family == "image_tokens" and found.policy.segments == ("image",)
    check_recipe(found)


def test_other_transformers_models_stay_language_models(tmp_path: Path):
    assert recipe(tmp_path, model_type="llama").policy.family == "causal_lm"


def test_a_broken_config_is_said(tmp_path: Path):
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(RecipeError, match=r"policy\.model: .*config\.json"):
        parse_recipe({"policy": {"model": str(tmp_path)}}, tmp_path)


def test_steps_are_counted_for_the_segments_that_are_trained(tmp_path: Path):
    think = {"think": {"max_new_tokens": 10}}
    assert plan(recipe(tmp_path)).steps_trained == 16
    both = recipe(tmp_path, sampling=think)
    assert both.policy.segments == ("text", "image")
    assert plan(both).steps_trained == 26 and plan(both).windows_per_update == 16
    drawing = recipe(tmp_path, sampling=think, objective={"image": {"preset": "dr_grpo"}})
    check_recipe(drawing)
    assert plan(drawing).steps_trained == 16 and plan(drawing).windows_per_update == 8
    assert not drawing.trains("text") and "sampled, not trained" in explain(drawing)


def test_emu3s_steps_follow_from_the_asked_area(tmp_path: Path):
    sampling = {"processor": {"ratio": "3:2", "image_area": 384}}
    assert plan(recipe(tmp_path, model_type="emu3", sampling=sampling)).steps_trained == 6
    assert plan(recipe(tmp_path, model_type="emu3")).steps_trained == 90 * 90


def test_a_text_segment_without_thinking_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"objective\.text: image_tokens policies have no such segment"):
        check_recipe(recipe(tmp_path, objective={"text": {}, "image": {}}))


def test_decoders_are_found_beside_the_recipe_and_checked(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def decode(codes): ...")
    mine = {"decoder": "mine.py:decode"}
    found = recipe(tmp_path, sampling=mine, exam=mine)
    decoders = [found.policy.sampling.model_dump()["decoder"], found.evaluation.sampling["decoder"]]
    assert decoders == [f"{tmp_path}/mine.py:decode"] * 2
    check_recipe(found)
    wrong = {"decoder": "mine.py:decod"}
    for settings, where in (({"sampling": wrong}, "policy"), ({"exam": wrong}, "evaluation")):
        with pytest.raises(RecipeError, match=rf"^{where}\.sampling\.decoder: .*decode"):
            check_recipe(recipe(tmp_path, **settings))


def test_rules_for_tokens_hold_for_image_tokens(tmp_path: Path):
    with pytest.raises(RecipeError, match="tokens are trained together"):
        recipe(tmp_path, objective={"train_steps": 4})


def test_shipped_recipes_of_image_tokens_are_explained():
    """With the weights that ship: memory is estimated, guided rows twice."""
    guided = load_recipe("quickstart_image_tokens")
    assert "activations" in explain(guided)
    plain = load_recipe("quickstart_image_tokens", ["policy.sampling.guidance_scale=1"])
    sizes = [estimate(each) for each in (guided, plain)]
    assert sizes[0] is not None and sizes[1] is not None
    assert sizes[0].activations == 2 * (sizes[1].activations or 0) > 0


def test_chameleon_draws_where_it_is_told_to_with_a_decoder(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def decode(codes):\n    return []\n")
    vq = {"resolution": 64, "channel_multiplier": [1, 2, 2]}
    assert recipe(tmp_path, model_type="chameleon", vq_config=vq).policy.family == "causal_lm"
    raw = {"policy": {"model": str(tmp_path), "family": "image_tokens", "sampling": {"decoder": "mine.py:decode"}}}
    raw |= {"data": {"prompts": "unified_rl.worlds.shapes:train_drawing"}, "rewards": [{"name": "shapes_strict"}]}
    drawing = parse_recipe({**raw, "objective": {"preset": "dr_grpo"}}, tmp_path)
    assert drawing.policy.sampling.decoder == f"{tmp_path}/mine.py:decode" and plan(drawing).steps_trained == 256
    check_recipe(drawing)
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(RecipeError, match=r"policy\.sampling\.decoder: .*mine\.py.*decode"):
        check_recipe(drawing)

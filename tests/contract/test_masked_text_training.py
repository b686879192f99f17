"""Text denoisers from their folder: found, loaded, trained; a repository's own code runs only where it is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_masked_text import built, tokenizer
from transformers import dynamic_module_utils

from unified_rl.errors import RecipeError
from unified_rl.policies import build_policy
from unified_rl.recipe.checks import check_recipe
from unified_rl.recipe.explain import explain, plan
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.schema import Recipe
from unified_rl.train import train

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForMaskedLM

Path("RAN").touch()

class OwnConfig(BertConfig):
    model_type = "llada2_moe"

class OwnModel(BertForMaskedLM):
    config_class = OwnConfig
"""


REWARD = """
def only_a(prompts, completions, **columns):
    return [text.split().count("a") / 4 for text in completions]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built("masked").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("b c d\na a\n", encoding="utf-8")
    return tmp_path


def recipe_of(
    folder: Path,
    *,
    sampling: dict | None = None,
    objective: dict | None = None,
    engine: dict | None = None,
    **policy: Any,
) -> Recipe:
    blocks = {"block_length": 4, "num_inference_steps": 2} if policy.get("family") != "causal_lm" else {}
    sampling = {"max_new_tokens": 4, **blocks, **(sampling or {})}
    raw = {
        "num_steps": 10, "group_size": 8, "prompts_per_step": 2,
        "policy": {"model": str(folder / "model"), "sampling": sampling, **policy},
        "data": {"prompts": str(folder / "prompts.txt"), "evaluation": None},
        "rewards": [{"name": f"{folder}/reward.py:only_a"}],
        "objective": objective or {"preset": "dr_grpo"},
        "optimizer": {"lr": 0.02}, "engine": {"micro_batch": 16, "threads": 1, **(engine or {})},
    }  # fmt: skip
    return parse_recipe(raw, folder)


def test_a_masked_language_model_is_found_and_learns(folder: Path):
    recipe = recipe_of(folder)
    assert recipe.policy.family == "masked_text" and recipe.policy.segments == ("text",)
    check_recipe(recipe)
    assert plan(recipe).steps_trained == plan(recipe).windows_per_update == 4 and "masked_text" in explain(recipe)
    assert train(recipe, folder / "run", resume="never") == 0
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["replay_gap"] <= 1e-5 and row["grad_norm"] > 0 for row in rows)
    assert sum(row["reward"] for row in rows[-3:]) / 3 > sum(row["reward"] for row in rows[:3]) / 3 + 0.2


def test_presets_and_objectives_that_fit(folder: Path):
    recipe = recipe_of(folder, objective={"preset": "uni_grpo"})
    assert recipe.policy.sampling.estimator == "random_mask" and plan(recipe).steps_trained == 2
    for objective, message in (
        ({"ratio": "sequence", "aggregation": "sequence_mean"}, "needs all steps in one forward"),
        ({"advantage": "gae"}, "gae has no critic for masked_text"),
        ({"overlong": "penalty"}, "use mask"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe_of(folder, objective=objective)
    with pytest.raises(RecipeError, match=r"engine\.zero_stage: 3 .*; use 2"):
        recipe_of(folder, engine={"zero_stage": 3})
    with pytest.raises(RecipeError, match=r"policy\.sampling\.mask_ratio"):
        recipe_of(folder, sampling={"mask_ratio": [0.9, 0.1]})


def test_a_repository_s_code_runs_only_where_it_is_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    file = folder / "model" / "config.json"
    config = json.loads(file.read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    file.write_text(json.dumps({**config, "model_type": "llada2_moe", "architectures": ["OwnModel"], "auto_map": own}))
    (folder / "model" / "own.py").write_text(CODE.replace("RAN", str(folder / "ran")), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"policy\.trust_remote_code: .* brings its own code \(own\.OwnModel\)"):
        build_policy(recipe_of(folder), torch.device("cpu"))
    assert not (folder / "ran").exists()
    policy = build_policy(recipe_of(folder, trust_remote_code=True), torch.device("cpu"))
    assert type(policy.module).__name__ == "OwnModel" and (folder / "ran").exists()
    elsewhere = {name: f"someone/else--{where}" for name, where in own.items()}
    file.write_text(json.dumps({**config, "model_type": "llada2_moe", "auto_map": elsewhere}))
    with pytest.raises(RecipeError, match=r"in another repository \(someone/else--own\.OwnConfig\)"):
        build_policy(recipe_of(folder, trust_remote_code=True), torch.device("cpu"))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"family": "masked_text", "revision": "main"}, r"policy\.revision: .* a commit's 40 digits"),
        (
            {
                "family": "causal_lm",
            },
            r"policy\.trust_remote_code: causal_lm models never run code",
        ),
    ],
)
def test_code_from_the_hub_is_pinned(folder: Path, policy: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        recipe_of(folder, **{"model": "someone/denoiser", "trust_remote_code": True, **policy})


def test_a_model_that_predicts_the_next_token_is_refused(folder: Path):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(RecipeError, match="masked_text, but llama is no masked language model; try causal_lm"):
        build_policy(recipe_of(folder, family="masked_text"), torch.device("cpu"))

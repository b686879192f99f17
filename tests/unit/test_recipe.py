"""Recipes: what is filled in, what is refused, and in which words."""

import json
import struct
from pathlib import Path

import pytest
import yaml

from unified_rl.errors import RecipeError
from unified_rl.planning.weights import measure
from unified_rl.recipe.checks import check_recipe
from unified_rl.recipe.explain import explain, listing, plan
from unified_rl.recipe.file import RECIPES, dump_recipe, find_recipe, load_recipe, parse_recipe
from unified_rl.recipe.presets import PRESETS


def write_tensors(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file with zeros in float32."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(end))


@pytest.fixture
def raw(tmp_path) -> dict:
    """A valid recipe with a pipeline of 1,600 parameters, 1,000 of them in the transformer."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    shapes = {"block.attn.to_q.weight": [10, 20], "block.attn.to_out.0.weight": [20, 10], "block.ff.weight": [30, 20]}
    write_tensors(tmp_path / "model/transformer/diffusion_pytorch_model.safetensors", shapes)
    write_tensors(tmp_path / "model/transformer/diffusion_pytorch_model.fp16.safetensors", shapes)
    write_tensors(tmp_path / "model/text_encoder/model.safetensors", {"embedding": [30, 20]})
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\n")
    (tmp_path / "exam.jsonl").write_text('{"prompt": "i"}\n')
    return {
        "policy": {"model": "model"},
        "data": {"prompts": "prompts.txt", "evaluation": "exam.jsonl"},
        "rewards": [{"name": "shapes_graded"}],
        "objective": {"preset": "flow_grpo"},
    }


def write(folder: Path, raw: dict, name: str = "mine") -> str:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / f"{name}.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    raw = yaml.safe_load(path.read_text())
    if not (path.parent / raw["policy"]["model"]).exists():  # the checkpoint may still be in training
        raw["policy"].setdefault("family", "causal_lm" if "vlm" in raw["policy"]["model"] else "diffusion")
    assert parse_recipe(raw, path.parent).num_steps >= 1


def test_names_of_shipped_recipes_are_enough():
    assert find_recipe("quickstart") == RECIPES / "quickstart.yaml"


def test_preset_fills_in_and_the_recipe_wins(raw, tmp_path):
    raw["objective"] = {"preset": "flow_grpo", "clip_low": 0.5, "kl": {"coef": 0.0}}
    objective = parse_recipe(raw, tmp_path).objective_for("image")
    assert objective.advantage == "global_std" and objective.clip_high == 1e-4
    assert objective.clip_low == 0.5
    assert objective.kl.coef == 0.0 and objective.kl.estimator == "gaussian"


def test_paths_are_relative_to_the_recipe_and_the_family_is_found(raw, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    recipe = load_recipe(write(tmp_path, raw))
    assert recipe.policy.model == str(tmp_path / "model") and recipe.policy.family == "diffusion"
    assert recipe.data.prompts == str(tmp_path / "prompts.txt")


def test_overrides_reach_blocks_and_lists(raw, tmp_path):
    overrides = ["optimizer.lr=1e-4", "rewards.0.weight=2", "policy.sampling.call={height: 64}", "engine.zero_stage=2"]
    recipe = load_recipe(write(tmp_path, raw), overrides)
    assert recipe.optimizer.lr == 1e-4 and recipe.rewards[0].weight == 2
    assert recipe.policy.sampling.call == {"height": 64} and recipe.engine.zero_stage == 2


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_dump_reads_back_equal(raw, tmp_path, preset):
    raw["objective"] = (
        {"preset": preset, "advantage_clip": 3.0} if preset else {"image": {"loss": "cispo", "clip_high": 5.0}}
    )
    if preset in ("gspo", "gspo_token", "luspo", "vespo", "trl_rloo", "drpo", "dpo"):  # for tokens
        (tmp_path / "model/model_index.json").rename(tmp_path / "model/config.json")
    if preset in ("bicot_grpo", "uni_grpo"):
        raw["policy"] = {"model": "model", "family": "image_tokens" if preset == "bicot_grpo" else "masked_diffusion"}
    recipe = parse_recipe(raw, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == recipe


def test_objectives_that_a_family_cannot_train_are_refused(raw, tmp_path):
    for objective, message in (
        ({"preset": "gspo"}, "objective.all.ratio: sequence needs all steps in one forward; use token"),
        ({"ratio": "sequence"}, "objective.all.ratio: sequence"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe({**raw, "objective": objective}, tmp_path)
    (tmp_path / "model/model_index.json").rename(tmp_path / "model/config.json")
    for objective, message in (
        ({"train_steps": 2}, "objective.all.train_steps: for denoising steps"),
        ({"kl": {"coef": 0.1, "estimator": "gaussian"}}, "objective.all.kl: gaussian needs Gaussian steps"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe({**raw, "objective": objective}, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_stepz=3", "num_stepz: unknown key; did you mean 'num_steps'?"),
        ("optimizer.lrr=3", "optimizer.lrr: unknown key; did you mean 'lr'?"),
        (
            "policy.sampling.call={num_inference_steps: 4}",
            "policy.sampling.call: num_inference_steps is not given here; it is a key of sampling itself",
        ),
        ("policy.sampling={kernel: cps, noise_level: 1.2}", "policy.sampling.noise_level: cps takes a share"),
        ("policy.sampling.noise_levl=1", "policy.sampling.noise_levl: unknown key; did you mean 'noise_level'?"),
        (
            "evaluation.sampling.noise_levl=0",
            "evaluation.sampling.noise_levl: unknown key; did you mean 'noise_level'?",
        ),
        ("rewards.0.wieght=1", "rewards.0.wieght: unknown key; did you mean 'weight'?"),
        ("objective.preset=flow_gro", "objective.preset: no preset 'flow_gro'; did you mean 'flow_grpo'?"),
        ("objective.preset=[grpo]", "objective.preset: no preset ['grpo']; did you mean 'grpo'?"),
        ("evaluation.sampling={noise_level: x}", "evaluation.sampling.noise_level: must be a valid number"),
        ("policy.sampling.noise_level=-1", "policy.sampling.noise_level: must be greater than or equal to 0 (got -1)"),
        ("num_steps=many", "num_steps: must be a valid integer"),
        ("optimizer=fast", "optimizer: must be a block of keys (got 'fast')"),
        ("optimizer.lr=.nan", "optimizer.lr: must be a finite number (got nan)"),
        ("objective.clip_low=-1", "objective.clip_low: must be greater than or equal to 0 (got -1)"),
        ("objective=5", "objective: a mapping of keys, or of one block a segment, is needed"),
        ("rewards=5", "rewards: must be a valid list (got 5)"),
        ("rewards.0.weight=0", "rewards: every one has weight 0"),
        ("seed=2026-01-01", "seed: must be a valid integer"),
        ("policy.family=[a]", "policy.family: must be 'diffusion', 'causal_lm'"),
        ("group_size=1", "group_size: 1 leaves global_std"),
        ("minibatches=3", "minibatches: 3 does not divide the 128 samples"),
        ("rewards.7.name=a", "rewards.7.name: no such place in the recipe to override"),
        ("lonely", "lonely: an override is written a.b=value"),
        ("policy.model=./nope", "policy.model: "),
        ("policy.model=some/hub-name", "policy.model: no folder some/hub-name; for a hub name, say policy.family"),
    ],
)
def test_errors_say_where_and_what(raw, tmp_path, override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, raw), [override])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "seed: given twice"),
        ("policy:\n  model: a\n  model: b\n", "model: given twice"),
        ("- a\n", "a recipe is a mapping"),
        ("a: [\n", "not readable as YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not readable as YAML"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="quikstart: no such recipe file; did you mean 'quickstart'"):
        find_recipe("quikstart")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.sampling.noise_level=0", "policy.sampling.noise_level: 0 makes every step deterministic"),
        ("objective.train_steps=11", "objective.train_steps: 11 is more than policy.sampling.num_inference_steps = 10"),
        ("objective={text: {preset: grpo}}", "objective.text: diffusion policies have no such segment here"),
        ("policy.dtype=bfloat16", "policy.dtype: fine-tuning bfloat16 weights in full needs"),
        ("policy.train=['(']", "policy.train: '(' is no regular expression"),
        ("engine={backend: local, zero_stage: 2}", "engine.zero_stage: 2 needs deepspeed"),
        ("policy={model: /nope/model, family: diffusion}", "policy.model: no folder /nope/model"),
        ("data.prompts=nope.jsonl", "data.prompts: no file nope.jsonl"),
        ("rewards.0.name=shapes_grade", "rewards.0.name: no reward 'shapes_grade'; did you mean 'shapes_graded'?"),
    ],
)
def test_checks_across_blocks(raw, tmp_path, override, message):
    recipe = load_recipe(write(tmp_path, raw), [override])
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe)
    assert str(caught.value).startswith(message)


def test_warnings(raw, tmp_path):
    overrides = ["engine.micro_batch=48", "epochs=7", "prompts_per_step=16"]
    warnings = "\n".join(check_recipe(load_recipe(write(tmp_path, raw), overrides)))
    assert "data.prompts: 8 prompts for prompts_per_step = 16" in warnings
    assert "data.evaluation: only 1 prompts for num_prompts = 128" in warnings
    assert "does not divide the 256 samples of an update; its last window has 16" in warnings
    assert "num_steps: 60 is no multiple of the 7 updates of a rollout" in warnings


def test_plan_counts(raw, tmp_path):
    overrides = ["epochs=2", "minibatches=2", "num_steps=61", "objective.train_steps=4", "engine.micro_batch=24"]
    counts = plan(load_recipe(write(tmp_path, raw), overrides))
    assert counts.samples_per_rollout == 128 and counts.samples_per_update == 64
    assert counts.updates_per_rollout == 4 and counts.num_rollouts == 16 and counts.total_samples == 16 * 128
    assert counts.windows_per_update == 3 * 4  # 24 + 24 + 16 rows, 4 denoising steps each
    assert counts.num_evaluations == 1 + 6 + 1  # base, 10 to 60, the last step


@pytest.mark.parametrize(
    ("policy", "trained", "weights", "reference"),
    [
        ({}, 1000, 1600 * 4, 1000 * 4),
        ({"train": ["to_q", "to_out"]}, 400, 1600 * 4, 1000 * 4),
        ({"adapter": {"kind": "lora", "rank": 2}}, 2 * 30 + 2 * 30, 1600 * 4 + 120 * 4, 0),
        ({"adapter": {"kind": "lora", "rank": 2, "targets": ["ff"]}}, 2 * 50, 1600 * 4 + 100 * 4, 0),
        ({"adapter": {"kind": "lora", "rank": 2}, "dtype": "bfloat16"}, 120, 1600 * 2 + 120 * 4, 0),
    ],
)
def test_memory_estimate(raw, tmp_path, policy, trained, weights, reference):
    raw["policy"] |= policy
    sizes = measure(parse_recipe(raw, tmp_path).policy, with_reference=True)
    assert sizes is not None and sizes.components == {"text_encoder": 600, "transformer": 1000}
    assert sizes.trained == trained and sizes.weight_bytes == weights and sizes.reference_bytes == reference
    assert sizes.gradient_bytes == 4 * trained and sizes.optimizer_bytes == 8 * trained


def test_vision_tower_is_not_counted_as_trained(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"visual.q_proj.weight": [5, 5], "model.q_proj.weight": [10, 10]})
    (tmp_path / "config.json").write_text("{}")
    raw = {"policy": {"model": str(tmp_path)}, "data": {"prompts": "a:b"}, "rewards": [{"name": "answer"}]}
    assert _trained(raw) == 100
    assert _trained({**raw, "policy": {**raw["policy"], "adapter": {"kind": "lora", "rank": 1}}}) == 20
    assert _trained({**raw, "policy": {**raw["policy"], "train": ["visual"]}}) == 25


def _trained(raw: dict) -> int:
    sizes = measure(parse_recipe(raw, Path.cwd()).policy, with_reference=False)
    assert sizes is not None
    return sizes.trained


def test_damaged_weights_are_the_users_error(raw, tmp_path):
    (tmp_path / "model/transformer/diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(
        RecipeError, match=r"policy\.model: .*diffusion_pytorch_model\.safetensors is no safetensors file"
    ):
        explain(parse_recipe(raw, tmp_path))


def test_explain_spells_out_the_run(raw, tmp_path):
    raw["rewards"] += [{"name": "shapes_strict", "weight": 0.0, "arguments": {"api_key": "hidden"}}]
    told = explain(parse_recipe(raw, tmp_path))
    for part in (
        "flow_grpo: Liu et al. 2025, Flow-GRPO, arXiv 2505.05470",
        "no clip acts",
        "gaussian from base, in the loss, coef 0.004",
        "reference copy",
        "activations are not counted",
        "measured, not trained on",
        "8 prompts x 16 = 128 samples",
    ):
        assert part in told
    assert "hidden" not in told and "savings" not in told
    raw["policy"] |= {"attention": "native", "memory": {"vae_slicing": True}, "sampling": {"noise_level": 0.0}}
    told = explain(parse_recipe({**raw, "objective": {"preset": "diffusion_nft"}}, tmp_path))
    assert "vae_slicing: true, attention: native" in told and "none: every step follows the ODE" in told
    assert "the first of 2 updates" in explain(parse_recipe({**raw, "epochs": 2}, tmp_path))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("policies", "causal_lm"),
        ("rewards", "shapes_strict"),
        ("objectives", "kl.coef"),
        ("presets", "arXiv 2402.03300"),
        ("recipes", "quickstart"),
    ],
)
def test_listing(kind, line):
    assert line in listing(kind)


def test_recipes_are_listed_by_whole_sentences():
    assert all(line.endswith(".") and " " in line for line in listing("recipes").splitlines())

"""The plan of a run on several GPUs, by hand; benchmarks/zero_memory.py compares it with what processes hold."""

import json
import shutil
from pathlib import Path

import pytest

from unified_rl.cli import main
from unified_rl.errors import RecipeError
from unified_rl.planning.configs import shapes_from_configs
from unified_rl.planning.footprint import Pipeline, window_activations
from unified_rl.planning.planner import GIB, Model, model_of, need, stages_of, table
from unified_rl.planning.weights import measure
from unified_rl.recipe.file import load_recipe

MODEL = Model(trained=100, module=300, beside=1000, frozen_bytes=2, trained_bytes=4)
"""An adapter of 100 parameters on a frozen bfloat16 module of 200, beside encoders of 1000."""


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "traffic"),
    [
        # Weights: 2 x 1000 beside, 4 x 100 + 2 x 200 of the module. Traffic: times 3/4, for 2 windows.
        (0, 2800, 400, 800, 0.75 * 800),
        (1, 2800, 400, 1200 / 4, 0.75 * (800 + 400)),
        (2, 2800, 100, 1200 / 4, 0.75 * (800 * 2 + 400)),
        (3, 2000 + 200, 100, 1200 / 4, 0.75 * (400 + 1600) * 2),
    ],
)
def test_by_hand(stage, weights, gradients, optimizer, traffic):
    found = need(MODEL, stage, 4, 2)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert found.traffic == traffic and found.total == weights + gradients + optimizer


@pytest.mark.parametrize(
    ("stage", "offload", "weights", "optimizer", "host"),
    [
        (0, "optimizer", 2800, 800, 0),
        (2, "optimizer", 2800, 0, 300),
        (2, "all", 2800, 300, 0),
        (3, "optimizer", 2200, 0, 300),
        (3, "all", 2000, 0, 300 + 200),  # 4 x 100 + 2 x 200 bytes of the module by 4
    ],
)
def test_what_is_offloaded_by_hand(stage, offload, weights, optimizer, host):
    found = need(MODEL, stage, 4, 2, offload)
    assert (found.weights, found.optimizer, found.host) == (weights, optimizer, host)


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        ([], (0, 1, 2, 3)),
        (["engine.offload=optimizer", "engine.zero_stage=1"], (1, 2, 3)),
        (["engine.offload=all", "engine.zero_stage=3"], (3,)),
        (["policy.dtype=bfloat16"], (2, 3)),
        (["policy.dtype=bfloat16", "policy.adapter.kind=lora"], (0, 1, 2, 3)),
    ],
)
def test_a_stage_that_other_keys_rule_out_is_not_advised(overrides, stages):
    assert stages_of(load_recipe("quickstart_vlm", overrides)) == stages
    told = table(MODEL, num_gpus=4, gpu_memory=80, num_windows=1, stages=stages)
    assert told.count("ruled out") == 4 - len(stages) and f"take engine.zero_stage: {stages[0]}" in told


def test_the_smallest_stage_that_fits_is_named():
    model = Model(trained=GIB, module=GIB, beside=0, frozen_bytes=2, trained_bytes=2)
    # Stage 0: 2 + 4 + 8 = 14; stage 1: 2 + 4 + 3; stage 2: 2 + 1 + 3; stage 3: 0.5 + 1 + 3 GiB.
    for memory, advice in ((18, "engine.zero_stage: 0"), (12, "engine.zero_stage: 1"), (6, "engine.zero_stage: 3")):
        assert advice in table(model, num_gpus=4, gpu_memory=memory, num_windows=1)
    assert "none fits" in table(model, num_gpus=4, gpu_memory=5, num_windows=1)


def test_validate_prints_it(capsys):
    assert main(["validate", "quickstart_vlm", "--gpus", "8", "--gpu-memory", "1"]) == 0
    assert "plan for 8 GPUs of 1 GiB" in capsys.readouterr().out
    words = ["engine.offload=all", "engine.zero_stage=3"]
    assert main(["validate", "quickstart_vlm", *words, "--gpus", "2", "--gpu-memory", "1"]) == 0
    assert "in main memory" in capsys.readouterr().out
    assert main(["validate", "quickstart_vlm", *words, "engine.offload_folder=/fast", "--gpus", "2"]) == 0
    assert "in /fast" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "num_buffers"), [("quickstart", 16 * 192), ("quickstart_vlm", 0)])
def test_configurations_tell_what_the_files_hold(name, num_buffers, tmp_path):
    recipe = load_recipe(name)
    model, by_headers = recipe.policy.model, measure(recipe.policy, with_reference=False)
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    bare = recipe.policy.model_copy(update={"model": str(tmp_path / "bare")})
    assert measure(bare, with_reference=False) is None
    found = model_of(recipe.model_copy(update={"policy": bare}))
    # The position embedding of SD3 is stored, but is a buffer and not trained.
    assert found.trained + num_buffers == by_headers.trained
    assert found.module + found.beside + num_buffers == sum(by_headers.components.values())


def test_a_model_that_cannot_be_had_is_named(tmp_path):
    policy = load_recipe("quickstart_vlm").policy
    with pytest.raises(RecipeError, match="the configuration of no/such-model cannot be had"):
        shapes_from_configs(policy.model_copy(update={"model": "no/such-model"}))
    with pytest.raises(RecipeError, match=r"has no config\.json"):
        shapes_from_configs(policy.model_copy(update={"model": str(tmp_path)}))
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    with pytest.raises(RecipeError, match="is of class NoSuchModel, which the installed transformers does not have"):
        shapes_from_configs(policy.model_copy(update={"model": str(tmp_path)}))


def test_activations_count_where_they_are_known():
    model = Model(trained=GIB, module=GIB, beside=0, frozen_bytes=2, trained_bytes=2)  # stage 2 wants 6 GiB
    plan = table(model, num_gpus=4, gpu_memory=10, num_windows=1, activations=3 * GIB)
    assert "activations of a window 3.00 on top" in plan and "engine.zero_stage: 2" in plan
    assert "engine.zero_stage: 3" in table(model, num_gpus=4, gpu_memory=9, num_windows=1, activations=3 * GIB)


@pytest.mark.parametrize(
    ("vae", "latent", "frames"),
    [
        ({"temperal_downsample": [False, True, True]}, (60, 104), 9),  # Wan: 480 x 832, 33 frames
        ({"scale_factor_spatial": 16, "scale_factor_temporal": 4}, (30, 52), 9),
        ({"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}, (15, 26), 5),
        ({"block_out_channels": [1, 2, 3, 4], "temporal_compression_ratio": 4}, (60, 104), 9),
        ({"encoder_block_out_channels": [1] * 6}, (15, 26), 9),
    ],
)
def test_latents_follow_the_compression_of_the_vae(vae, latent, frames, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae))
    policy = load_recipe("wan21_t2v_dance_grpo").policy
    pipeline = Pipeline(tmp_path, policy, policy.sampling)
    assert (pipeline.latent, pipeline.frames) == (latent, frames)


def test_a_groups_prompt_is_counted_once(tmp_path):
    recipe = load_recipe("quickstart_vlm", ["engine.micro_batch=64", "policy.sampling.max_prompt_tokens=100"])
    found = window_activations(recipe, Path(recipe.policy.model))
    # 4 prompts of 100 tokens and 64 texts of 8, 4 layers of width 128 that keep 10 + 4 x 384 / 128; the texts' logits.
    assert found == (4 * 100 + 64 * 8) * 4 * 128 * 22 * 4 + 64 * 8 * 111 * 12
    alone = recipe.model_copy(update={"group_size": 1})
    assert window_activations(alone, Path(recipe.policy.model)) == found + 60 * 100 * 4 * 128 * 22 * 4

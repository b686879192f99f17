"""DeepSpeed's configuration: the recipe's keys, and the user's JSON over them."""

import json
import re
from pathlib import Path

import pytest

from unified_rl.engine.deepspeed_config import build_config, raw_config
from unified_rl.errors import RecipeError
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.schema import EngineBlock


def test_the_users_json_is_merged_key_by_key(tmp_path):
    own = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    (tmp_path / "own.json").write_text(json.dumps(own))
    for given in (own, str(tmp_path / "own.json")):
        block = EngineBlock(zero_stage=2, deepspeed=given)
        config = build_config(block, dtype="bfloat16", max_grad_norm=0.5, on_gpu=False)
        assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 7}
        assert config["wall_clock_breakdown"] is True and config["gradient_clipping"] == 0.5
        assert config["bf16"] == {"enabled": True} and config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "engine.deepspeed.optimizer: is set by optimizer; leave it out"),
        ({"fp16": {"enabled": True}}, "engine.deepspeed.fp16.enabled: is set by policy.dtype"),
        ({"zero_optimization": {"stage": 3}}, "engine.deepspeed.zero_optimization.stage: is set by engine.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "is set by engine.offload and engine.off"),
        ("no/such.json", "engine.deepspeed: no/such.json is not readable as JSON"),
    ],
)
def test_what_the_recipe_says_elsewhere_is_refused(raw, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        raw_config(EngineBlock(deepspeed=raw))


@pytest.mark.parametrize(("offload", "stage", "needed"), [("optimizer", 0, "1, 2 or 3"), ("all", 2, "3")])
def test_offloading_needs_its_stage(offload, stage, needed):
    parse = {
        "policy": {"model": "toy", "family": "causal_lm"},
        "data": {"prompts": "toy:prompts"},
        "rewards": [{"name": "toy:reward"}],
    }
    with pytest.raises(RecipeError, match=f"engine.offload: {offload} needs zero_stage {needed}"):
        parse_recipe({**parse, "engine": {"offload": offload, "zero_stage": stage}}, Path())
    config = build_config(EngineBlock(offload="all", zero_stage=3), dtype="float32", max_grad_norm=1.0, on_gpu=False)
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bfloat16": {"enabled": True}}, "engine.deepspeed.bfloat16: is set by policy.dtype"),
        ({"torch_autocast": {"enabled": True}}, "engine.deepspeed.torch_autocast: is set by policy.dtype"),
        ({"amp": {"enabled": True}}, "engine.deepspeed.amp: is set by policy.dtype"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: is set by the trainer"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "ratio: is set by engine.offload (all"),
        ({"zero_optimization": {"zenflow": {}}}, "zero_optimization.zenflow: is set by engine.offload"),
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload: is set by engine.offload"),
        ({"zero_optimization": {"offload_param": None}}, "zero_optimization.offload_param: is not None but a block"),
        ({"zero_optimization": None}, "engine.deepspeed.zero_optimization: is not None but a block of keys"),
    ],
)
def test_other_spellings_do_not_get_past_the_recipe(raw, message):
    """DeepSpeed's older names, and nulls that would take out the recipe's own block."""
    with pytest.raises(RecipeError, match=re.escape(message)):
        raw_config(EngineBlock(deepspeed=raw))

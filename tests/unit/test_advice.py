"""Warnings about keys that do nothing, clip ranges of another family and stale samples; and none where all is well."""

from pathlib import Path
from typing import Any

import pytest

from unified_rl.recipe.advice import LOSS_KEYS, advice
from unified_rl.recipe.file import load_recipe, parse_recipe, shipped_recipes
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.presets import PRESETS


def told(folder: Path, objective: dict[str, Any], family: str = "causal_lm", **keys: Any) -> list[str]:
    raw = {
        "policy": {"model": "toy", "family": family},
        "data": {"prompts": "toy:prompts"},
        "rewards": [{"name": "toy:reward"}],
        "objective": objective,
        **keys,
    }
    return advice(parse_recipe(raw, folder))


IDLE: list[tuple[str, dict[str, Any], str, str]] = [
    ("causal_lm", {"preset": "rloo", "std_eps": 0.1}, "std_eps", "an advantage that divides by a std"),
    ("causal_lm", {"preset": "ppo", "population_std": True}, "population_std", "an advantage that divides by a std"),
    ("causal_lm", {"preset": "rwr", "advantage_clip": 3}, "advantage_clip", "an advantage that compares rewards"),
    ("causal_lm", {"prompt_buffer": 64}, "prompt_buffer", "advantage prompt_std"),
    ("causal_lm", {"prompt_min_count": 4}, "prompt_min_count", "advantage prompt_std"),
    ("causal_lm", {"preset": "best_of_n", "temperature": 0.1}, "temperature", "advantage exponential"),
    ("diffusion", {"preset": "awm", "subtract_mean": True}, "subtract_mean", "method sft"),
    ("causal_lm", {"beside_coef": 0.1}, "beside_coef", "beside"),
    ("diffusion", {"preset": "awm", "mix_coef": 0.5}, "mix_coef", "method nft"),
    ("diffusion", {"preset": "diffusion_nft", "error_weight": "t"}, "error_weight", "a method over denoising errors"),
    ("causal_lm", {"pair_coef": 3.0}, "pair_coef", "method dpo or dgpo"),
    ("diffusion", {"preset": "dgpo", "pair_form": "ipo"}, "pair_form", "method dpo"),
    ("causal_lm", {"preset": "sapo", "clip_low": 0.1}, "clip_low", "loss clip or guard"),
    ("causal_lm", {"preset": "rloo", "clip_high": 0.1}, "clip_high", "loss clip, guard or cispo"),
    ("causal_lm", {"penalty_range": 3.0}, "penalty_range", "loss drpo or spo"),
    ("diffusion", {"preset": "flow_grpo", "max_divergence": 1e-4}, "max_divergence", "loss dppo"),
    ("causal_lm", {"entropy_step": 0.1}, "entropy_step", "entropy_target"),
    ("causal_lm", {"overlong": "mask", "overlong_margin": 0.5}, "overlong_margin", "overlong: penalty"),
    ("diffusion", {"preset": "draft", "train_steps": 2}, "train_steps", "a method that trains steps or noise levels"),
    ("diffusion", {"preset": "awm", "aggregation": "constant"}, "aggregation", "a policy gradient, or sft on texts,"),
    ("causal_lm", {"kl": {"estimator": "k2"}}, "kl.estimator", "a kl.coef above 0"),
    ("causal_lm", {"kl": {"place": "reward"}}, "kl.place", "a kl.coef above 0"),
    ("causal_lm", {"kl": {"reference": "ema"}}, "kl.reference", "a kl.coef above 0"),
    ("causal_lm", {"preset": "grpo", "kl": {"gain_p": 1.0}}, "kl.gain_p", "kl.target"),
    ("causal_lm", {"preset": "grpo", "kl": {"gain_i": 1.0}}, "kl.gain_i", "kl.target"),
    ("causal_lm", {"correction": {"level": "sequence"}}, "correction.level", "a correction.mode"),
    ("causal_lm", {"correction": {"cap": 3.0}}, "correction.cap", "a correction.mode"),
    (
        "causal_lm",
        {"old_log_probs": "recompute", "correction": {"mode": "truncate", "floor": 0.5}},
        "correction.floor",
        "correction.mode mask",
    ),
    (
        "diffusion",
        {"reward_gradient": {"kind": "renoised"}},
        "reward_gradient.kind",
        "method reward_gradient",
    ),
    ("diffusion", {"reward_gradient": {"margin": 2.0}}, "reward_gradient.margin", "method reward_gradient"),
    (
        "diffusion",
        {"preset": "draft_lv", "reward_gradient": {"steps": [1, 4]}},
        "reward_gradient.steps",
        "last_steps or clean_prediction",
    ),
    (
        "diffusion",
        {"preset": "draft", "reward_gradient": {"copies": 4}},
        "reward_gradient.copies",
        "reward_gradient.kind renoised",
    ),
]


@pytest.mark.parametrize(("family", "objective", "key", "user"), IDLE, ids=lambda value: str(value)[:40])
def test_keys_without_an_effect_are_told(
    tmp_path: Path, family: str, objective: dict[str, Any], key: str, user: str
) -> None:
    assert told(tmp_path, objective, family) == [f"objective.{key}: has no effect, only {user} uses it"]


def test_every_key_that_only_some_use_has_a_case() -> None:
    """Those that are left are used by every objective, or refused where they have no effect."""
    known = {key for _, _, key, _ in IDLE}
    refused = {
        "dual_clip", "delta", "off_policy_mask", "entropy_coef", "entropy_target", "top_entropy", "stop_kl",
        "old_log_probs", "old_weights", "critic", "threshold_unit", "ratio", "loss",
    }  # fmt: skip
    always = {"preset", "advantage", "method", "beside", "overlong"}
    blocks = {key.partition(".")[0] for key in known if "." in key}
    assert {key for key in known if "." not in key} | refused | always | blocks == set(Objective.model_fields)


def test_what_a_preset_gives_is_not_the_user_s_doing(tmp_path: Path) -> None:
    assert told(tmp_path, {"preset": "ddpo", "advantage": "rloo"}) == []
    assert told(tmp_path, {"preset": "ddpo", "advantage": "rloo", "prompt_buffer": 8}) != []
    assert told(tmp_path, {"preset": "flow_grpo", "kl": {"coef": 0.0}}, "diffusion") == []
    assert told(tmp_path, {"preset": "refl", "reward_gradient": {"kind": "renoised"}}, "diffusion") == []


def test_a_loss_of_one_s_own_may_use_what_it_is_handed(tmp_path: Path) -> None:
    keys = dict.fromkeys(LOSS_KEYS, 0.3)
    assert told(tmp_path, {"loss": "package.module:function", **keys}) == []
    assert len(told(tmp_path, {"loss": "sapo", **keys})) == len(LOSS_KEYS)
    assert told(tmp_path, {"method": "package.module:function", "mix_coef": 0.3, "pair_coef": 3.0}) == []


@pytest.mark.parametrize(
    ("family", "objective", "message"),
    [
        ("diffusion", {"preset": "ppo"}, "clip_high: 0.2 of log-probs that are means over the latent dims never clips"),
        ("diffusion", {"preset": "dapo"}, "clip_high: 0.28 of log-probs that are means"),
        ("diffusion", {"preset": "spo"}, "penalty_range: 0.2 of log-probs that are means over the latent dims"),
        ("causal_lm", {"preset": "ddpo"}, "clip_low: 0.0001 cuts nearly every token"),
        ("masked_diffusion", {"preset": "ddpo"}, "clip_low: 0.0001 cuts nearly every token"),
        ("causal_lm", {"preset": "rloo"}, "loss: reinforce has no ratio, and 2 updates of a rollout make its"),
    ],
)
def test_what_only_hurts_from_the_second_update_on(
    tmp_path: Path, family: str, objective: dict[str, Any], message: str
) -> None:
    (line,) = told(tmp_path, objective, family, epochs=2)
    assert line.startswith(f"objective.{message}") and "; " in line
    assert told(tmp_path, objective, family) == []


def test_imitating_one_s_own_samples_whatever_they_are_is_told(tmp_path: Path) -> None:
    (line,) = told(tmp_path, {"preset": "sft"})
    assert line.startswith("objective.advantage: uniform imitates the policy's own samples")
    (tmp_path / "r.jsonl").write_text("")
    assert told(tmp_path, {"preset": "sft"}, data={"rollouts": str(tmp_path / "r.jsonl")}) == []


@pytest.mark.parametrize("preset", ["rwr", "best_of_n"])
def test_a_denoiser_that_imitates_its_sampler_is_told(tmp_path: Path, preset: str) -> None:
    (line,) = told(tmp_path, {"preset": preset}, "diffusion")
    assert line.startswith("objective.subtract_mean: a denoiser that imitates its own samples")
    assert told(tmp_path, {"preset": preset, "subtract_mean": True}, "diffusion") == []
    assert told(tmp_path, {"preset": preset}) == []
    (tmp_path / "r.jsonl").write_text("")
    assert told(tmp_path, {"preset": preset}, "diffusion", data={"rollouts": str(tmp_path / "r.jsonl")}) == []


def test_segments_are_named(tmp_path: Path) -> None:
    blocks = {"text": {"preset": "rloo", "std_eps": 0.1}, "image": {"preset": "grpo"}}
    assert told(tmp_path, blocks, "image_tokens") == [
        "objective.text.std_eps: has no effect, only an advantage that divides by a std uses it"
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_need_no_advice_where_they_belong(tmp_path: Path, preset: str) -> None:
    if preset == "sft":
        return  # belongs to recorded samples
    own = {"bicot_grpo": "image_tokens", "uni_grpo": "masked_diffusion"}
    denoising = preset in {"flow_grpo", "flow_grpo_fast", "mix_grpo", "grpo_guard", "flow_dppo", "dance_grpo", "ddpo"}
    denoising |= preset in {"diffusion_nft", "awm", "dgpo", "diffusion_dpo", "flow_grpo_code", "draft", "draft_lv"}
    denoising |= preset in {"alignprop", "refl"}
    family = own.get(preset, "diffusion" if denoising else "causal_lm")
    assert told(tmp_path, {"preset": preset}, family) == []


def test_shipped_recipes_need_none() -> None:
    found = {path.stem: advice(load_recipe(str(path))) for path in shipped_recipes()}
    assert len(found) > 20 and not any(found.values()), found

"""Thresholds in nats, divergences from a copy of the weights, and presets that set the noise, through the trainer."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objective_wiring import BEGIN, first_gradient, rows_of
from toys import Bandit, Walker, build_parts

from unified_rl.errors import RecipeError
from unified_rl.metrics import StepMetrics
from unified_rl.objectives.thresholds import mean_bounds, mean_divergence
from unified_rl.recipe.explain import listing
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.presets import PRESETS, SAMPLING_PRESETS
from unified_rl.train import StopSignal, collect, plan_update, run_loop
from unified_rl.update import window_loss


def test_bounds_in_nats_by_hand():
    low, high = mean_bounds(math.log(2.0) * 4, math.log(3.0) * 4, 4)
    assert low == pytest.approx(0.5) and high == pytest.approx(2.0)
    # Of many dims, nats over their number: 1e-4 at 16 x 64 x 64 is 6.55 nats.
    low, high = mean_bounds(6.5536, 6.5536, 65536)
    assert low == pytest.approx(1e-4, rel=1e-4) and high == pytest.approx(1e-4, rel=1e-4)
    assert mean_divergence(0.5, 100) == 0.005


@pytest.mark.parametrize("dims", [2, 8])
@pytest.mark.parametrize(
    ("nats", "mean"),
    [
        (
            lambda dims: {"clip_low": 0.3, "clip_high": 0.5},
            lambda dims: {"clip_low": 1 - math.exp(-0.3 / dims), "clip_high": math.exp(0.5 / dims) - 1},
        ),
        (
            lambda dims: {"loss": "dppo", "max_divergence": 0.07},
            lambda dims: {"loss": "dppo", "max_divergence": 0.07 / dims},
        ),
    ],
)
def test_a_threshold_in_nats_is_one_of_means_over_dims(tmp_path: Path, dims: int, nats: Any, mean: Any):
    def gradient(name: str, objective: dict[str, Any]) -> torch.Tensor:
        return first_gradient(build_parts(tmp_path / name, Walker([0.0] * dims), objective=objective), move=0.2)

    expected = gradient("mean", mean(dims))
    torch.testing.assert_close(gradient("nats", {**nats(dims), "threshold_unit": "nats"}), expected)
    assert (expected - gradient("free", {**mean(dims), "clip_low": 0.9, "clip_high": 9.0, "loss": "clip"})).any()


def test_the_metrics_tell_what_a_clip_range_in_nats_amounts_to(tmp_path: Path):
    objective = {"threshold_unit": "nats", "clip_low": 0.3, "clip_high": 0.2}
    parts = build_parts(tmp_path / "a", Walker([0.0] * 8), objective=objective, num_steps=1)
    run_loop(parts, BEGIN, StopSignal())
    assert rows_of(parts)[0]["clip_range"] == pytest.approx(math.exp(0.2 / 8) - 1)
    plain = build_parts(tmp_path / "b", Walker([0.0] * 8), num_steps=1)
    run_loop(plain, BEGIN, StopSignal())
    assert "clip_range" not in rows_of(plain)[0]


def test_a_divergence_is_steered_to_its_target_in_nats(tmp_path: Path):
    kl = {"coef": 0.01, "estimator": "gaussian", "target": 0.02, "gain_p": 0.0, "gain_i": 0.5}
    objective = {"kl": kl, "threshold_unit": "nats"}
    parts = build_parts(tmp_path, Walker([0.0] * 4), objective=objective, num_steps=5)
    run_loop(parts, BEGIN, StopSignal())
    rows, coef = rows_of(parts), 0.01
    for row in rows:
        assert row["kl_nats"] == pytest.approx(4 * row["kl"])
        coef *= math.exp(0.5 * max(-1.0, min(1.0, row["kl_nats"] / 0.02 - 1.0)))
        assert row["kl_coef"] == pytest.approx(coef)
    assert rows[-1]["kl_nats"] > 0.02


def test_the_reference_can_be_an_average_of_the_weights(tmp_path: Path):
    """With decay 0.5 a step the average is half a step behind; the base stays where the run began."""
    keys: dict[str, Any] = {"ema": {"decay": 0.5}, "optimizer": {"lr": 0.1}, "num_steps": 3}
    objective = {"kl": {"coef": 0.1, "estimator": "k3", "reference": "ema"}}
    parts = build_parts(tmp_path, Bandit([0.5, 0.0, -0.5]), objective=objective, **keys)
    assert parts.recipe.kl_reference == "ema"
    moving = parts.policy
    moving.reference = functools.partial(parts.snapshots.use, "ema")  # as `assemble` does
    run_loop(parts, BEGIN, StopSignal())
    weight = moving.module.weight.detach().clone()
    average = parts.snapshots._copies["ema"]["weight"].clone()
    assert (weight - average).abs().max() > 1e-2
    _, prepared, _ = collect(parts, 3)
    (window, *_) = plan_update(parts, prepared, 3, 0)
    metrics = StepMetrics()
    window_loss(moving, window, metrics, first_update=False)
    tokens = prepared[0].segment.actions["tokens"][:8]
    gap = average.log_softmax(0)[tokens] - weight.log_softmax(0)[tokens]
    assert metrics.reduce()["kl"] == pytest.approx(float((gap.expm1() - gap).mean()), rel=1e-4)
    assert torch.equal(moving.module.weight.detach(), weight) and moving.version == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": {"kl": {"coef": 0.1, "reference": "emma"}}, "ema": {}},
            "objective.all.kl.reference: no snapshot",
        ),
        ({"objective": {"kl": {"coef": 0.1, "reference": "ema"}}}, "objective.all.kl.reference: no snapshot 'ema'"),
        ({"group_size": 1}, "group_size: 1 leaves group_std"),
    ],
)
def test_recipes_that_do_not_fit_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError) as caught:
        build_parts(tmp_path, Bandit([0.0, 0.0]), **changes)
    assert str(caught.value).startswith(message)


def test_a_group_of_one_is_enough_for_a_critic(tmp_path: Path):
    parts = build_parts(
        tmp_path, Bandit([0.0, 0.0, 0.0]), objective={"preset": "ppo"}, group_size=1, prompts_per_step=16, num_steps=24,
        epochs=2,
    )  # fmt: skip
    before = parts.policy.module["policy"].weight.detach().clone()
    run_loop(parts, BEGIN, StopSignal())
    gain = parts.policy.module["policy"].weight.detach() - before
    assert float(gain[0] - gain[1:].max()) > 0.1
    assert (
        not (parts.run.path / "events.jsonl").is_file() or "equal" not in (parts.run.path / "events.jsonl").read_text()
    )


def raw(preset: str, family: str, **sampling: Any) -> dict[str, Any]:
    return {
        "policy": {"model": "toy", "family": family, "sampling": sampling},
        "data": {"prompts": "toy:prompts"},
        "rewards": [{"name": "toy:reward"}],
        "objective": {"preset": preset},
    }


@pytest.mark.parametrize("preset", SAMPLING_PRESETS)
def test_presets_about_sampling_fill_it_in(tmp_path: Path, preset: str):
    (family, *_), keys = SAMPLING_PRESETS[preset]
    sampling = parse_recipe(raw(preset, family), tmp_path).policy.sampling.model_dump(mode="json")
    for key, value in keys.items():
        assert sampling[key] is not None
        assert sampling[key].items() >= value.items() if isinstance(value, dict) else sampling[key] == value
    with pytest.raises(
        RecipeError, match=f"objective.preset: {preset} sets .* of {family}.* policies, this is causal_lm"
    ):
        parse_recipe(raw(preset, "causal_lm"), tmp_path)


def test_keys_of_the_recipe_win_over_the_preset_s_sampling(tmp_path: Path):
    assert parse_recipe(raw("mix_grpo", "diffusion", noise_steps=3), tmp_path).policy.sampling.noise_steps == 3


def test_the_list_of_presets_has_papers_and_keys():
    text = listing("presets")
    for name, (paper, keys) in PRESETS.items():
        line = next(line for line in text.splitlines() if line.split()[0] == name)
        assert paper in line and all(f"{key}:" in line for key in keys)
    assert "policy.sampling: noise_place: window" in text

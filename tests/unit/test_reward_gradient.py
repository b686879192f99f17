"""Gradients of differentiable rewards: through a toy's picture, the shipped reward, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import IMAGE_PRESETS, TEXT_PRESETS, gradient
from test_objective_wiring import BEGIN, fitting, rows_of
from torch import Tensor
from toys import Bandit, Walker, build_parts

from reward_models.digit_likeness import digit_likeness
from unified_rl.errors import RecipeError
from unified_rl.recipe.explain import plan
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.presets import PRESETS
from unified_rl.recipe.reward import RewardBlock
from unified_rl.rewards.gradients import DifferentiableReward, load_differentiable
from unified_rl.rewards.types import RewardError
from unified_rl.train import StopSignal, collect, run_loop
from unified_rl.types import Segment


class Painter(Walker):
    """A picture of one pixel, as bright as the sigmoid of the walk's end; the last steps carry the drift's gradient."""

    asked: list[tuple[str, int]] = []

    def num_levels(self, name: str, segment: Segment) -> int:
        return self.max_steps["image"]

    def sample_with_grad(self, name: str, segment: Segment, *, kind: str, step: int, seeds: Any) -> Tensor:
        self.asked.append((kind, step))
        states = segment.actions["states"]
        assert isinstance(states, Tensor)
        moved = (self.max_steps["image"] - step) * (self._now - self._now.detach())
        brightness = (states[:, -1] + moved).sigmoid().mean(1)
        return brightness[:, None, None, None].expand(-1, 3, 1, 1)


def brightness(prompts: Any, completions: Tensor, **_: Any) -> Tensor:
    return completions.mean((1, 2, 3))


def painter_parts(folder: Path, weight: float = 1.0, **keys: Any) -> Any:
    parts = build_parts(folder, Painter([0.3, 0.1]), **keys)
    reward = DifferentiableReward(name="brightness", weight=weight, function=brightness)
    return replace(parts, differentiable=[reward])


def test_the_gradient_is_the_rewards(tmp_path: Path):
    keys = {"objective": {"preset": "draft", "reward_gradient": {"steps": [2, 2]}}}
    got = [gradient(painter_parts(tmp_path / str(n), 3.0, engine={"micro_batch": n}, **keys)) for n in (16, 3)]
    _, (prepared,), _ = collect(painter_parts(tmp_path / "c", **keys), 0)
    drift = torch.tensor([0.3, 0.1], requires_grad=True)
    ends = prepared.segment.actions["states"][:, -1] + 2 * (drift - drift.detach())
    (-3.0 * ends.sigmoid().mean()).backward()
    torch.testing.assert_close(got[0], drift.grad)
    torch.testing.assert_close(got[1], drift.grad)


GRADIENT_PRESETS = ["draft", "draft_lv", "alignprop", "refl"]


def test_no_preset_is_left_out_of_those_that_raise_the_reward():
    """sft imitates whatever it is given, see test_recorded.py."""
    known = {name for name, _ in fitting()} | {*TEXT_PRESETS, *IMAGE_PRESETS, *GRADIENT_PRESETS}
    assert known | {"sft"} == set(PRESETS)


@pytest.mark.parametrize("preset", GRADIENT_PRESETS)
def test_every_preset_raises_the_reward(tmp_path: Path, preset: str):
    parts = painter_parts(tmp_path, objective={"preset": preset}, num_steps=16)
    assert run_loop(parts, BEGIN, StopSignal()) == 0
    gain = parts.policy.module.weight.detach() - torch.tensor([0.3, 0.1])
    assert float(gain.min()) > 0.1
    rows = rows_of(parts)
    assert rows[-1]["rewards/brightness/with_grad"] > rows[0]["rewards/brightness/with_grad"] + 0.03


def test_margin_trains_only_what_is_below(tmp_path: Path):
    objective = {"preset": "refl", "reward_gradient": {"steps": [1, 1], "margin": 0.6}}
    parts = painter_parts(tmp_path, objective=objective)
    got = gradient(parts)
    _, (prepared,), _ = collect(parts, 0)
    drift = torch.tensor([0.3, 0.1], requires_grad=True)
    bright = (prepared.segment.actions["states"][:, -1] + drift - drift.detach()).sigmoid().mean(1)
    assert 0 < int((bright < 0.6).sum()) < 16
    (0.6 - bright).clamp(min=0).mean().backward()
    torch.testing.assert_close(got, drift.grad)


def test_random_truncation_and_copies(tmp_path: Path):
    Painter.asked.clear()
    objective = {"preset": "alignprop", "reward_gradient": {"steps": [1, 3]}}
    run_loop(painter_parts(tmp_path / "a", objective=objective, num_steps=16), BEGIN, StopSignal())
    assert {kind for kind, _ in Painter.asked} == {"last_steps"}
    assert {step for _, step in Painter.asked} == {0, 1, 2} and len(Painter.asked) == 32
    Painter.asked.clear()
    run_loop(painter_parts(tmp_path / "b", objective={"preset": "draft_lv"}, num_steps=1), BEGIN, StopSignal())
    assert Painter.asked == [("renoised", 2)] * 4  # two windows, two copies


def test_beside_a_policy_gradient_both_add_up(tmp_path: Path):
    draft, flow = {"method": "reward_gradient"}, {"advantage": "group_mean"}
    alone = gradient(painter_parts(tmp_path / "a", objective=draft))
    policy = gradient(painter_parts(tmp_path / "b", objective=flow))
    both = {**flow, "beside": "reward_gradient", "beside_coef": 0.25}
    parts = painter_parts(tmp_path / "c", objective=both, num_steps=1)
    torch.testing.assert_close(gradient(parts), policy + 0.25 * alone)
    run_loop(parts, BEGIN, StopSignal())
    row = rows_of(parts)[0]
    assert {"rewards/brightness/with_grad", "ratio/mean"} <= set(row) and math.isfinite(row["loss"])


@pytest.mark.parametrize(
    ("objective", "kind", "keys", "message"),
    [
        ({"preset": "draft"}, Bandit, {}, "objective.all.method: reward_gradient needs samples with a gradient"),
        ({"preset": "draft"}, Painter, {"epochs": 2}, "objective.method: reward_gradient goes on from"),
        ({"preset": "draft", "kl": {"coef": 0.1}}, Painter, {}, "objective.all.kl: reward_gradient evaluates no step"),
        (
            {"preset": "draft", "reward_gradient": {"steps": [3, 1]}},
            Painter,
            {},
            r"objective.all.reward_gradient.steps: \[3, 1\] is no range",
        ),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, objective: Any, kind: Any, keys: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        build_parts(tmp_path, kind([0.0, 0.0]), objective=objective, **keys)


def test_a_policy_or_rewards_without_gradients_are_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="pictures that this policy can differentiate"):
        gradient(build_parts(tmp_path, Walker([0.0, 0.0]), objective={"preset": "draft"}))
    with pytest.raises(RecipeError, match="marked differentiable = True"):
        load_differentiable([RewardBlock(name="digit_check")], "cpu")
    names = ("reward_models.digit_likeness:digit_likeness", "digit_check")
    (loaded,) = load_differentiable([RewardBlock(name=name, weight=2.0) for name in names], "cpu")
    assert loaded.weight == 2.0
    _, (prepared,), _ = collect(painter_parts(tmp_path / "b", objective={"preset": "draft"}), 0)
    constant = DifferentiableReward(name="c", weight=1.0, function=lambda prompts, completions: torch.zeros(16))
    with pytest.raises(RewardError, match="one differentiable number per picture"):
        constant.of(prepared.prompts, torch.zeros(16, 3, 1, 1))


def test_digit_likeness_knows_digits_and_leads_to_them():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = torch.tensor(1.0 - images[:60].reshape(-1, 1, 8, 8) / 16.0).float()
    pictures = grey.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).expand(-1, 3, -1, -1)
    right = digit_likeness([f"the digit {label}" for label in labels[:60]], pictures)
    wrong = digit_likeness([f"the digit {(label + 1) % 10}" for label in labels[:60]], pictures)
    assert float(right.mean()) > -0.3 and float(wrong.mean()) < -4 and float(wrong.min()) >= -8
    blank = torch.full((1, 3, 16, 16), 0.6, requires_grad=True)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.05
    start = digit_likeness(["a handwritten three"], blank + noise)
    start.sum().backward()
    assert blank.grad is not None
    better = digit_likeness(["a handwritten three"], blank + noise + 0.5 * blank.grad / blank.grad.norm())
    assert float(better) > float(start.detach()) + 0.05
    assert digit_likeness.differentiable


@pytest.mark.parametrize(
    ("preset", "steps", "windows"),
    [("draft", 1, 1), ("alignprop", 4, 1), ("draft_lv", 1, 2), ("refl", 1, 1), ("rwr", 4, 4)],
)
def test_validate_counts_passes(tmp_path: Path, preset: str, steps: int, windows: int):
    raw = {
        "policy": {"model": "toy", "family": "diffusion", "sampling": {"num_inference_steps": 4}},
        "data": {"prompts": "toy:prompts"},
        "rewards": [{"name": "toy:reward"}],
        "objective": {"preset": preset},
        "group_size": 2,
    }
    counts = plan(parse_recipe(raw, tmp_path))
    assert (counts.steps_trained, counts.windows_per_update) == (steps, windows)

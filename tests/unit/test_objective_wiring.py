"""From a key of the recipe to a trained update: toy policies through the real trainer."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from toys import Bandit, Walker, again, build_parts

from unified_rl.advantages import group_advantages
from unified_rl.errors import RecipeError
from unified_rl.metrics import StepMetrics
from unified_rl.objectives.policy_gradient import LOSSES
from unified_rl.prepare import prompt_key
from unified_rl.recipe.method_presets import METHOD_PRESETS
from unified_rl.recipe.objective_rules import GAUSSIAN_LOSSES, LOSS_NAMES
from unified_rl.recipe.presets import PRESETS
from unified_rl.run_folder.tracking import read_jsonl
from unified_rl.train import Position, StopSignal, collect, plan_update, run_loop, start
from unified_rl.types import Prompt
from unified_rl.update import window_loss

BEGIN = Position(step=0, rollout=0)
NAMES = ("first", "second")
MATRICES = ("rollout_log_probs", "loss_mask", "turn_ids")


def rows_of(parts: Any) -> list[dict[str, Any]]:
    return read_jsonl(parts.run.path / "metrics.jsonl")


def first_gradient(parts: Any, *, move: float = 0.0) -> torch.Tensor:
    """Gradient of the first update's loss, with the weights moved by `move` in arm or dim 0 after the rollout."""
    _, prepared, _ = collect(parts, 0)
    weight = parts.policy.module.weight
    with torch.no_grad():
        weight[0] += move
    for window in plan_update(parts, prepared, 0, 0):
        window_loss(parts.policy, window, StepMetrics(), first_update=False).backward()
    assert weight.grad is not None
    return weight.grad


def test_the_recipe_knows_the_losses_that_exist():
    assert list(LOSSES) == LOSS_NAMES and set(GAUSSIAN_LOSSES) <= set(LOSS_NAMES)


def fitting() -> list[tuple[str, str]]:
    """Every policy-gradient preset with every family that it fits."""
    tokens_only = {"gspo", "gspo_token", "luspo", "vespo", "trl_rloo", "drpo"}
    gaussian_only = {"flow_grpo", "flow_grpo_fast", "mix_grpo", "grpo_guard", "flow_dppo"}
    gradients = [name for name in PRESETS if name not in METHOD_PRESETS and name not in OWN_FAMILY]
    bandits = [(name, "tokens") for name in gradients if name not in gaussian_only]
    bandits += [(name, "tokens") for name in OWN_FAMILY]
    return bandits + [(name, "gaussian") for name in gradients if name not in tokens_only]


OWN_FAMILY = {"bicot_grpo": "image_tokens", "uni_grpo": "masked_diffusion"}
"""Presets that set how one family samples, and that family; the toy has its tokens."""


@pytest.mark.parametrize(("preset", "kind"), fitting())
def test_every_preset_raises_the_reward_of_every_family_that_it_fits(tmp_path: Path, preset: str, kind: str):
    policy: Any = Bandit([0.0, 0.0, 0.0]) if kind == "tokens" else Walker([0.0, 0.0])
    before = policy.module.weight.detach().clone()
    parts = build_parts(tmp_path, policy, OWN_FAMILY.get(preset), objective={"preset": preset}, num_steps=16, epochs=2)
    assert run_loop(parts, BEGIN, StopSignal()) == 0
    gain = (policy.module.weight.detach() - before).tolist()
    # Arm 0 gains on the others; the walk drifts upwards in both dims. A random direction would do so half the time,
    # 0.1 is far outside of what noise gives.
    assert (gain[0] - max(gain[1:]) > 0.1) if kind == "tokens" else (min(gain) > 0.1), gain
    rows = rows_of(parts)
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert all(math.isfinite(row["grad_norm"]) for row in rows)


ESTIMATORS: dict[str, tuple[dict[str, Any], float, float]] = {
    "score function": ({"advantage": "rloo", "ratio": "none", "loss": "reinforce"}, 1.0, 0.0),
    "the group's own mean": ({"advantage": "group_mean", "ratio": "none", "loss": "reinforce"}, 3 / 4, 0.0),
    "a critic, lambda 1": (
        {"advantage": "gae", "critic": {"whiten": False, "gae_lambda": 1.0, "value_coef": 1e-9}},
        1.0,
        0.0,
    ),
    "clip": ({"advantage": "rloo"}, 1.0, 0.0),
    "sequence ratio": ({"advantage": "rloo", "ratio": "sequence"}, 1.0, 0.0),
    "exact sequence ratio": ({"advantage": "rloo", "ratio": "sequence_product"}, 1.0, 0.0),
    "cispo": ({"advantage": "rloo", "loss": "cispo", "clip_high": 5.0}, 1.0, 0.0),
    "sapo": ({"advantage": "rloo", "loss": "sapo"}, 1.0, 0.0),
    "vespo": ({"advantage": "rloo", "loss": "vespo", "ratio": "sequence_product"}, 1.0, 0.0),
    "spo": ({"advantage": "rloo", "loss": "spo"}, 1.0, 0.0),
    "off-policy ratio": ({"advantage": "rloo", "clip_low": 0.9, "clip_high": 9.0}, 1.0, 0.4),
    "off-policy cispo": ({"advantage": "rloo", "loss": "cispo", "clip_high": 9.0}, 1.0, 0.4),
}
"""Objective, what it makes of the gradient, and how far the first logit has moved since the rollout."""


@pytest.mark.parametrize("name", ESTIMATORS)
def test_expected_gradient_is_the_analytic_policy_gradient(tmp_path: Path, name: str):
    """Two arms, p for the one that pays 1: d E[r] / d logit = +-p (1 - p). RLOO is unbiased, and so is each loss while
    it bounds nothing; subtracting the group's own mean costs a factor (G - 1) / G."""
    objective, share, moved = ESTIMATORS[name]
    logit = math.log(0.6 / 0.4)
    policy = Bandit([logit, 0.0], num_steps=1)
    parts = build_parts(
        tmp_path, policy, objective={"aggregation": "sequence_sum", **objective}, group_size=4, prompts_per_step=64,
        engine={"micro_batch": 256},
    )  # fmt: skip
    samples, weight = [], policy.module.weight
    for index in range(40):
        _, prepared, _ = collect(parts, index)
        with torch.no_grad():
            weight[0] += moved
        for window in plan_update(parts, prepared, index, 0):
            window_loss(parts.policy, window, StepMetrics(), first_update=False).backward()
        samples.append(-weight.grad.clone())
        weight.grad = None
        with torch.no_grad():
            weight[0] -= moved
    gradients = torch.stack(samples)
    error = gradients.std(0) / len(samples) ** 0.5
    paid = 1 / (1 + math.exp(-logit - moved))
    expected = torch.tensor([1.0, -1.0]) * paid * (1 - paid) * share
    assert ((gradients.mean(0) - expected).abs() < 4 * error).all(), (gradients.mean(0), error)
    assert (error < 0.006).all()


@pytest.mark.parametrize(
    ("correction", "weight"),
    [
        # The sampler reports log-probs that are 0.5 nats too low: old / rollout is e^0.5 a token, e for two tokens.
        ({"mode": "truncate", "level": "token", "cap": 2.0}, math.exp(0.5)),
        ({"mode": "truncate", "level": "token", "cap": 1.5}, 1.5),
        ({"mode": "truncate", "level": "sequence", "cap": 3.0}, math.e),
        ({"mode": "truncate", "level": "sequence_mean", "cap": 3.0}, math.exp(0.5)),
        ({"mode": "mask", "level": "sequence", "cap": 2.0}, 0.0),
    ],
)
def test_correction_scales_the_gradient(tmp_path: Path, correction: dict[str, Any], weight: float):
    keys = {"objective": {"old_log_probs": "recompute"}}
    plain = first_gradient(build_parts(tmp_path / "a", Bandit([0.5, 0.0, -0.5], sampler_bias=-0.5), **keys))
    keys["objective"]["correction"] = correction
    corrected = first_gradient(build_parts(tmp_path / "b", Bandit([0.5, 0.0, -0.5], sampler_bias=-0.5), **keys))
    torch.testing.assert_close(corrected, weight * plain)
    assert plain.abs().max() > 1e-2


def test_recomputed_old_log_probs_make_the_first_ratio_one(tmp_path: Path):
    rows = {}
    for name in ("rollout", "recompute"):
        parts = build_parts(
            tmp_path / name, Bandit([0.5, 0.0], sampler_bias=-0.5), objective={"old_log_probs": name},
            max_replay_gap=1.0, num_steps=1,
        )  # fmt: skip
        run_loop(parts, BEGIN, StopSignal())
        rows[name] = rows_of(parts)[0]
    assert rows["rollout"]["ratio/mean"] == pytest.approx(math.exp(0.5))
    assert rows["recompute"]["ratio/mean"] == pytest.approx(1.0) and rows["recompute"]["time/anchor"] > 0
    assert rows["recompute"]["replay_gap"] == pytest.approx(0.5)


def test_off_policy_sequences_are_dropped(tmp_path: Path):
    """The sampler says 0.5 nats more than the policy: sequences with a negative advantage go."""
    policy = Bandit([0.5, 0.0, -0.5], sampler_bias=0.5)
    parts = build_parts(tmp_path, policy, objective={"off_policy_mask": 0.4, "clip_low": 0.9})
    gradient = first_gradient(parts)
    _, (prepared,), _ = collect(parts, 0)
    advantages = prepared.advantages.clamp(min=0.0)[:, None]
    tokens = prepared.segment.actions["tokens"]
    logits = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
    (-(logits.log_softmax(0)[tokens] * advantages).mean() * math.exp(-0.5)).backward()
    torch.testing.assert_close(gradient, logits.grad)


def test_kl_in_the_reward_is_taken_off_before_advantages(tmp_path: Path):
    kl = {"coef": 0.3, "estimator": "k1", "place": "reward"}
    policy = Bandit([0.5, 0.0, -0.5])
    with torch.no_grad():
        policy.module.weight.copy_(torch.tensor([1.0, 0.2, -1.0]))  # away from its reference
    parts = build_parts(tmp_path, policy, objective={"advantage": "group_mean", "kl": kl})
    rollout, (prepared,), row = collect(parts, 0)
    tokens = prepared.segment.actions["tokens"]
    per_token = policy.module.weight.detach().log_softmax(0) - torch.tensor([0.5, 0.0, -0.5]).log_softmax(0)
    penalty = per_token[tokens].sum(1)
    expected = group_advantages(
        rollout.scores.total - 0.3 * penalty, rollout.trajectory.group_ids, normalise="group_mean"
    )
    torch.testing.assert_close(prepared.advantages, expected)
    assert row["kl"] == pytest.approx(float(per_token[tokens].mean())) and penalty.abs().max() > 0.1


def test_what_a_prompt_asks_is_told_apart_by_its_masks_too():
    """Running statistics of prompts: two edits of one picture in the same words are two prompts, whenever they come."""
    picture, mask = Image.new("RGB", (4, 4), "red"), Image.new("L", (4, 4), 255)

    def key(seed: int = 0, **columns: Any) -> str:
        return prompt_key(Prompt(text="a cat", images=(picture.copy(),), columns=columns, group_id=seed, seed=seed))

    assert key(mask_image=mask) == key(7, mask_image=mask.copy())
    others = [key(), key(mask_image=Image.new("L", (4, 4), 0)), key(video=[mask]), key(strength=0.3)]
    assert len({key(mask_image=mask), *others}) == 5


@pytest.mark.parametrize(
    "advantage", ["group_std", "global_std", "group_whitened", "batch_whitened", "prompt_std", "gdpo", "pass_k"]
)
def test_the_recipe_s_std_reaches_every_advantage_that_divides(tmp_path: Path, advantage: str):
    largest = []
    for name, eps in (("a", 1e-4), ("b", 1e3)):
        keys = {"advantage": advantage, "std_eps": eps, "prompt_min_count": 2}
        parts = build_parts(tmp_path / name, Bandit([0.5, 0.0], num_steps=9), objective=keys)
        _, (prepared,), _ = collect(parts, 0)
        largest.append(float(prepared.advantages.abs().max()))
    assert largest[0] > 0.1 and largest[1] < 1e-2


def test_divergences_of_several_segments_are_averaged_over_all_their_steps(tmp_path: Path):
    class Twice(Bandit):
        """The same tokens as two segments, the second one measured from the reference as half as far away."""

        def sample(self, prompts, *, evaluation=False):
            drawn = super().sample(prompts, evaluation=evaluation)
            segment = drawn.segments["text"]
            first = replace(segment, **{key: getattr(segment, key)[:, :1] for key in MATRICES})
            return replace(drawn, segments={"first": first, "second": segment})

        def log_prob(self, name, segment, steps):
            stats = super().log_prob(name, segment, steps)
            width = segment.loss_mask.shape[1]
            scale = 1.0 if name == "first" else 0.5
            return replace(stats, log_probs=stats.log_probs[:, :width] * scale, entropy=None)

    policy = Twice([0.5, 0.0, -0.5], num_steps=3)
    policy.steps_per_forward, policy.max_steps = dict.fromkeys(NAMES), dict.fromkeys([*NAMES, "text"], 3)
    with torch.no_grad():
        policy.module.weight.copy_(torch.tensor([1.0, 0.2, -1.0]))
    kl = {"coef": 0.3, "estimator": "k1", "place": "reward"}
    _, (first, second), row = collect(build_parts(tmp_path, policy, objective={"kl": kl}), 0)
    nats = first.anchor.kl.sum() + second.anchor.kl.sum()
    assert row["kl"] == pytest.approx(float(nats) / (16 + 48)) and first.anchor.kl.abs().sum() > 1.0


def test_gaussian_kl_in_the_reward_by_hand(tmp_path: Path):
    walker = Walker([0.0, 0.0], num_steps=3, std=0.5)
    with torch.no_grad():
        walker.module.weight.copy_(torch.tensor([0.3, 0.1]))
    kl = {"coef": 2.0, "estimator": "gaussian", "place": "reward"}
    _, (prepared,), row = collect(build_parts(tmp_path, walker, objective={"kl": kl}), 0)
    assert row["kl"] == pytest.approx((0.09 + 0.01) / 2 / (2 * 0.25)) and prepared.anchor.means is None


def test_kl_coefficient_is_steered_and_used(tmp_path: Path):
    kl = {"coef": 0.01, "estimator": "k3", "target": 1e-4, "gain_p": 0.0, "gain_i": 0.5}
    parts = build_parts(tmp_path, Bandit([0.0, 0.0]), objective={"kl": kl}, num_steps=6)
    run_loop(parts, BEGIN, StopSignal())
    rows = rows_of(parts)
    assert rows[0]["kl"] == 0.0 and rows[0]["kl_coef"] == pytest.approx(0.01 * math.exp(-0.5))
    for before, after in pairwise(rows):
        error = max(-1.0, min(1.0, after["kl"] / 1e-4 - 1.0))
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * math.exp(0.5 * error))
    assert rows[-1]["kl_coef"] > rows[0]["kl_coef"]
    # The next update is made with it.
    _, prepared, _ = collect(parts, 6)
    assert plan_update(parts, prepared, 6, 0)[0].target.kl_coef == rows[-1]["kl_coef"]


def test_entropy_coefficient_adapts_and_is_used(tmp_path: Path):
    objective = {"entropy_target": 0.6, "entropy_step": 0.01}
    parts = build_parts(tmp_path, Bandit([3.0, 0.0]), objective=objective, num_steps=3)
    run_loop(parts, BEGIN, StopSignal())
    rows = rows_of(parts)
    assert all(row["entropy"] < 0.6 for row in rows)
    assert [row["entropy_coef"] for row in rows] == pytest.approx([0.01, 0.02, 0.03])
    _, prepared, _ = collect(parts, 3)
    assert plan_update(parts, prepared, 3, 0)[0].target.entropy_coef == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("steered", "fixed", "state"),
    [
        (
            {"kl": {"coef": 0.01, "target": 0.1}},
            {"kl": {"coef": 0.7}},
            {"kl": {"all": {"integral": 0.0, "coef": 0.7}}},
        ),
        ({"entropy_target": 0.5}, {"entropy_coef": 0.7}, {"entropy": {"all": {"value": 0.7, "below": 1.0}}}),
    ],
)
def test_a_steered_coefficient_is_the_one_in_the_loss(tmp_path: Path, steered: Any, fixed: Any, state: Any):
    parts = build_parts(tmp_path / "a", Bandit([0.5, 0.0, -0.5]), objective=steered)
    parts.memory.restore(state)
    expected = first_gradient(build_parts(tmp_path / "b", Bandit([0.5, 0.0, -0.5]), objective=fixed), move=0.3)
    torch.testing.assert_close(first_gradient(parts, move=0.3), expected)
    without = first_gradient(build_parts(tmp_path / "c", Bandit([0.5, 0.0, -0.5])), move=0.3)
    assert (expected - without).abs().max() > 1e-2


def test_top_entropy_trains_only_the_uncertain_steps(tmp_path: Path):
    class TwoEntropies(Bandit):
        def log_prob(self, name, segment, steps):
            stats = super().log_prob(name, segment, steps)
            entropy = torch.tensor([0.1, 0.9]).expand(stats.log_probs.shape)[:, steps]
            return type(stats)(log_probs=stats.log_probs, entropy=entropy, mean=None, std=None)

    parts = build_parts(tmp_path, TwoEntropies([0.5, 0.0, -0.5]), objective={"top_entropy": 0.5})
    gradient = first_gradient(parts)
    _, (prepared,), _ = collect(parts, 0)
    tokens = prepared.segment.actions["tokens"]
    logits = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
    # Second steps only, over the number of all steps.
    (-(logits.log_softmax(0)[tokens[:, 1]] * prepared.advantages).sum() / tokens.numel()).backward()
    torch.testing.assert_close(gradient, logits.grad)


def test_dppo_masks_what_would_go_on_outwards(tmp_path: Path):
    """The drift has moved by 0.2 in one of two dims: KL 0.04 / 2 / (2 * 0.25) = 0.04 nats a step, mean over dims."""
    objective = {"loss": "dppo", "max_divergence": 0.05, "advantage": "group_mean"}
    free = first_gradient(build_parts(tmp_path / "a", Walker([0.0, 0.0]), objective=objective), move=0.2)
    bound = {**objective, "max_divergence": 0.03}
    parts = build_parts(tmp_path / "b", Walker([0.0, 0.0]), objective=bound)
    masked = first_gradient(parts, move=0.2)
    with torch.no_grad():
        parts.policy.module.weight[0] -= 0.2
    _, (prepared,), _ = collect(parts, 0)
    states, advantages = prepared.segment.actions["states"], prepared.advantages[:, None]
    expected = {}
    drift = torch.tensor([0.2, 0.0], requires_grad=True)
    shift = states[:, 1:] - states[:, :-1]
    change = ((shift.square() - (shift - drift).square()) / (2 * 0.25)).mean(2)
    for name, limit in (("free", 0.05), ("masked", 0.03)):
        outwards = ((change > 0) & (advantages > 0)) | ((change < 0) & (advantages < 0))
        kept = (~outwards | torch.tensor(limit > 0.04)).float()
        expected[name] = torch.autograd.grad((-change.exp() * advantages * kept).mean(), drift, retain_graph=True)[0]
    torch.testing.assert_close(free, expected["free"])
    torch.testing.assert_close(masked, expected["masked"])
    assert (free - masked).abs().max() > 1e-2


def test_guard_uses_the_old_means(tmp_path: Path):
    objective = {"loss": "guard", "clip_low": 0.9, "clip_high": 0.9, "advantage": "group_mean"}
    parts = build_parts(tmp_path, Walker([0.0, 0.0]), objective=objective)
    gradient = first_gradient(parts, move=0.2)
    with torch.no_grad():
        parts.policy.module.weight[0] -= 0.2
    _, (prepared,), _ = collect(parts, 0)
    states, advantages = prepared.segment.actions["states"], prepared.advantages[:, None]
    noise = (states[:, 1:] - states[:, :-1]) / 0.5  # the drift was 0
    drift = torch.tensor([0.2, 0.0], requires_grad=True)
    (-(noise * drift).mean(2).exp() * advantages).mean().backward()
    torch.testing.assert_close(gradient, drift.grad)


def test_the_anchor_evaluates_what_will_be_trained(tmp_path: Path):
    """Two updates of one random step each, of six: at most two forwards a window of rows, and ratios of 1 at first."""

    class Counting(Walker):
        asked: list[int] = []

        def log_prob(self, name, segment, steps):
            self.asked.append(steps.start)
            return super().log_prob(name, segment, steps)

    policy = Counting([0.1, 0.0], num_steps=6)
    objective = {"loss": "guard", "train_steps": 1}
    parts = build_parts(tmp_path, policy, objective=objective, epochs=2, num_steps=2)
    _, prepared, _ = collect(parts, 0)
    anchored, policy.asked = list(policy.asked), []
    trained = []
    for number in range(parts.recipe.updates_per_rollout):
        for window in plan_update(parts, prepared, 0, number):
            metrics = StepMetrics()
            window_loss(policy, window, metrics, first_update=False)
            assert metrics.sums["old_kl"] == 0.0 and metrics.num_steps == 8
            trained.append(window.steps.start)
    assert sorted(set(anchored)) == sorted(set(trained)) and len(anchored) == 2 * len(set(trained))


def test_updates_stop_early_once_the_policy_has_left(tmp_path: Path):
    keys: dict[str, Any] = {"epochs": 4, "num_steps": 8, "optimizer": {"lr": 0.5}, "checkpoint": {"every": 1}}
    parts = build_parts(tmp_path, Bandit([0.0, 0.0]), objective={"stop_kl": 1e-3}, **keys)
    run_loop(parts, BEGIN, StopSignal())
    rows = rows_of(parts)
    assert [row["step"] for row in rows] == list(range(1, 9))
    rollouts = [row["time/rollout"] > 0 for row in rows]
    # A rollout begins after each row that is too far, and only there (four updates never pass at this rate).
    assert rollouts == [True, *(row["update_kl"] > 1e-3 for row in rows[:-1])] and sum(rollouts) > 2
    saved = json.loads((parts.run.path / "checkpoints/step_000008/manifest.json").read_text())["state"]
    assert saved["step"] == 8 and saved["rollout"] == sum(rollouts)


@pytest.mark.parametrize(
    "objective",
    [
        {"preset": "ddpo", "prompt_min_count": 4, "prompt_buffer": 12, "clip_high": 0.2, "clip_low": 0.2},
        {"kl": {"coef": 0.1, "target": 1e-3, "gain_i": 0.5}, "entropy_target": 0.8, "entropy_step": 0.1},
        {"stop_kl": 1e-3},
        {"preset": "ppo", "kl": {"coef": 0.05, "estimator": "k1", "place": "reward"}},
    ],
)
def test_a_resumed_run_goes_on_exactly(tmp_path: Path, objective: dict[str, Any]):
    keys: dict[str, Any] = {
        "objective": objective,
        "epochs": 2,
        "num_steps": 12,
        "checkpoint": {"every": 1, "keep": 99},
    }
    whole = Bandit([0.2, 0.0, -0.1])
    parts = build_parts(tmp_path, whole, **keys)
    run_loop(parts, BEGIN, StopSignal())
    expected, rows = whole.module.weight.detach().clone(), rows_of(parts)
    steps = sorted(int(path.name[-6:]) for path in (parts.run.path / "checkpoints").glob("step_*"))
    fresh = Bandit([0.2, 0.0, -0.1])
    resumed = again(parts, tmp_path, fresh)
    at = start(resumed, str(parts.run.path / "checkpoints" / f"step_{steps[len(steps) // 2]:06d}"))
    assert 0 < at.step < 12
    run_loop(resumed, at, StopSignal())
    assert torch.equal(fresh.module.weight.detach(), expected)
    for row, other in zip(rows, rows_of(resumed), strict=True):
        assert {k: v for k, v in row.items() if k[:4] not in ("time", "samp", "memo")} == {
            k: v for k, v in other.items() if k[:4] not in ("time", "samp", "memo")
        }


def test_a_loss_from_a_file(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def plain(terms):\n    return -2.0 * terms.ratio * terms.advantages\n")
    own = first_gradient(
        build_parts(tmp_path / "a", Bandit([0.5, 0.0]), objective={"loss": f"{tmp_path}/mine.py:plain"})
    )
    clip = first_gradient(build_parts(tmp_path / "b", Bandit([0.5, 0.0])))
    torch.testing.assert_close(own, 2.0 * clip)


@pytest.mark.parametrize(
    ("objective", "policy", "message"),
    [
        ({"loss": "reinforce"}, Bandit, "ratio: reinforce has no ratio, not even token; say ratio: none"),
        ({"ratio": "none"}, Bandit, "ratio: clip is a function of the ratio"),
        ({"loss": "dppo"}, Bandit, "loss: dppo compares means of Gaussian steps"),
        ({"preset": "gspo"}, Walker, "ratio: sequence needs all steps in one forward; use token"),
        ({"preset": "gspo", "aggregation": "token_mean"}, Bandit, "aggregation: with a sequence's ratio"),
        ({"loss": "cispo"}, Bandit, "clip_high: cispo's is the bound itself"),
        ({"preset": "drpo"}, Walker, "loss: drpo weighs by a token's probability, which a density"),
        ({"loss": "sapo", "delta": 4.0}, Bandit, "delta: bounds the clip loss"),
        ({"correction": {"mode": "mask"}}, Bandit, "correction: compares recomputed log-probs"),
        ({"off_policy_mask": 0.1}, Walker, "off_policy_mask: needs all steps in one forward"),
        ({"top_entropy": 0.2}, Walker, "top_entropy: the entropy of denoising steps"),
        ({"entropy_coef": 0.2}, Walker, "entropy_coef: the entropy of denoising steps"),
        ({"kl": {"target": 0.1}}, Bandit, "kl.target: needs a coef above 0"),
        ({"kl": {"coef": 0.1, "estimator": "k1"}}, Bandit, "kl.estimator: k1 has no gradient on average"),
        (
            {"preset": "gdpo", "kl": {"coef": 0.1, "estimator": "k1", "place": "reward"}},
            Bandit,
            "kl.place: gdpo normalises each reward by itself",
        ),
        ({"preset": "rloo", "critic": {"width": 8}}, Bandit, "critic: rloo compares rewards with each other"),
        (
            {"preset": "ppo", "ratio": "sequence", "aggregation": "sequence_mean"},
            Bandit,
            "ratio: gae has an advantage for each step",
        ),
        ({"preset": "ppo", "critic": {"network": "separate"}}, Walker, "critic.network: a denoising step's critic"),
        ({"preset": "ppo", "critic": {"trunk_gradient": True}}, Walker, "critic.trunk_gradient: a denoising step's"),
        (
            {"preset": "ppo", "critic": {"network": "separate", "trunk_gradient": True}},
            Bandit,
            "critic.trunk_gradient: for a head on the policy",
        ),
        ({"preset": "ddpo", "prompt_buffer": 4}, Walker, "prompt_min_count: more than prompt_buffer"),
        (
            {"old_log_probs": "recompute", "correction": {"mode": "mask", "cap": 1.0, "floor": 2.0}},
            Bandit,
            "correction.floor: above cap",
        ),
    ],
)
def test_nonsense_is_refused_with_the_alternative(tmp_path: Path, objective: Any, policy: Any, message: str):
    with pytest.raises(RecipeError) as caught:
        build_parts(tmp_path, policy([0.0, 0.0]), objective=objective)
    assert str(caught.value).startswith(f"objective.all.{message}")


def test_an_unknown_loss_names_the_nearest(tmp_path: Path):
    with pytest.raises(RecipeError, match="no loss 'clipp'; did you mean 'clip'"):
        build_parts(tmp_path, Bandit([0.0, 0.0]), objective={"loss": "clipp"})


DOCS = Path(__file__).parent.parent.parent / "docs/objectives.md"


def test_the_docs_have_the_presets_as_they_are():
    text = DOCS.read_text(encoding="utf-8")
    for name, (paper, keys) in PRESETS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        filled = yaml.safe_load("{" + line.split("|")[2].strip().strip("`") + "}")
        assert filled == keys and paper in line


def test_the_loss_in_the_docs_trains(tmp_path: Path):
    code, recipe = re.findall(r"```(?:python|yaml)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[-2:]
    (tmp_path / "geometric.py").write_text(code)
    policy = Bandit([0.0, 0.0])
    parts = build_parts(tmp_path, policy, **yaml.safe_load(recipe), num_steps=16, epochs=2)
    assert run_loop(parts, BEGIN, StopSignal()) == 0
    weight = policy.module.weight.detach()
    assert float(weight[0] - weight[1]) > 0.1

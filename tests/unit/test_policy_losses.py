"""Policy losses: hand-computed numbers, TRL's losses and gradients, and what masks and bounds promise."""

import math
from typing import Any

import pytest
import torch
from oracle_files import load
from torch import Tensor

from unified_rl.objectives import aggregate, kl
from unified_rl.objectives.correction import off_policy_keep
from unified_rl.objectives.policy_gradient import (
    LOSSES,
    cispo_loss,
    clip_fractions,
    clip_loss,
    dppo_loss,
    log_ratios,
    penalty_loss,
    policy_loss,
    sapo_loss,
)

TRL, ARRAYS = load("trl_policy_losses")
# For losses of Gaussian steps: nothing has moved yet, and a std that scales nothing.
GAUSSIAN = {"old_kl": torch.zeros(1, 1), "step_std": torch.ones(1, 1)}

# TRL's loss types in our keys: the loss, and the aggregation that one process without accumulation has.
LOSS_TYPES: dict[str, tuple[str, aggregate.Aggregation]] = {
    "grpo": ("clip", "sequence_mean"),
    "bnpo": ("clip", "token_mean"),
    "dapo": ("clip", "token_mean"),
    "dr_grpo": ("clip", "constant"),
    "luspo": ("clip", "sequence_sum"),
    "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "sequence_mean"),
    "vespo": ("vespo", "token_mean"),
}
CASES = TRL["cases"]


def test_number_of_oracle_cases() -> None:
    assert len(CASES) == 27


def trl_loss(case: dict[str, Any], log_probs: Tensor) -> Tensor:
    loss_mask = ARRAYS["loss_mask"].bool()
    loss, mode = LOSS_TYPES[case["loss_type"]]
    clip_low = case.get("eps_low", 0.2)
    per_step = policy_loss(
        log_probs,
        ARRAYS["old_log_probs"],
        ARRAYS["advantages"].unsqueeze(1).expand(log_probs.shape),
        loss_mask,
        loss=loss,  # type: ignore[arg-type]
        ratio_level="sequence_product" if loss == "vespo" else case.get("level", "token"),
        clip_low=clip_low,
        clip_high=case.get("eps_high", clip_low),
        delta=case.get("delta"),
    ).per_step
    if "off_policy_mask_threshold" in case:
        advantages = ARRAYS["advantages"].unsqueeze(1).expand(log_probs.shape)
        threshold = case["off_policy_mask_threshold"]
        keep = off_policy_keep(log_probs, ARRAYS["old_log_probs"], advantages, loss_mask, threshold)
        per_step = per_step.masked_fill(~keep, 0.0)
    per_step = per_step + case.get("beta", 0.0) * kl.estimate(log_probs, ARRAYS["ref_log_probs"], "k3")
    num_steps, num_sequences = aggregate.counts(loss_mask)
    weights = aggregate.weights(
        loss_mask, mode, num_steps=num_steps, num_sequences=num_sequences, max_length=9, dtype=torch.float64
    )
    return (per_step * weights).sum()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['name']}-{case['loss_type']}")
def test_loss_and_gradient_are_those_of_trl(case: dict[str, Any]) -> None:
    log_probs = ARRAYS["log_probs"].clone().requires_grad_()
    loss = trl_loss(case, log_probs)
    loss.backward()
    expected = torch.tensor(case["loss"], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_probs.grad, ARRAYS[f"{case['name']}_grad"], rtol=1e-12, atol=1e-12)


def test_clip_loss_by_hand() -> None:
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]])
    got = clip_loss(ratio, advantages, 0.2, 0.3)
    torch.testing.assert_close(got, torch.tensor([[-1.3, 1.5, -0.5, 0.8, -2.2]]))


def test_bounds_of_the_clip_loss_by_hand() -> None:
    ratio, advantages = torch.tensor([[5.0, 5.0, 5.0, 1.5]]), torch.tensor([[-1.0, -2.0, 1.0, -1.0]])
    dual = clip_loss(ratio, advantages, 0.2, 0.3, dual_clip=3.0)
    torch.testing.assert_close(dual, torch.tensor([[3.0, 6.0, -1.3, 1.5]]))
    delta = clip_loss(ratio, advantages, 0.2, 0.3, delta=2.0)
    torch.testing.assert_close(delta, torch.tensor([[2.0, 4.0, -1.3, 1.5]]))


def test_clipped_steps_have_no_gradient() -> None:
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 9.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0]])
    clip_loss(ratio, advantages, 0.2, 0.3, dual_clip=3.0).sum().backward()
    assert ratio.grad is not None and ratio.grad.tolist() == [[0.0, 1.0, -1.0, 0.0, 0.0]]


def test_cispo_loss_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -1.0, -0.5]], requires_grad=True)
    ratio = torch.tensor([[6.0, 0.1, 1.0]], requires_grad=True)
    loss = cispo_loss(log_probs, ratio, torch.tensor([[2.0, 2.0, -1.0]]), 5.0)
    torch.testing.assert_close(loss, torch.tensor([[10.0, 0.2, -0.5]]))
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-10.0, -0.2, 1.0]]))
    assert ratio.grad is None


def test_sapo_loss_by_hand() -> None:
    ratio = torch.tensor([[1.0, 1.0, 2.0, 2.0, 3.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0]])
    # 4 * sigmoid(1) = 2.924234 and 4 / 1.05 * sigmoid(1.05) = 2.821999.
    expected = torch.tensor([[-2.0, 2.0 / 1.05, -2.924234, 2.821999, 0.0]])
    torch.testing.assert_close(sapo_loss(ratio, advantages), expected, rtol=1e-6, atol=1e-6)


def test_penalty_losses_by_hand() -> None:
    ratio = torch.tensor([[1.5, 1.5, 0.5]], requires_grad=True)
    advantages, weight = torch.tensor([[1.0, -2.0, 1.0]]), torch.tensor([[0.1, 0.5, 1.0]])
    spo = penalty_loss(ratio, advantages, 0.2)
    # |A| (r - 1)^2 / 0.4 = 0.625, 1.25, 0.625; its gradient |A| (r - 1) / 0.2 = 2.5, 5, -2.5.
    torch.testing.assert_close(spo, torch.tensor([[-0.875, 4.25, 0.125]]))
    torch.testing.assert_close(torch.autograd.grad(spo.sum(), ratio)[0], torch.tensor([[1.5, 7.0, -3.5]]))
    drpo = penalty_loss(ratio, advantages, 0.2, weight)
    torch.testing.assert_close(drpo, torch.tensor([[-1.4375, 3.625, 0.125]]))
    torch.testing.assert_close(torch.autograd.grad(drpo.sum(), ratio)[0], torch.tensor([[-0.75, 4.5, -3.5]]))
    at_the_edge = torch.tensor([[1.2]], requires_grad=True)
    penalty_loss(at_the_edge, torch.tensor([[3.0]]), 0.2).backward()
    assert at_the_edge.grad is not None and float(at_the_edge.grad) == pytest.approx(0.0, abs=1e-5)


def one_step(loss: Any, log_prob: float, old: float, advantage: float, **more: Any) -> tuple[float, float]:
    """Loss and gradient of a single step."""
    log_probs = torch.tensor([[log_prob]], dtype=torch.float64, requires_grad=True)
    arguments: dict[str, Any] = {"ratio_level": "token", "clip_low": 0.2, "clip_high": 0.2, **GAUSSIAN, **more}
    old_log_probs, advantages = torch.tensor([[old]]).double(), torch.tensor([[advantage]]).double()
    mask = torch.ones(1, 1, dtype=torch.bool)
    out = policy_loss(log_probs, old_log_probs, advantages, mask, loss=loss, **arguments).per_step.sum()
    out.backward()
    assert log_probs.grad is not None
    return float(out.detach()), float(log_probs.grad)


def test_reinforce_and_drpo_by_hand() -> None:
    assert one_step("reinforce", -0.7, -3.0, 2.0, ratio_level="none") == pytest.approx((1.4, -2.0))
    # pi 0.3 against mu 0.2, ratio 1.5: the gradient's weight is 1 - (0.3 - 0.2) / 0.5 = 0.8.
    loss, gradient = one_step("drpo", math.log(0.3), math.log(0.2), 2.0, penalty_range=0.5)
    assert loss == pytest.approx(-3.0 + 2.0 * 0.2 * 0.25 / 1.0) and gradient == pytest.approx(-2.0 * 1.5 * 0.8)


def test_dppo_by_hand() -> None:
    ratio = torch.tensor([[1.1, 1.1, 0.9, 0.9, 1.1]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    old_kl = torch.tensor([[2e-5, 2e-5, 2e-5, 2e-5, 5e-6]])
    loss = dppo_loss(ratio, advantages, old_kl, 1e-5)
    torch.testing.assert_close(loss, torch.tensor([[0.0, 1.1, -0.9, 0.0, -1.1]]))
    loss.sum().backward()
    assert ratio.grad is not None and ratio.grad.tolist() == [[0.0, 1.0, -1.0, 0.0, -1.0]]


def test_guard_is_the_inner_product_of_noise_and_shift() -> None:
    """(log ratio + KL) * std of a Gaussian step is mean(z * (mean - old mean)), exactly."""
    torch.manual_seed(0)
    old_mean, noise, std = torch.randn(1, 8).double(), torch.randn(1, 8).double(), 0.3
    mean = (old_mean + 0.1 * torch.randn(1, 8)).requires_grad_()
    reached = old_mean + std * noise

    def log_prob(at: Tensor) -> Tensor:
        return (-0.5 * ((reached - at) / std).square()).mean(1, keepdim=True)

    out = policy_loss(
        log_prob(mean),
        log_prob(old_mean),
        torch.full((1, 1), 2.0).double(),
        torch.ones(1, 1, dtype=torch.bool),
        loss="guard",
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.2,
        old_kl=(0.5 * ((mean - old_mean) / std).square()).mean(1, keepdim=True),
        step_std=torch.tensor([[std]]),
    )
    expected = -2.0 * (noise * (mean - old_mean)).mean(1, keepdim=True).exp()
    torch.testing.assert_close(out.per_step, expected, rtol=1e-6, atol=1e-8)
    gradient = torch.autograd.grad(out.per_step.sum(), mean)[0]
    torch.testing.assert_close(gradient, expected * noise / 8, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", ["guard", "dppo"])
def test_losses_of_gaussian_steps_say_what_they_miss(loss: str) -> None:
    with pytest.raises(ValueError, match="needs Gaussian steps"):
        one_step(loss, -1.0, -1.0, 1.0, old_kl=None)


def test_a_loss_from_elsewhere() -> None:
    assert one_step(lambda terms: terms.ratio * terms.advantages, 0.0, -math.log(2), 3.0) == pytest.approx((6.0, 6.0))


def test_sequence_token_has_the_value_of_the_sequence_and_the_gradient_of_the_step() -> None:
    log_probs = torch.tensor([[-1.0, -1.0, -9.0]], requires_grad=True)
    old, mask = torch.tensor([[-1.5, -2.5, 0.0]]), torch.tensor([[True, True, False]])
    got = log_ratios(log_probs, old, mask, "sequence_token")
    assert got[0, :2].tolist() == [1.0, 1.0]
    # Weights 1 and 3 tell steps apart: a sequence's ratio would give both steps their mean, 2.
    (got * torch.tensor([[1.0, 3.0, 0.0]])).sum().backward()
    assert log_probs.grad is not None and log_probs.grad.tolist() == [[1.0, 3.0, 0.0]]
    assert log_ratios(log_probs, old, mask, "none").eq(0.0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_every_loss_has_the_gradient_of_reinforce(loss: Any) -> None:
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -0.1]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0], [-2.0, -2.0]])
    out = policy_loss(
        log_probs,
        log_probs.detach(),
        advantages,
        torch.ones(2, 2, dtype=torch.bool),
        loss=loss,
        ratio_level="token",
        clip_low=0.2,
        clip_high=5.0,
        **GAUSSIAN,
    )
    out.per_step.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)
    assert out.ratio.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_steps_are_ignored_whatever_they_hold(loss: Any, level: Any) -> None:
    loss_mask = torch.tensor([[True, True, False, False], [False, False, False, False]])
    arguments: dict[str, Any] = {"loss": loss, "ratio_level": level, "clip_low": 0.2, "clip_high": 0.2, **GAUSSIAN}
    log_probs = torch.tensor([[-1.0, -2.0, -math.inf, math.nan]] * 2, requires_grad=True)
    old_log_probs = torch.tensor([[-1.1, -1.8, -math.inf, 0.0]] * 2)
    advantages = torch.tensor([[1.0, 1.0, math.nan, 1.0]] * 2)
    out = policy_loss(log_probs, old_log_probs, advantages, loss_mask, **arguments)
    out.per_step.sum().backward()
    alone = policy_loss(log_probs[:1, :2], old_log_probs[:1, :2], advantages[:1, :2], loss_mask[:1, :2], **arguments)
    torch.testing.assert_close(out.per_step[:1, :2], alone.per_step)
    assert out.per_step[~loss_mask].eq(0.0).all() and out.ratio[~loss_mask].eq(1.0).all()
    assert log_probs.grad is not None and log_probs.grad.isfinite().all() and log_probs.grad[~loss_mask].eq(0.0).all()
    assert log_probs.grad[0, :2].ne(0.0).all()


def test_a_new_loss_need_not_care_about_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "new", lambda terms: 1.0 + terms.log_probs.square() * terms.ratio)
    log_probs = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    out = policy_loss(
        log_probs,
        torch.tensor([[-1.0, math.inf, -math.inf]]),
        torch.ones(1, 3),
        torch.tensor([[True, False, False]]),
        loss="new",  # type: ignore[arg-type]
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.2,
    )
    out.per_step.sum().backward()
    assert out.per_step.tolist() == [[2.0, 0.0, 0.0]]
    assert log_probs.grad is not None and log_probs.grad.tolist() == [[-1.0, 0.0, 0.0]]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_flow_into_log_probs_only(loss: Any) -> None:
    log_probs, old_log_probs, advantages = (
        torch.full((1, 2), value, requires_grad=True) for value in (-1.0, -1.1, 2.0)
    )
    out = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        torch.ones(1, 2, dtype=torch.bool),
        loss=loss,
        ratio_level="token",
        clip_low=0.2,
        clip_high=5.0,
        **GAUSSIAN,
    )
    out.per_step.sum().backward()
    assert log_probs.grad is not None and old_log_probs.grad is None and advantages.grad is None


def test_log_ratios_by_hand() -> None:
    log_probs, old_log_probs = torch.tensor([[-1.0, -1.0, -9.0]]), torch.tensor([[-1.5, -2.5, 0.0]])
    loss_mask = torch.tensor([[True, True, False]])
    assert log_ratios(log_probs, old_log_probs, loss_mask, "token").tolist() == [[0.5, 1.5, 0.0]]
    assert log_ratios(log_probs, old_log_probs, loss_mask, "sequence").tolist() == [[1.0, 1.0, 1.0]]
    assert log_ratios(log_probs, old_log_probs, loss_mask & False, "sequence").tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_absurd_ratio_stays_finite(level: Any) -> None:
    log_probs = torch.tensor([[0.0, 0.0]], requires_grad=True)
    old_log_probs = torch.tensor([[-1000.0, -1000.0]])
    out = policy_loss(
        log_probs,
        old_log_probs,
        torch.full((1, 2), -1.0),
        torch.ones(1, 2, dtype=torch.bool),
        loss="clip",
        ratio_level=level,
        clip_low=0.2,
        clip_high=0.2,
    )
    out.per_step.sum().backward()
    torch.testing.assert_close(out.ratio.detach(), torch.full((1, 2), math.exp(20.0)))
    assert log_probs.grad is not None and log_probs.grad.tolist() == [[0.0, 0.0]]


def test_clip_fractions_by_hand() -> None:
    ratio = torch.tensor([[0.5, 0.5, 1.5, 1.5, 1.5], [1.0, 1.25, 9.0, 0.1, 1.0]])
    advantages = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0, 0.0]])
    loss_mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    low, high = clip_fractions(ratio, advantages, loss_mask, 0.2, 0.3)
    assert (float(low), float(high)) == (0.125, 0.375)
    low, high = clip_fractions(ratio, advantages, torch.zeros_like(loss_mask), 0.2, 0.3)
    assert (float(low), float(high)) == (0.0, 0.0)


def test_unknown_names_are_refused() -> None:
    matrix, loss_mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="known: clip"):
        policy_loss(
            matrix,
            matrix,
            matrix,
            loss_mask,
            loss="ppo",  # type: ignore[arg-type]
            ratio_level="token",
            clip_low=0.2,
            clip_high=0.2,
        )
    with pytest.raises(ValueError, match="known: token"):
        log_ratios(matrix, matrix, loss_mask, "step")  # type: ignore[arg-type]


BOUNDED: list[tuple[str, dict[str, Any], float, float]] = [
    # Ratios 0.5, 0.5, 2, 2, and 1 with a mask after it; advantages of both signs.
    ("clip", {"clip_low": 0.4, "clip_high": 0.9}, 0.2, 0.2),
    ("clip", {"clip_low": 0.6, "clip_high": 1.1}, 0.0, 0.0),
    ("cispo", {"clip_high": 1.9}, 0.0, 0.4),
    # Halved log-ratios: 0.71 and 1.41.
    (
        "guard",
        {"clip_low": 0.2, "clip_high": 0.5, "old_kl": torch.zeros(1, 6), "step_std": torch.tensor(0.5)},
        0.2,
        0.0,
    ),
    ("dppo", {"old_kl": torch.tensor([[1.0, 9.0, 9.0, 1.0, 9.0, 9.0]]), "max_divergence": 5.0}, 0.2, 0.2),
    ("dppo", {"old_kl": torch.tensor([[9.0, 1.0, 9.0, 9.0, 9.0, 9.0]]), "max_divergence": 5.0}, 0.0, 0.2),
]


@pytest.mark.parametrize(("loss", "keys", "low", "high"), BOUNDED)
def test_what_a_bound_cuts_is_counted(loss: str, keys: dict[str, Any], low: float, high: float):
    now = torch.tensor([[0.5, 0.5, 2.0, 2.0, 1.0, 7.0]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[True] * 5 + [False]])
    given = {"clip_low": 0.2, "clip_high": 0.2, "step_std": torch.ones(1, 1), **keys}
    result = policy_loss(now, torch.zeros(1, 6), advantages, mask, loss=loss, ratio_level="token", **given)
    assert result.bounded is not None
    assert [float(share) for share in result.bounded] == pytest.approx([low, high])
    if loss != "cispo":  # which only weighs what it caps
        (gradient,) = torch.autograd.grad(result.per_step.sum(), now)
        assert int((gradient[mask] == 0).sum()) == round(5 * (low + high))


def test_a_loss_without_a_bound_counts_none():
    ones = torch.ones(1, 1)
    result = policy_loss(ones, ones, ones, ones.bool(), loss="sapo", ratio_level="token", clip_low=0.2, clip_high=0.2)
    assert result.bounded is None


@pytest.mark.parametrize(
    ("level", "cut"),
    [
        # Log-ratios of 15 and 15, of 25 and 0, and of 30 and (masked) 30.
        ("token", [[False, False], [True, False], [True, False]]),
        ("sequence", [[False, False], [False, False], [True, False]]),
        ("sequence_product", [[True, True], [True, True], [True, False]]),
        ("none", [[False, False], [False, False], [False, False]]),
    ],
)
def test_ratios_that_overflow_are_counted_at_their_own_level(level: Any, cut: list[list[bool]]):
    now = torch.tensor([[15.0, 15.0], [25.0, 0.0], [30.0, 30.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    result = policy_loss(
        now, torch.zeros(3, 2), torch.ones(3, 2), mask, loss="spo", ratio_level=level, clip_low=0.2, clip_high=0.2
    )
    assert result.overflow.tolist() == cut
    if level != "none":  # which has no gradient at all
        result.per_step.sum().backward()
        assert not now.grad[torch.tensor(cut)].any()

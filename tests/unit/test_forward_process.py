"""Forward-process losses: the authors' numbers, hand-computed numbers, and what the losses are for."""

from typing import Any

import pytest
import torch
from oracle_files import load, of_case
from torch import Tensor

from unified_rl.objectives.forward_process import (
    ForwardTerms,
    awm_loss,
    denoising_score,
    nft_loss,
    nft_rewards,
    squared_error,
    weighted_error,
)

NFT, ARRAYS = load("forward_process_losses")


def terms(output: Tensor, target: Tensor, **changes: Any) -> ForwardTerms:
    """Of a flow at level 0.5 unless changed."""
    level = torch.tensor(0.5, dtype=output.dtype)
    defaults: dict[str, Any] = {
        "output": output, "target": target, "old_output": output.detach(), "clean_scale": -level, "level": level,
        "advantages": torch.ones(len(output), dtype=output.dtype), "advantage_scale": 5.0, "mix_coef": 1.0,
        "error_weight": "uniform", "clip_low": 1.0, "clip_high": 1.0,
    }  # fmt: skip
    return ForwardTerms(**{**defaults, **changes})


@pytest.mark.parametrize("case", NFT["cases"], ids=lambda case: case["name"])
def test_nft_and_its_gradient_are_those_of_the_authors(case: dict[str, Any]) -> None:
    fields = of_case(ARRAYS, case)
    velocity = fields["velocity"].clone().requires_grad_()
    per_row = []
    for row, level in enumerate(fields["timestep"]):
        at = slice(row, row + 1)
        per_row.append(
            nft_loss(
                terms(
                    velocity[at],
                    (fields["noise"] - fields["clean"])[at],
                    old_output=fields["old_velocity"][at],
                    clean_scale=-level,
                    level=level,
                    advantages=fields["advantages"][at],
                    advantage_scale=case["adv_clip_max"],
                    mix_coef=case["beta"],
                )
            )
        )
    loss = torch.cat(per_row).mean()
    loss.backward()
    expected = torch.tensor(case["policy_loss"], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(velocity.grad, fields["grad"], rtol=1e-10, atol=1e-12)
    distance = squared_error(fields["velocity"], fields["ref_velocity"])
    torch.testing.assert_close(distance, fields["kl"], rtol=1e-12, atol=1e-12)


def test_nft_by_hand() -> None:
    # Errors of the old prediction 1 and of the change 0.5 * 2, times the scale -0.5: -1 and 0 of the clean sample, each
    # squared over its own size; r = 0.75.
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = nft_loss(terms(3.0 * one, 0.0 * one, old_output=one, mix_coef=0.5, advantages=torch.tensor([2.5]).double()))
    assert loss.tolist() == [5.0 * (0.75 * 1.0 + 0.25 * 0.0) / 0.5]


def test_rewards_by_hand() -> None:
    got = nft_rewards(torch.tensor([-9.0, -5.0, 0.0, 2.5, 9.0]), 5.0)
    assert got.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("loss", [nft_loss, awm_loss])
@pytest.mark.parametrize(("advantage", "direction"), [(5.0, 1.0), (-5.0, -1.0)])
def test_good_samples_attract_and_bad_ones_repel(loss: Any, advantage: float, direction: float) -> None:
    torch.manual_seed(0)
    target, start = torch.randn(2, 2, 4, 8, 8)
    output = start.clone().requires_grad_()
    loss(terms(output, target, advantages=torch.full((2,), advantage))).sum().backward()
    assert output.grad is not None
    cosine = torch.cosine_similarity(-output.grad.flatten(1), (target - start).flatten(1))
    torch.testing.assert_close(cosine, torch.full((2,), direction))


def test_gradients_flow_into_the_trained_prediction_only() -> None:
    output, old_output, target = (torch.full((1, 4), value, requires_grad=True) for value in (1.0, 2.0, 3.0))
    for loss in (nft_loss, awm_loss):
        loss(terms(output, target.detach(), old_output=old_output)).sum().backward()
    assert output.grad is not None and old_output.grad is None


def test_a_perfect_prediction_is_finite() -> None:
    output = torch.ones(1, 4, requires_grad=True)
    for loss in (nft_loss, awm_loss):
        value = loss(terms(output, torch.ones(1, 4), error_weight="ghuber"))
        value.sum().backward()
        assert value.isfinite().all() and output.grad is not None and output.grad.isfinite().all()


def test_awm_by_hand() -> None:
    # Errors 4 now and 5 before: ratio e. With A = 2 the loss is -2e, beyond 1 + clip_high it is clipped; with A = -1
    # the unclipped one is the larger.
    output = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    zero, old = torch.zeros(1, 1).double(), torch.full((1, 1), 5.0**0.5, dtype=torch.float64)
    loss = awm_loss(terms(output, zero, old_output=old, advantages=torch.tensor([2.0]).double(), clip_high=2.0))
    torch.testing.assert_close(loss.detach(), torch.tensor([-2.0 * torch.e], dtype=torch.float64))
    loss.sum().backward()
    torch.testing.assert_close(output.grad, torch.tensor([[2.0 * torch.e * 4.0]], dtype=torch.float64))
    clipped = awm_loss(terms(output, zero, old_output=old, advantages=torch.tensor([2.0]).double(), clip_high=0.5))
    assert clipped.tolist() == [-3.0]
    bad = awm_loss(terms(output, zero, old_output=old, advantages=torch.tensor([-1.0]).double(), clip_high=0.5))
    torch.testing.assert_close(bad.detach(), torch.tensor([torch.e], dtype=torch.float64))


def test_awm_weights_by_hand() -> None:
    error, level = torch.tensor([16.0, 0.0]).double(), torch.tensor(0.5).double()
    got = {name: weighted_error(error, level, name).tolist() for name in ("uniform", "t", "t2", "huber", "ghuber")}
    assert got["uniform"] == [16.0, 0.0] and got["t"] == [8.0, 0.0] and got["t2"] == [4.0, 0.0]
    assert got["huber"] == pytest.approx([0.5 * (4.0 - 1e-5), 0.0], abs=1e-9)
    assert got["ghuber"] == pytest.approx([2.0 * (2.0 - 1e-10**0.25), 0.0], abs=1e-9)
    with pytest.raises(ValueError, match="known: uniform"):
        weighted_error(error, level, "cubic")


def test_score_is_half_the_error_of_dims() -> None:
    output, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    level = torch.tensor(0.5)
    assert denoising_score(output, target, level).tolist() == [-2.5, -1.0]
    assert denoising_score(output, target, level, "t2").tolist() == [-0.625, -0.25]


def test_t2_is_the_error_of_the_clean_sample_that_a_velocity_predicts() -> None:
    torch.manual_seed(0)
    clean, noise, output = torch.randn(3, 2, 8, dtype=torch.float64)
    level = torch.tensor(0.3, dtype=torch.float64)
    signal = (1 - level**2).sqrt()
    for noised, target, keep in (
        ((1 - level) * clean + level * noise, noise - clean, 1.0),  # a flow's velocity
        (signal * clean + level * noise, signal * noise - level * clean, signal),  # v-prediction
    ):
        predicted = keep * noised - level * output
        expected = -0.5 * squared_error(predicted, clean)
        torch.testing.assert_close(denoising_score(output, target, level, "t2"), expected)

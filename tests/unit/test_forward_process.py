"""DiffusionNFT: the authors' numbers, hand-computed numbers, and what the loss is for."""

from typing import Any

import pytest
import torch
from oracle_files import load, of_case

from unified_rl.objectives.forward_process import nft_loss, nft_rewards, velocity_distance

NFT, ARRAYS = load("forward_process_losses")


@pytest.mark.parametrize("case", NFT["cases"], ids=lambda case: case["name"])
def test_loss_and_gradient_are_those_of_the_authors(case: dict[str, Any]) -> None:
    fields = of_case(ARRAYS, case)
    velocity = fields["velocity"].clone().requires_grad_()
    per_row = nft_loss(
        velocity,
        fields["old_velocity"],
        clean=fields["clean"],
        noise=fields["noise"],
        timestep=fields["timestep"],
        rewards=nft_rewards(fields["advantages"], case["adv_clip_max"]),
        mix_coef=case["beta"],
    )
    loss = case["adv_clip_max"] * per_row.mean()
    loss.backward()
    expected = torch.tensor(case["policy_loss"], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(velocity.grad, fields["grad"], rtol=1e-12, atol=1e-12)
    distance = velocity_distance(fields["velocity"], fields["ref_velocity"])
    torch.testing.assert_close(distance, fields["kl"], rtol=1e-12, atol=1e-12)


def test_nft_loss_by_hand() -> None:
    # x_t 1, old clean 0.5, change 0.5 * 2: positive clean 0, negative 1, against clean -1: errors 1 and 2, each
    # squared over itself; (0.75 * 1 + 0.25 * 2) / 0.5.
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = nft_loss(
        3.0 * one,
        one,
        clean=-one,
        noise=3.0 * one,
        timestep=torch.tensor([0.5], dtype=torch.float64),
        rewards=torch.tensor([0.75], dtype=torch.float64),
        mix_coef=0.5,
    )
    assert loss.tolist() == [2.5]


def test_rewards_by_hand() -> None:
    got = nft_rewards(torch.tensor([-9.0, -5.0, 0.0, 2.5, 9.0]), 5.0)
    assert got.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("reward", "direction"), [(1.0, 1.0), (0.0, -1.0)])
def test_good_samples_attract_and_bad_ones_repel(reward: float, direction: float) -> None:
    torch.manual_seed(0)
    clean, noise, old_velocity = torch.randn(3, 2, 4, 8, 8)
    velocity = old_velocity.clone().requires_grad_()
    nft_loss(
        velocity,
        old_velocity,
        clean=clean,
        noise=noise,
        timestep=torch.tensor([0.3, 0.8]),
        rewards=torch.full((2,), reward),
        mix_coef=1.0,
    ).sum().backward()
    assert velocity.grad is not None
    towards_clean = (noise - clean) - old_velocity
    cosine = torch.cosine_similarity(-velocity.grad.flatten(1), towards_clean.flatten(1))
    torch.testing.assert_close(cosine, torch.full((2,), direction))


def test_gradients_flow_into_the_trained_velocity_only() -> None:
    velocity, old_velocity, ref_velocity = (torch.full((1, 4), value, requires_grad=True) for value in (1.0, 2.0, 3.0))
    loss = nft_loss(
        velocity,
        old_velocity,
        clean=torch.zeros(1, 4),
        noise=torch.ones(1, 4),
        timestep=torch.tensor([0.5]),
        rewards=torch.tensor([0.7]),
        mix_coef=0.5,
    )
    (loss + velocity_distance(velocity, ref_velocity)).sum().backward()
    assert velocity.grad is not None and old_velocity.grad is None and ref_velocity.grad is None


def test_a_perfect_prediction_is_finite() -> None:
    clean, noise = torch.zeros(1, 4), torch.ones(1, 4)
    velocity = (noise - clean).requires_grad_()
    arguments = {"clean": clean, "noise": noise, "timestep": torch.tensor([0.5]), "rewards": torch.tensor([1.0])}
    loss = nft_loss(velocity, noise - clean, mix_coef=1.0, **arguments)
    loss.sum().backward()
    assert loss.tolist() == [0.0] and velocity.grad is not None and velocity.grad.isfinite().all()

"""Generalised advantage estimation, the value loss and explained variance, by hand."""

import math

import pytest
import torch
from torch import Tensor

from unified_rl.objectives.value import gae, gae_over_turns, value_loss
from unified_rl.recipe.critic import Critic
from unified_rl.recipe.objective import Objective
from unified_rl.types import Segment
from unified_rl.valuation import Valued, value_metrics, valued_advantages


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_gae_by_hand():
    # gamma 0.5, lambda 0.8, V = 1, 2, 4, R = 3 at the end: deltas 0.5 * 2 - 1 = 0, 0.5 * 4 - 2 = 0, 3 - 4 = -1;
    # A = -0.4^2, -0.4, -1.
    mask = torch.ones(1, 3, dtype=torch.bool)
    got = gae(matrix([0, 0, 3]), matrix([1, 2, 4]), mask, gamma=0.5, gae_lambda=0.8)
    torch.testing.assert_close(got, matrix([-0.16, -0.4, -1.0]))


def test_gae_with_lambda_1_is_the_return_minus_the_value_and_with_0_one_difference():
    rewards, values = matrix([1, 0, 2, 5]), matrix([0.3, -1, 2, 0.7])
    mask = torch.ones(1, 4, dtype=torch.bool)
    returns = matrix([8, 7, 7, 5])
    torch.testing.assert_close(gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0), returns - values)
    following = matrix([-1, 2, 0.7, 0])
    torch.testing.assert_close(gae(rewards, values, mask, gamma=1.0, gae_lambda=0.0), rewards + following - values)


def test_masked_steps_are_passed_over():
    """An environment's tokens between two decisions, padding, and deterministic steps: nothing is discounted there."""
    mask = torch.tensor([[True, False, False, True, True, False]])
    nan = float("nan")
    got = gae(matrix([0, nan, 9, 0, 3, nan]), matrix([1, nan, 9, 2, 4, nan]), mask, gamma=0.5, gae_lambda=0.8)
    torch.testing.assert_close(got, matrix([-0.16, 0, 0, -0.4, -1.0, 0]))
    empty = gae(matrix([1, 1]), matrix([1, 1]), torch.zeros(1, 2, dtype=torch.bool), gamma=1.0, gae_lambda=1.0)
    assert empty.eq(0).all()


def test_gae_over_turns_by_hand():
    # The same numbers as decisions of two, one and two tokens; the environment speaks before the last turn.
    mask = torch.tensor([[True, True, True, False, True, True]])
    turns = torch.tensor([[0, 0, 1, 2, 2, 2]])
    rewards, values = matrix([0, 0, 0, 9, 1, 2]), matrix([1, 50, 2, 70, 4, 60])
    got, first = gae_over_turns(rewards, values, mask, turns, gamma=0.5, gae_lambda=0.8)
    torch.testing.assert_close(got, matrix([-0.16, -0.16, -0.4, 0, -1.0, -1.0]))
    assert first.tolist() == [[True, False, True, False, True, False]]


def test_turns_of_one_step_are_steps():
    torch.manual_seed(0)
    rewards, values = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    mask = torch.rand(5, 7) > 0.3
    turns = torch.arange(7).expand(5, 7)
    by_turn, first = gae_over_turns(rewards, values, mask, turns, gamma=0.9, gae_lambda=0.7)
    assert torch.equal(first, mask)
    # Where a turn is masked altogether it is no decision either.
    torch.testing.assert_close(by_turn, gae(rewards, values, mask, gamma=0.9, gae_lambda=0.7))


def test_value_loss_by_hand():
    values = torch.tensor([[0.0, 1.0, 3.0]], requires_grad=True)
    old, returns = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 1.0]])
    # Within the bound; beyond it on the way to the return (the bound has the larger loss, and no gradient); beyond it
    # on the far side (the plain loss is larger and pulls back).
    loss, bounded = value_loss(values, old, returns, clip=0.5)
    torch.testing.assert_close(loss, torch.tensor([[0.5, 0.5 * 1.5**2, 2.0]]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-1.0, 0.0, 2.0]]))
    assert bounded.tolist() == [[False, True, False]]
    loss, bounded = value_loss(values, old, returns, clip=None)
    torch.testing.assert_close(loss, torch.tensor([[0.5, 0.5, 2.0]]))
    assert not bounded.any()


def valued(total: list[float], values: Tensor, mask: Tensor, penalties: Tensor | None = None, **critic: object):
    objective = Objective(advantage="gae", critic=Critic(**{"gae_lambda": 1.0, "whiten": False, **critic}))
    segment = Segment(
        actions={},
        rollout_log_probs=torch.zeros(mask.shape),
        loss_mask=mask,
        turn_ids=torch.zeros(mask.shape, dtype=torch.int64),
    )
    return valued_advantages(objective, segment, values, torch.tensor(total), penalties)


def explained(trained: Valued) -> float:
    return value_metrics([trained])["value/explained_variance"]


MASK = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
VALUES = torch.tensor([[0.5, 0.5, 0.5], [0.0, 1.0, 9.0], [7.0, 7.0, 7.0]])


def test_rewards_count_at_the_last_step_and_excluded_rows_not_at_all():
    advantages, trained = valued([1.0, 2.0, float("nan")], VALUES, MASK)
    metrics = value_metrics([trained])
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 0.5, 0.5], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(trained.returns, torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
    assert trained.mask.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    # Returns 1, 1, 1, 2, 2: variance 0.3; errors 0.5, 0.5, 0.5, 2, 1: mean 0.9, variance (3 * 0.16 + 1.21 + 0.01) / 4.
    assert metrics["value/explained_variance"] == pytest.approx(1 - 0.425 / 0.3)
    assert metrics["value/mean"] == pytest.approx(0.5)


def test_a_perfect_critic_explains_everything_and_a_constant_nothing():
    returns = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    total = [1.0, 2.0, float("nan")]
    assert explained(valued(total, returns, MASK)[1]) == pytest.approx(1.0)
    assert explained(valued(total, torch.full((3, 3), 0.3), MASK)[1]) == pytest.approx(0.0)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1000.1])
def test_returns_that_do_not_vary_are_explained_by_nothing(reward: float):
    """Also where rounding makes them differ: a run whose rewards are tied has no bad critic."""
    assert math.isnan(explained(valued([reward] * 3, VALUES / 7.0, MASK)[1]))


def test_the_critics_of_several_segments_are_judged_together():
    first, second = (
        valued([1.0, 2.0, 4.0], VALUES, MASK)[1],
        valued([3.0, -1.0, 0.5], VALUES[:, :2] * 0.1, MASK[:, :2])[1],
    )
    returns = torch.cat([part.returns[part.mask] for part in (first, second)])
    values = torch.cat([part.values[part.mask] for part in (first, second)])
    metrics = value_metrics([first, second])
    assert metrics["value/explained_variance"] == pytest.approx(float(1 - (returns - values).var() / returns.var()))
    assert metrics["value/mean"] == pytest.approx(float(values.mean())) and value_metrics([]) == {}


def test_penalties_are_taken_off_each_step():
    penalties = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    advantages, _ = valued([1.0, 2.0, 3.0], torch.zeros(3, 3), MASK, penalties)
    torch.testing.assert_close(advantages[0], torch.tensor([0.4, 0.5, 0.7]))


def test_whitened_advantages_have_mean_0_and_std_1():
    advantages, trained = valued([1.0, 2.0, float("nan")], VALUES, MASK, whiten=True)
    chosen = advantages[trained.mask]
    assert chosen.mean() == pytest.approx(0.0, abs=1e-6) and chosen.std() == pytest.approx(1.0)
    plain, _ = valued([1.0, 2.0, float("nan")], VALUES, MASK)
    torch.testing.assert_close(trained.returns, valued([1.0, 2.0, float("nan")], VALUES, MASK)[1].returns)
    assert torch.equal(advantages[trained.mask].argsort(stable=True), plain[trained.mask].argsort(stable=True))

"""Controllers, importance correction and masks: hand-computed numbers, and states that go on exactly."""

import json
import math

import pytest
import torch

from unified_rl.objectives.control import EntropyController, KLController
from unified_rl.objectives.correction import entropy_threshold, importance_weights, off_policy_keep

MASK = torch.tensor([[True, True, False], [True, True, True]])
OLD = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, -1.0, -1.0]])
ROLLOUT = torch.tensor([[-1.0 - math.log(2), -2.0 - math.log(2), 0.0], [-1.0 + math.log(2), -1.0, -1.0 - math.log(4)]])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Ratios: row 0: 2, 2 (product 4, geometric mean 2); row 1: 1/2, 1, 4 (product 2, geometric mean 2^(1/3)).
        ({"mode": "truncate", "level": "token", "cap": 3.0}, [[2, 2, 1], [0.5, 1, 3]]),
        ({"mode": "mask", "level": "token", "cap": 3.0}, [[2, 2, 1], [0.5, 1, 0]]),
        ({"mode": "mask", "level": "token", "cap": 3.0, "floor": 0.6}, [[2, 2, 1], [0, 1, 0]]),
        ({"mode": "truncate", "level": "sequence", "cap": 3.0}, [[3, 3, 1], [2, 2, 2]]),
        ({"mode": "mask", "level": "sequence", "cap": 3.0}, [[0, 0, 1], [2, 2, 2]]),
        ({"mode": "truncate", "level": "sequence_mean", "cap": 1.5}, [[1.5, 1.5, 1], [2 ** (1 / 3)] * 3]),
        ({"mode": "none", "level": "token", "cap": 3.0}, [[1, 1, 1], [1, 1, 1]]),
    ],
)
def test_importance_weights_by_hand(arguments, expected):
    got = importance_weights(OLD, ROLLOUT, MASK, **arguments)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))


def test_unknown_corrections_are_refused():
    with pytest.raises(ValueError, match="known: none, truncate, mask"):
        importance_weights(OLD, ROLLOUT, MASK, mode="cut", level="token", cap=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="known: token, sequence"):
        importance_weights(OLD, ROLLOUT, MASK, mode="mask", level="row", cap=1.0)  # type: ignore[arg-type]


def test_off_policy_sequences_are_dropped_by_hand():
    now, sampled = torch.tensor([[-2.0, -1.0, 9.0]] * 3), torch.tensor([[-1.0, -1.0, -9.0]] * 3)
    mask = torch.tensor([[True, True, False]] * 3)
    advantages = torch.tensor([[-1.0], [1.0], [0.0]]).expand(3, 3)
    # The mean of sampled - now is 0.5 nats; only a negative advantage is dropped.
    assert off_policy_keep(now, sampled, advantages, mask, 0.4)[:, 0].tolist() == [False, True, True]
    assert off_policy_keep(now, sampled, advantages, mask, 0.6).all()


def test_entropy_threshold_by_hand():
    entropy = torch.tensor([0.0, 1.0, math.nan, 2.0, 3.0, 4.0])
    assert entropy_threshold(entropy, 0.5) == 2.0 and entropy_threshold(entropy, 1.0) == 0.0
    assert entropy_threshold(torch.tensor([math.nan]), 0.2) == -math.inf


def test_an_update_may_have_more_tokens_than_torch_s_quantile_takes():
    entropy = torch.zeros(2**24 + 2)
    entropy[: 2**23] = 1.0
    assert entropy_threshold(entropy, 0.4) == 1.0 and entropy_threshold(entropy, 0.6) == 0.0


def test_kl_controller_by_hand():
    controller = KLController(0.1, 0.02, gain_p=0.2, gain_i=0.1)
    controller.observe(0.03)  # error 0.5: integral 0.05, proportional 0.1
    assert controller.coef == pytest.approx(0.1 * math.exp(0.15))
    controller.observe(0.0)  # error -1: integral -0.05, proportional -0.2
    assert controller.coef == pytest.approx(0.1 * math.exp(-0.25))
    controller.observe(math.inf)  # counts as 1: integral 0.05, proportional 0.2
    assert controller.coef == pytest.approx(0.1 * math.exp(0.25))


def test_kl_controller_reaches_its_target_and_does_not_wind_up():
    controller = KLController(1.0, 0.05, gain_p=0.2, gain_i=0.1)
    for _ in range(300):
        controller.observe(0.01 / controller.coef)  # a policy whose divergence falls with the coefficient
    assert 0.01 / controller.coef == pytest.approx(0.05, rel=1e-3)
    for _ in range(10_000):
        controller.observe(1.0)
    assert controller.coef == pytest.approx(math.exp(7.0))
    for _ in range(150):
        controller.observe(0.0)
    assert controller.coef < 1.0


def test_entropy_controller_by_hand():
    controller = EntropyController(0.0, 0.2, 0.005)
    assert controller.coef == 0.0
    controller.observe(0.1)
    controller.observe(0.1)
    assert controller.coef == pytest.approx(0.01)
    controller.observe(0.3)  # above the target: the coefficient rests, and is smaller when it acts again
    assert controller.coef == 0.0
    controller.observe(0.1)
    assert controller.coef == pytest.approx(0.01)


def test_controllers_go_on_from_their_state():
    for make in (lambda: KLController(0.1, 0.02, 0.2, 0.1), lambda: EntropyController(0.01, 0.2, 0.005)):
        whole, first, second = make(), make(), make()
        for value in (0.03, 0.4, 0.01):
            whole.observe(value)
            first.observe(value)
        second.restore(json.loads(json.dumps(first.state())))
        assert second.coef == whole.coef
        for value in (0.5, 0.001):
            whole.observe(value)
            second.observe(value)
        assert second.coef == whole.coef

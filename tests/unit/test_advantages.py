"""Advantages: hand-computed numbers, excluded samples, and groups that must teach nothing."""

import json
import math
from typing import Any, get_args

import pytest
import torch

from unified_rl.advantages import (
    Normalise,
    PromptStatistics,
    batch_advantages,
    gdpo_advantages,
    group_advantages,
    pass_k_advantages,
    zero_std_fraction,
)

NAN = math.nan
REWARDS = torch.tensor([1.0, 10.0, 2.0, 14.0, 3.0])
GROUPS = torch.tensor([7, 2, 7, 2, 7])


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        # Group 7: mean 2, unbiased std 1; group 2: mean 12, std sqrt(8); all: mean 6, std sqrt(130 / 4).
        ("group_mean", [-1.0, -2.0, 0.0, 2.0, 1.0]),
        ("group_std", [-1 / 1.0001, -2 / (8**0.5 + 1e-4), 0.0, 2 / (8**0.5 + 1e-4), 1 / 1.0001]),
        # Group 7: (1 - 2.5, 2 - 2, 3 - 1.5); group 2: the other member.
        ("rloo", [-1.5, -4.0, 0.0, 4.0, 1.5]),
        # The centred rewards -1, -2, 0, 2, 1 have variance 10 / 4.
        ("group_whitened", [value / (2.5**0.5 + 1e-4) for value in (-1.0, -2.0, 0.0, 2.0, 1.0)]),
        ("global_std", [value / (32.5**0.5 + 1e-4) for value in (-1.0, -2.0, 0.0, 2.0, 1.0)]),
    ],
)
def test_advantages_by_hand(normalise: Normalise, expected: list[float]) -> None:
    got = group_advantages(REWARDS, GROUPS, normalise=normalise)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_clip() -> None:
    got = group_advantages(REWARDS, GROUPS, normalise="group_mean", clip=1.5)
    assert got.tolist() == [-1.0, -1.5, 0.0, 1.5, 1.0]


@pytest.mark.parametrize("normalise", get_args(Normalise))
def test_excluded_samples_enter_no_statistic(normalise: Normalise) -> None:
    rewards = torch.tensor([NAN, 1.0, 10.0, 2.0, NAN, 14.0, 3.0, NAN])
    groups = torch.tensor([7, 7, 2, 7, 2, 2, 7, 99])
    got = group_advantages(rewards, groups, normalise=normalise)
    valid = ~rewards.isnan()
    torch.testing.assert_close(got[valid], group_advantages(REWARDS, GROUPS, normalise=normalise))
    assert got[~valid].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("normalise", get_args(Normalise))
@pytest.mark.parametrize(
    "group",
    [
        [5.0],
        [5.0, NAN, NAN],
        [NAN, NAN],
        [0.0, 0.0, 0.0],
        [-3.7, -3.7, -3.7],
        [0.3, 0.30000001192092896, 0.30000004172325134],  # neighbouring float32 numbers
        [-0.3, -0.30000004172325134],
        [1e8, 1e8, 1e8 + 8],
        [1e-9, 1e-9],
    ],
)
def test_tied_groups_and_groups_of_one_get_exactly_zero(group: list[float], normalise: Normalise) -> None:
    rewards = torch.tensor([*group, 1.0, 4.0])
    groups = torch.tensor([0] * len(group) + [1, 1])
    got = group_advantages(rewards, groups, normalise=normalise)
    assert got[:-2].tolist() == [0.0] * len(group)
    assert got[-2] < 0 < got[-1]
    alone = group_advantages(rewards[:-2], groups[:-2], normalise=normalise)
    assert alone.tolist() == [0.0] * len(group)


def test_small_but_real_differences_count() -> None:
    got = group_advantages(torch.tensor([1.0, 1.001]), torch.tensor([0, 0]), normalise="group_std")
    # std 0.000707 against the 0.0001 that is added to it.
    torch.testing.assert_close(got, torch.tensor([-0.6195, 0.6195]), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("normalise", get_args(Normalise))
def test_order_and_group_numbers_do_not_matter(normalise: Normalise) -> None:
    torch.manual_seed(0)
    rewards, groups = torch.randn(24), torch.arange(24) // 6
    order = torch.randperm(24)
    expected = group_advantages(rewards, groups, normalise=normalise)
    got = group_advantages(rewards[order], (2**40 - groups)[order], normalise=normalise)
    torch.testing.assert_close(got, expected[order])
    assert got.dtype == torch.float32
    torch.testing.assert_close(expected.reshape(4, 6).mean(1), torch.zeros(4), rtol=0.0, atol=1e-6)


def test_zero_std_fraction_by_hand() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 5.0, NAN, 2.0, NAN, NAN])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])
    # Group 0 is tied, 1 and 2 are not, 3 has no valid sample and does not count.
    assert zero_std_fraction(rewards, groups) == pytest.approx(1 / 3)
    assert zero_std_fraction(torch.tensor([1.0, NAN]), torch.tensor([0, 0])) == 1.0
    assert zero_std_fraction(torch.tensor([NAN, NAN]), torch.tensor([0, 1])) == 0.0


def test_infinite_rewards_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(torch.tensor([1.0, math.inf]), torch.tensor([0, 0]), normalise="group_std")
    with pytest.raises(ValueError, match="known: group_std"):
        group_advantages(REWARDS, GROUPS, normalise="std")  # type: ignore[arg-type]


def test_batch_whitening_by_hand() -> None:
    # Mean 6, variance 130 / 4; the excluded sample counts nowhere.
    got = batch_advantages(torch.tensor([1.0, 10.0, NAN, 2.0, 14.0, 3.0]))
    expected = torch.tensor([-5.0, 4.0, 0.0, -4.0, 8.0, -3.0]) / (32.5**0.5 + 1e-4)
    torch.testing.assert_close(got, expected)
    assert batch_advantages(torch.tensor([0.3, 0.3, NAN])).tolist() == [0.0, 0.0, 0.0]
    assert float(batch_advantages(REWARDS, clip=0.5).abs().max()) == 0.5


def test_gdpo_by_hand() -> None:
    groups = torch.tensor([0, 0, 1, 1])
    breakdown = {
        "big": torch.tensor([100.0, 300.0, 100.0, 100.0]),
        "small": torch.tensor([0.02, 0.01, 0.01, 0.02]),
        "watched": torch.tensor([1.0, 9.0, NAN, 4.0]),
    }
    got = gdpo_advantages(breakdown, {"big": 1.0, "small": 3.0}, torch.ones(4, dtype=torch.bool), groups)
    # Of two members, +-1 / sqrt(2) of the std; the small reward's std 0.00707 feels the 0.0001 beside it.
    half, small = 0.5**0.5, 0.005 / (0.005 * 2**0.5 + 1e-4)
    total = torch.tensor([-half + 3 * small, half - 3 * small, -3 * small, 3 * small], dtype=torch.float64)
    torch.testing.assert_close(got.double(), total / (total.std() + 1e-4), rtol=1e-5, atol=1e-6)


def test_gdpo_leaves_excluded_samples_out() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1])
    breakdown = {"a": torch.tensor([1.0, 2.0, 50.0, 5.0, 7.0]), "b": torch.tensor([1.0, 0.0, NAN, 0.0, 1.0])}
    valid = torch.tensor([True, True, False, True, True])
    got = gdpo_advantages(breakdown, {"a": 1.0, "b": 0.5}, valid, groups)
    kept = {name: values[valid] for name, values in breakdown.items()}
    alone = gdpo_advantages(kept, {"a": 1.0, "b": 0.5}, valid[valid], groups[valid])
    torch.testing.assert_close(got[valid], alone)
    assert got[2] == 0.0 and alone.abs().min() > 0.1


def test_pass_k_by_hand() -> None:
    rewards = torch.tensor([1.0, 4.0, 2.0, 5.0, 5.0, 0.0, 7.0, NAN, 3.0, 3.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    # Group 0 leads by 2, with variance 7 / 3; a shared first place, a single sample and a tie get nothing.
    expected = [0.0, 2.0 / ((7 / 3) ** 0.5 + 1e-4)] + [0.0] * 8
    torch.testing.assert_close(pass_k_advantages(rewards, groups), torch.tensor(expected))


def test_prompt_statistics_by_hand() -> None:
    tracker = PromptStatistics(buffer_size=3, min_count=3)
    first = tracker.advantages(torch.tensor([1.0, 2.0, 6.0, NAN]), ["a", "a", "b", "b"])
    # Too few of each prompt: the batch has mean 3 and variance 7.
    torch.testing.assert_close(first, torch.tensor([-2.0, -1.0, 3.0, 0.0]) / (7**0.5 + 1e-4))
    second = tracker.advantages(torch.tensor([3.0, 8.0]), ["a", "b"])
    # a: 1, 2, 3; b: 6, 8 are still too few: the batch has mean 5.5 and std 2.5 * sqrt(2).
    torch.testing.assert_close(second, torch.tensor([1.0 / 1.0001, 2.5 / (2.5 * 2**0.5 + 1e-4)]))
    third = tracker.advantages(torch.tensor([7.0]), ["a"])
    torch.testing.assert_close(third, torch.tensor([3.0 / (7**0.5 + 1e-4)]))  # 2, 3, 7: the oldest is gone
    tied = PromptStatistics(buffer_size=4, min_count=2)
    assert tied.advantages(torch.tensor([5.0, 5.0, 9.0, 1.0]), ["a", "a", "b", "b"])[:2].tolist() == [0.0, 0.0]


def test_prompt_statistics_go_on_from_their_state() -> None:
    torch.manual_seed(0)
    rollouts = [torch.randn(6) for _ in range(4)]
    keys = ["a", "b", "a", "c", "a", "b"]
    whole, first, second = (PromptStatistics(buffer_size=5, min_count=3) for _ in range(3))
    for rewards in rollouts[:2]:
        whole.advantages(rewards, keys)
        first.advantages(rewards, keys)
    second.restore(json.loads(json.dumps(first.state())))
    for rewards in rollouts[2:]:
        assert torch.equal(second.advantages(rewards, keys), whole.advantages(rewards, keys))
    assert second.state() == whole.state()


def test_every_std_is_the_one_that_is_asked_for() -> None:
    """Of numpy's kind, with 0.5 beside it."""
    asked: dict[str, Any] = {"std_eps": 0.5, "population_std": True}
    rewards, groups = torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, dtype=torch.int64)
    centred, std = rewards - 3.0, (14 / 3) ** 0.5
    for normalise in ("group_std", "global_std", "group_whitened"):
        got = group_advantages(rewards, groups, normalise=normalise, **asked)  # type: ignore[arg-type]
        torch.testing.assert_close(got, centred / (std + 0.5))
    torch.testing.assert_close(batch_advantages(rewards, **asked), centred / (std + 0.5))
    got = PromptStatistics(9, 2, **asked).advantages(rewards, ["a"] * 3)
    torch.testing.assert_close(got, centred / (std + 0.5))
    got = pass_k_advantages(rewards, groups, **asked)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 4.0 / (std + 0.5)]))
    # GDPO: the group's normalisation first, whose std is std / (std + 0.5), and then all samples'.
    scale = std / (std + 0.5)
    got = gdpo_advantages({"a": rewards}, {"a": 1.0}, torch.ones(3, dtype=torch.bool), groups, **asked)
    torch.testing.assert_close(got, centred / (std + 0.5) / (scale + 0.5))

"""What counts of what rewards say, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from unified_rl.errors import RecipeError
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.reward import Gate
from unified_rl.rewards.composition import compose, shares_of, standardised
from unified_rl.rewards.runner import Outcome
from unified_rl.rewards.scoring import LoadedReward, RewardError, RewardFailedError, reward_of

NAN = math.nan


def reward(name: str, **keys) -> LoadedReward:
    return replace(reward_of(lambda completions: [], name=name), **keys)


def test_clip_normalise_gate_weight_in_this_order() -> None:
    rewards = [
        reward(
            "quality", weight=2.0, clip=(0.0, 4.0), normalise="batch", only_if=Gate(reward="format", otherwise=-3.0)
        ),
        reward("format", weight=0.5),
    ]
    values = {"quality": [-9.0, 4.0, 99.0, 0.0, NAN], "format": [1.0, 1.0, 0.5, NAN, 1.0]}
    scores = compose(rewards, values, {})
    # clipped: 0 4 4 0; mean 2, std 2: -1 1 1 -1; gated: the third gets -3, the fourth's gate abstained
    torch.testing.assert_close(scores.shaped["quality"], torch.tensor([-1.0, 1.0, -3.0, NAN, NAN]), equal_nan=True)
    torch.testing.assert_close(scores.total, torch.tensor([-1.5, 2.5, -5.75, NAN, NAN]), equal_nan=True)
    torch.testing.assert_close(scores.breakdown["quality"], torch.tensor(values["quality"]), equal_nan=True)


def test_equal_values_normalise_to_zero() -> None:
    assert standardised(torch.tensor([5.0, 5.0])).tolist() == [0.0, 0.0]
    assert standardised(torch.tensor([NAN])).isnan().all()


def test_failures_above_the_limit_stop_with_the_name() -> None:
    judge = reward("judge", max_failures=0.25)
    fine = Outcome(values=[1.0, 1.0, NAN, 1.0], failed=1, reason="failed: x", metrics={"length": 3.0})
    assert shares_of([judge], {"judge": fine}) == {
        "failures/judge": 1.0,
        "reward_log/judge/length": 3.0,
        "time/reward_work": 0.0,
    }
    much = Outcome(values=[1.0, NAN, NAN, 1.0], failed=2, reason="failed: x")
    with pytest.raises(RewardFailedError, match=r"^reward 'judge' failed: x \(in 2 of 4 completions, more than max"):
        shares_of([judge], {"judge": much})
    with pytest.raises(RewardError, match=r"^reward 'judge' needs the column 'a'$"):
        shares_of([judge], {"judge": Outcome(values=[NAN], failed=0, reason="needs the column 'a'", fatal=True)})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.0.held_out=true", "rewards.0: weight: 1, but held_out rewards are only measured"),
        ("rewards.0.clip=[1, 0]", r"rewards.0: clip: \[1.0, 0.0\] is no range"),
        ("rewards.0={name: answer, isolation: thread, memory_mib: 5}", "rewards.0: memory_mib: a thread has no memory"),
    ],
)
def test_keys_that_contradict_each_other(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}"):
        load_recipe("quickstart_vlm", [override])

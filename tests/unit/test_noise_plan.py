"""Which steps are noisy in which rollout, by hand."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.toys import Bandit, again, build_parts
from unified_rl.errors import RecipeError
from unified_rl.policies.noise_plan import check_plan, group_seed, noisy_steps, stored_steps, window_start
from unified_rl.recipe.policy import DiffusionSampling, NoiseShift
from unified_rl.train import Position, StopSignal, run_loop, start


def plans(rollouts: Any, *, seed: int = 0, **keys: Any) -> list[list[int] | None]:
    sampling = DiffusionSampling(**{"num_inference_steps": 10, **keys})
    return [noisy_steps(sampling, seed=seed, rollout=rollout) for rollout in rollouts]


def test_all_and_the_first():
    assert plans([0]) == [None]
    assert plans([0, 9], noise_steps=3) == [[0, 1, 2]] * 2
    assert plans([0], noise_steps=99) == [list(range(10))]
    assert plans([0], noise_range=(2, 5)) == [[2, 3, 4]]
    assert plans([0], noise_range=(2, 5), noise_steps=2) == [[2, 3]]


def test_a_random_subset_is_drawn_anew_and_again_the_same():
    keys = {"noise_place": "random", "noise_steps": 3, "noise_range": (1, 6)}
    many = plans(range(200), **keys)
    assert all(plan == sorted(set(plan)) and len(plan) == 3 and set(plan) <= {1, 2, 3, 4, 5} for plan in many)
    assert len({tuple(plan) for plan in many}) == 10, "all of 5 over 3"
    assert plans(range(200), **keys) == many
    assert plans(range(200), **keys, seed=1) != many


def test_a_window_slides_and_begins_anew():
    keys = {"noise_place": "window", "noise_steps": 4, "num_inference_steps": 7}
    starts = [plan[0] for plan in plans([0, 24, 25, 50, 75, 99, 100], **keys)]
    assert starts == [0, 0, 1, 2, 3, 3, 0]
    assert plans([75], **keys) == [[3, 4, 5, 6]]
    assert [window_start(NoiseShift(every=1, stride=2), 4, seed=0, rollout=r) for r in range(4)] == [0, 2, 0, 2]


def test_a_random_window_stays_for_its_interval():
    starts = [window_start(NoiseShift(schedule="random", every=5), 7, seed=3, rollout=r) for r in range(500)]
    assert set(starts) == set(range(7))
    assert all(starts[r] == starts[r - r % 5] for r in range(500))


def test_a_decaying_window_leaves_late_places_sooner():
    shift = NoiseShift(schedule="decaying", every=10, rate=0.5, threshold=1)
    # starts 0 and 1: 10 rollouts; 2: ceil(10 exp(-0.5)) = 7; 3: ceil(10 exp(-1)) = 4
    starts = [window_start(shift, 4, seed=0, rollout=r) for r in range(33)]
    assert [starts.count(start) for start in range(4)] == [10 + 2, 10, 7, 4]
    assert starts[31:] == [0, 0]


def test_a_branch_is_a_window_from_anywhere():
    many = plans(range(100), noise_place="branch", noise_steps=2, noise_range=(0, 5))
    assert {tuple(plan) for plan in many} == {(0, 1), (1, 2), (2, 3), (3, 4)}


def test_groups_have_seeds_of_their_own():
    seeds = {group_seed(seed, group) for seed in range(3) for group in range(50)}
    assert len(seeds) == 150 and all(0 <= seed < 1 << 63 for seed in seeds)


def test_what_a_replay_needs():
    assert stored_steps([False, False, True, True, False, False]) == [1, 2, 3, 5]
    assert stored_steps([True, False, True]) == [0, 1, 2]
    assert stored_steps([False, False]) == [1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"noise_range": (4, 11)}, "noise_range: .4, 11. is no range of the 10 steps"),
        ({"noise_range": (4, 4)}, "noise_range"),
        ({"noise_place": "window"}, "noise_place window needs the number of steps, at most 10"),
        ({"noise_place": "random", "noise_steps": 4, "noise_range": (0, 3)}, "at most 3"),
    ],
)
def test_impossible_plans_are_refused(keys: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plans([0], **keys)


def test_a_loop_that_is_shorter_than_its_plan_is_refused_at_once():
    """Of a picture and strength 0.5; else a window would leave the loop in the middle of a run."""
    window = DiffusionSampling(num_inference_steps=10, noise_steps=2, noise_place="window")
    with pytest.raises(RecipeError, match=r"noise_place window may choose .* 0 to 9, but the loop has 5 .* say .0, 5."):
        check_plan(window, 5, noisy=2)
    check_plan(window, 10, noisy=2)
    check_plan(window.model_copy(update={"noise_range": (0, 5)}), 5, noisy=2)
    check_plan(DiffusionSampling(num_inference_steps=10), 5, noisy=5)
    check_plan(DiffusionSampling(num_inference_steps=10, noise_level=0.0), 5, noisy=0)
    with pytest.raises(RecipeError, match="none of the 5 steps of the loop is noisy; see noise_range"):
        check_plan(DiffusionSampling(num_inference_steps=10, noise_range=(7, 9)), 5, noisy=0)


class Counting(Bandit):
    """Notes the number of each rollout that it draws."""

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        drawn.append(self.rollout)
        return super().sample(*args, **kwargs)


drawn: list[int] = []


def test_the_trainer_counts_rollouts_across_a_resume(tmp_path: Path):
    drawn.clear()
    keys: dict[str, Any] = {"epochs": 2, "num_steps": 8, "checkpoint": {"every": 1, "keep": 9}, "resample": 1}
    parts = build_parts(tmp_path, Counting([0.1, 0.0]), **keys)
    run_loop(parts, Position(step=0, rollout=0), StopSignal())
    assert sorted(set(drawn)) == [0, 1, 2, 3] and drawn == sorted(drawn), "groups drawn anew belong to the same rollout"
    drawn.clear()
    resumed = again(parts, tmp_path, Counting([0.1, 0.0]))
    at = start(resumed, str(parts.run.path / "checkpoints" / "step_000004"))
    run_loop(resumed, at, StopSignal())
    assert sorted(set(drawn)) == [2, 3]

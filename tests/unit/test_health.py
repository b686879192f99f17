"""Health warnings: each cause once, gone and back again, and none for a healthy run."""

from pathlib import Path

import pytest
from toys import Bandit, Walker, again, build_parts

from unified_rl.health import PATIENCE, Health
from unified_rl.run_folder.tracking import read_jsonl
from unified_rl.stragglers import Stragglers
from unified_rl.train import Position, StopSignal, run_loop, start

GOOD = {
    "frac_reward_zero_std": 0.2,
    "frac_samples_with_gradient": 0.8,
    "replay_gap": 1e-7,
    "entropy": 2.0,
    "kl": 0.01,
    "update_kl": 1e-4,
    "ratio/overflow": 0.0,
}


def health(tmp_path: Path, **changes) -> Health:
    return Health(build_parts(tmp_path, Bandit([0.0, 0.0]), **{"epochs": 2, **changes}).recipe)


def test_a_healthy_run_is_left_alone(tmp_path):
    watch = health(tmp_path)
    assert [watch.observe(GOOD, new_rollout=index % 2 == 0) for index in range(20)] == [[]] * 20


@pytest.mark.parametrize(
    ("sick", "message"),
    [
        ({"replay_gap": 0.07}, "the clip range 0.2 is under 3 times the replay gap 7.0e-02"),
        ({"frac_samples_with_gradient": 0.0}, "no sample has an advantage although rewards differ"),
        ({"entropy": 0.19}, "entropy collapsed from 2 to 0.19 nats a step"),
        ({"kl": 1.5}, "kl is 1.5 nats a step: the policy runs away from the reference"),
        ({"update_kl": 1.5}, "update_kl is 1.5 nats a step: the policy runs away from the rollout's policy"),
        ({"ratio/overflow": 0.25}, "25 % of the log-ratios were beyond +-20 nats"),
    ],
)
def test_each_cause_is_told_once_until_it_went_away(tmp_path, sick, message):
    watch = health(tmp_path)
    assert watch.observe(GOOD, new_rollout=True) == []
    (warning,) = watch.observe({**GOOD, **sick}, new_rollout=True)
    assert warning.startswith(message)
    assert watch.observe({**GOOD, **sick}, new_rollout=True) == []
    assert watch.observe(GOOD, new_rollout=True) == []
    assert len(watch.observe({**GOOD, **sick}, new_rollout=True)) == 1


def test_a_clip_range_in_nats_is_compared_as_what_it_is_over_the_dims(tmp_path):
    """0.2 nats of a step of 768 dims are 2.6e-4 of the mean that the replay gap is of too."""
    objective = {"threshold_unit": "nats", "clip_low": 0.2, "clip_high": 0.3}
    watch = Health(build_parts(tmp_path, Walker([0.0, 0.0]), objective=objective, epochs=2).recipe)
    row = {**GOOD, "clip_range": 2.6e-4}
    assert watch.observe({**row, "replay_gap": 8e-5}, new_rollout=True) == []
    (warning,) = watch.observe({**row, "replay_gap": 1e-4}, new_rollout=True)
    assert warning.startswith("the clip range 0.00026 is under 3 times the replay gap 1.0e-04")


@pytest.mark.parametrize(("key", "value"), [("kl", 0.2), ("update_kl", 0.02)])
def test_a_divergence_of_denoising_steps_is_a_mean_over_dims(tmp_path, key, value):
    """Of a token that much is healthy; of each of 1000 dims it is a policy that is gone."""
    assert health(tmp_path / "a").observe({**GOOD, key: value}, new_rollout=True) == []
    watch = Health(build_parts(tmp_path / "b", Walker([0.0, 0.0])).recipe)
    assert watch.observe({**GOOD, key: value / 3}, new_rollout=True) == []
    (warning,) = watch.observe({**GOOD, key: value}, new_rollout=True)
    assert warning.startswith(f"{key} is {value} nats a dim and step: the policy runs away")


def test_the_clip_range_does_not_matter_on_policy(tmp_path):
    watch = health(tmp_path, epochs=1)
    assert watch.observe({**GOOD, "replay_gap": 0.07}, new_rollout=True) == []


def test_equal_rewards_are_told_after_some_rollouts(tmp_path):
    watch = health(tmp_path)
    flat = {**GOOD, "frac_reward_zero_std": 1.0, "frac_samples_with_gradient": 0.0}
    told = []
    for _ in range(PATIENCE + 3):
        told.append(len(watch.observe(flat, new_rollout=True)))
        assert watch.observe(flat, new_rollout=False) == []  # the second update of the same rollout
    assert told == [0] * (PATIENCE - 1) + [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("sick", "message"),
    [
        ({"frac_samples_with_gradient": 0.05}, "only 5 % of the samples had an advantage in 5 rollouts in a row"),
        ({"value/explained_variance": -0.3}, "the critic explains less than a constant (-0.3) in 5 rollouts in a row"),
        (
            {"value/explained_variance": -0.3, "value/clip_fraction": 0.9},
            "the critic explains less than a constant (-0.3) in 5 rollouts in a row: critic.value_clip holds most",
        ),
    ],
)
def test_what_one_rollout_does_not_prove_is_told_after_some(tmp_path, sick, message):
    watch = health(tmp_path)
    assert watch.observe(GOOD, new_rollout=True) == []
    told = []
    for _ in range(PATIENCE + 2):
        told += watch.observe({**GOOD, **sick}, new_rollout=True)
        assert watch.observe(GOOD, new_rollout=False) == []
    assert len(told) == 1 and told[0].startswith(message)
    assert watch.observe(GOOD, new_rollout=True) == []
    # The count begins anew.
    assert [watch.observe({**GOOD, **sick}, new_rollout=True) for _ in range(PATIENCE - 1)] == [[]] * (PATIENCE - 1)


def test_a_critic_whose_returns_do_not_vary_is_left_alone(tmp_path):
    watch = health(tmp_path)
    row = {**GOOD, "value/explained_variance": float("nan")}
    assert [watch.observe(row, new_rollout=True) for _ in range(2 * PATIENCE)] == [[]] * 2 * PATIENCE


def test_warnings_reach_the_events_of_a_run(tmp_path):
    # Arm 0 is certain: all rewards are equal in every rollout.
    parts = build_parts(tmp_path, Bandit([60.0, 0.0]), num_steps=PATIENCE + 1)
    run_loop(parts, Position(step=0, rollout=0), StopSignal())
    (event,) = read_jsonl(parts.run.path / "events.jsonl")
    assert event["level"] == "warning"
    assert event["message"].startswith(f"step {PATIENCE}: all rewards of each group were equal in {PATIENCE} rollouts")


def test_a_resumed_run_is_warned_as_if_it_had_not_stopped(tmp_path):
    """Interrupted after three of the five rollouts that are needed; the entropy is compared with the run's first."""
    policy = Bandit([60.0, 0.0])
    parts = build_parts(tmp_path, policy, num_steps=PATIENCE + 1, checkpoint={"every": 1, "keep": 9})
    run_loop(parts, Position(step=0, rollout=0), StopSignal())
    (parts.run.path / "events.jsonl").unlink()
    resumed = again(parts, tmp_path, Bandit([60.0, 0.0]))
    at = start(resumed, str(parts.run.path / "checkpoints/step_000003"))
    assert at.step == 3
    run_loop(resumed, at, StopSignal())
    said = [row["message"] for row in read_jsonl(parts.run.path / "events.jsonl")]
    (warning,) = [message for message in said if "all rewards" in message]
    assert warning.startswith(f"step {PATIENCE}: all rewards of each group were equal")
    watch = health(tmp_path / "b")
    watch.recall([{**GOOD, "time/rollout": 1.0, "kl": None}, {**GOOD, "entropy": 0.5, "time/rollout": 0.0}])
    (collapsed,) = watch.observe({**GOOD, "entropy": 0.19}, new_rollout=True)
    assert collapsed.startswith("entropy collapsed from 2 to 0.19")


def test_a_straggler_is_named_once_until_it_kept_up():
    """Four processes; a slowest one of 3 times the mean takes 3 / (1 / 3) = 9 times as long as the others."""
    watch = Stragglers(1.5, 4)
    row = {"slowest/update": 3.0, "slowest/update_process": 2.0}
    calm = {"slowest/update": 1.02, "slowest/update_process": 2.0}
    between = {"slowest/update": 1.25, "slowest/update_process": 2.0}  # 1.25 / (2.75 / 3) = 1.36: neither
    assert [len(watch.observe(row)) for _ in range(6)] == [0, 0, 1, 0, 0, 0]
    assert watch.observe(between) == [] and watch.observe({}) == [] and watch.observe(row) == []
    watch.observe(calm)
    assert [len(watch.observe(row)) for _ in range(3)] == [0, 0, 1]
    other = {**row, "slowest/update_process": 1.0}
    said = [watch.observe(other) for _ in range(3)]
    assert said[:2] == [[], []] and said[2] == [
        "straggler: process 1 takes 9.0 times as long as the others for its own update, 3 times in a row; "
        "the others wait for it"
    ]

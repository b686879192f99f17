"""Stopping on request, and stopping what cannot go on."""

import functools
import os
import signal
from dataclasses import replace

import pytest

from tests.unit.toys import Bandit, build_parts, zeros_chosen
from unified_rl.rewards.scoring import reward_of
from unified_rl.run_folder.checkpoint import list_checkpoints
from unified_rl.run_folder.tracking import read_jsonl
from unified_rl.stopping import Abandoned, StopSignal
from unified_rl.train import DivergedError, Position, check_finite, run_loop
from unified_rl.types import Prompt

BEGIN = Position(step=0, rollout=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_of_sampling_abandons_the_rollout(number: int, code: int, tmp_path):
    policy = Bandit([0.0, 0.0])
    parts = build_parts(tmp_path, policy, num_steps=9, engine={"micro_batch": 4})
    draw, calls = policy.sample, []

    def sample(prompts, **options):
        calls.append(len(prompts))
        if len(calls) == 6:  # four batches a rollout: in the middle of the second
            os.kill(os.getpid(), number)
        return draw(prompts, **options)

    policy.sample = sample
    stop = StopSignal()
    with stop.listening():
        assert run_loop(parts, BEGIN, stop) == code
    assert len(calls) == 6, "the rest of the rollout was not drawn"
    assert [path.name for path in list_checkpoints(parts.run.path)] == ["step_000001"]


@pytest.mark.parametrize("phase", ["rewards", "update", "evaluation", "checkpoint"])
def test_a_signal_in_any_other_phase_stops_at_the_next_place_to_save(phase: str, tmp_path):
    """Two updates a rollout: where they have begun, both are made; judging is abandoned like sampling."""
    policy, came = Bandit([0.0, 0.0]), []

    def hearing(action, name):
        @functools.wraps(action)
        def heard(*given, **options):
            if name == phase and not came:
                came.append(name)
                os.kill(os.getpid(), signal.SIGTERM)
            return action(*given, **options)

        return heard

    draw, examine = policy.sample, hearing(policy.sample, "evaluation")
    policy.sample = lambda prompts, evaluation=False: (examine if evaluation else draw)(prompts, evaluation=evaluation)
    policy.log_prob = hearing(policy.log_prob, "update")
    policy.save = hearing(policy.save, "checkpoint")
    every = {"every": 1}
    parts = build_parts(tmp_path, policy, num_steps=8, epochs=2, evaluation=every, checkpoint=every)
    prompt = Prompt(text="a", images=(), columns={}, group_id=0, seed=0)
    rewards = [reward_of(hearing(zeros_chosen, "rewards"), name="toy:reward")]
    stop = StopSignal()
    with stop.listening():
        assert run_loop(replace(parts, exam=[prompt], rewards=rewards), BEGIN, stop) == 143
    assert came == [phase]
    saved = [] if phase == "rewards" else ["step_000002"]
    assert [path.name for path in list_checkpoints(parts.run.path)] == saved


def test_handlers_are_put_back_and_nothing_is_asked_by_itself():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    with stop.listening():
        assert signal.getsignal(signal.SIGTERM) is not before
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Abandoned):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_without_finite_gradients_stops(tmp_path):
    parts = build_parts(tmp_path, Bandit([0.0, 0.0]), num_steps=50, optimizer={"lr": 0.05, "max_skipped": 3})
    parts.engine.step = lambda: float("nan")
    with pytest.raises(DivergedError, match="3 updates in a row had no finite gradient, the last one of rollout 2"):
        run_loop(parts, BEGIN, StopSignal())
    said = [row["message"] for row in read_jsonl(tmp_path / "run/events.jsonl")]
    assert any("rollout 2: every loss is finite, the gradient is not; it was trained on process 0" in m for m in said)
    check_finite(parts.recipe, 2, 0)


def test_the_samples_of_a_loss_that_is_not_finite_are_named(tmp_path):
    policy = Bandit([0.0, 0.0])
    parts = build_parts(tmp_path, policy, num_steps=3, epochs=3, engine={"micro_batch": 4})
    score, calls = policy.log_prob, []

    def log_prob(name, segment, steps):
        calls.append(name)
        stats = score(name, segment, steps)
        # After a look ahead and four windows of the first update: the third window of the second.
        return replace(stats, log_probs=stats.log_probs * float("nan")) if len(calls) == 8 else stats

    policy.log_prob = log_prob
    assert run_loop(parts, BEGIN, StopSignal()) == 0
    (said,) = [row["message"] for row in read_jsonl(tmp_path / "run/events.jsonl") if "loss" in row["message"]]
    prompts = parts.sampler.rollout(0, rank=0, world_size=1)
    named = ", ".join(f"{row} ({prompts[row].text!r}, seed {prompts[row].seed})" for row in (8, 9, 10, 11))
    assert said == f"update skipped, rollout 0: the loss is not finite for process 0: samples {named}"

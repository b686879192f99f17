"""Stopping on request, and stopping what cannot go on."""

import functools
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.children import Child
from tests.forks import Fork
from tests.unit.toys import Bandit, build_parts, zeros_chosen
from unified_rl.engine import distributed
from unified_rl.rewards.scoring import RewardFailedError, reward_of
from unified_rl.run_folder.checkpoint import list_checkpoints
from unified_rl.run_folder.tracking import read_jsonl
from unified_rl.stopping import Abandoned, Stopped, StopSignal
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
    stop.save_first()
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
    rewards = [reward_of(hearing(zeros_chosen, "rewards"), name="reward")]
    stop = StopSignal()
    stop.save_first()
    with stop.listening():
        assert run_loop(replace(parts, exam=[prompt], rewards=rewards), BEGIN, stop) == 143
    assert came == [phase]
    saved = [] if phase == "rewards" else ["step_000002"]
    assert [path.name for path in list_checkpoints(parts.run.path)] == saved


def test_a_reward_that_takes_long_is_not_waited_for(tmp_path):
    """Nor is one that would never answer: nothing is trained on that rollout."""
    never, calls = threading.Event(), []

    def hangs(completions: Sequence[str]) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            never.wait(60.0)
        return [1.0] * len(completions)

    parts = build_parts(tmp_path, Bandit([0.0, 0.0]), num_steps=9)
    stop, began = StopSignal(), time.monotonic()
    stop.save_first()
    with stop.listening():
        assert run_loop(replace(parts, rewards=[reward_of(hangs, name="toy:hangs")]), BEGIN, stop) == 143
    assert time.monotonic() - began < 20.0
    never.set()


def test_a_reward_that_hangs_in_a_thread_ends_the_run(tmp_path):
    never = threading.Event()
    reward = reward_of(lambda completions, **columns: never.wait(60.0), name="toy:hangs")
    reward.runner.reward.timeout = 0.3
    parts = build_parts(tmp_path, Bandit([0.0, 0.0]), num_steps=9)
    with pytest.raises(RewardFailedError, match=r"'toy:hangs' gave no answer within 0.3 s, and in a thread it cannot"):
        run_loop(replace(parts, rewards=[reward]), BEGIN, StopSignal())
    never.set()


def test_handlers_are_put_back_and_nothing_is_asked_by_itself():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    stop.save_first()
    with stop.listening():
        assert signal.getsignal(signal.SIGTERM) is not before
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Abandoned):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_while_there_is_nothing_to_save_a_signal_ends_the_block(number: int, code: int):
    stop, reached = StopSignal(), []
    with pytest.raises(Stopped), stop.listening():
        try:
            os.kill(os.getpid(), number)
            reached.append("the next line")
        except Exception:  # what libraries do around optional imports
            reached.append("a fallback")
    assert not reached and stop.exit_code == code


def test_a_signal_that_comes_while_processes_agree_is_heard(monkeypatch: pytest.MonkeyPatch):
    def agree(values: Sequence[float]) -> list[float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return list(values)

    stop = StopSignal()
    stop.save_first()
    with stop.listening():
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "max_over_ranks", agree)
            assert not stop.requested(), "it came too late for this time"
        assert stop.requested() and stop.exit_code == 143


def saving_for_another(marker: Path) -> int:
    """A process that was told by another one to stop, and gets its own signal while it saves."""
    stop = StopSignal()
    stop.save_first()
    alone, distributed.max_over_ranks = distributed.max_over_ranks, lambda values: [float(signal.SIGTERM)]
    with stop.listening():
        assert stop.requested()
        distributed.max_over_ranks = alone
        os.kill(os.getpid(), signal.SIGTERM)
        marker.touch()
        return stop.exit_code


def test_the_signal_of_each_process_counts_as_its_first(tmp_path: Path):
    """A scheduler's SIGTERM reaches the processes of several machines at different times."""
    process = Fork(saving_for_another, tmp_path / "saved", environment={}, log=tmp_path / "log")
    assert process.wait().returncode == 143 and (tmp_path / "saved").exists()


def deaf(marker: Path) -> int:
    stop = StopSignal()
    stop.save_first()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        marker.touch()
        return sum(range(10**12))  # hours inside one call, where no handler of Python's runs


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path):
    process = Fork(deaf, tmp_path / "busy", environment={}, log=tmp_path / "log")
    deadline = time.monotonic() + 60.0
    while not (tmp_path / "busy").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=20).returncode == -signal.SIGTERM


SLOW = """
import os, pathlib, time
told = pathlib.Path(__file__).with_name("told")

class Loads:
    def __init__(self):
        told.write_text(f'{os.getpid()}\\n')
        time.sleep(300)
    def __call__(self, completions):
        raise AssertionError

def judges(completions):
    told.write_text(f'{os.getpid()}\\n')
    time.sleep(300)
"""


@pytest.mark.parametrize("reward", ["Loads", "judges"])
def test_a_signal_while_a_run_starts_ends_it_at_once(reward: str, tmp_path: Path):
    """A reward that loads its model for minutes; one that judges the base model for minutes."""
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["train", "quickstart_vlm", f"rewards=[{{name: {tmp_path}/slow.py:{reward}}}]", "engine.threads=1"]
    child = Child([*words, "evaluation.num_prompts=2", "--output", str(tmp_path / "run")], tmp_path / "log")
    told = tmp_path / "told"
    child.wait_until(lambda: told.exists() and told.read_text().endswith("\n"))
    assert child.end(signal.SIGTERM, seconds=30) == 143, child.output()
    said = child.output()
    assert said.endswith("stopped while starting: there was nothing to save\n") and "Traceback" not in said
    assert not Path(f"/proc/{int(told.read_text())}").exists(), "the reward's process went with it"
    assert not list((tmp_path / "run").rglob("manifest.json")) and not (tmp_path / "run/run.lock").exists()


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

"""What may differ when a run goes on from a checkpoint, and what comes back."""

import random

import numpy as np
import pytest
import torch

from tests.unit.toys import Bandit, again, build_parts
from unified_rl.errors import RecipeError
from unified_rl.run_folder import random_state
from unified_rl.run_folder.checkpoint import CheckpointError
from unified_rl.run_folder.resume import changes
from unified_rl.run_folder.tracking import read_jsonl
from unified_rl.stopping import StopSignal
from unified_rl.train import Position, run_loop, start

BEGIN = Position(step=0, rollout=0)


@pytest.fixture
def stopped(tmp_path):
    """A run of four steps that has taken two."""
    parts = build_parts(tmp_path, Bandit([0.0, 0.0]), num_steps=4, checkpoint={"every": 2})
    run_loop(parts, BEGIN, StopSignal())
    for folder in (tmp_path / "run/checkpoints").glob("*4"):
        (folder / "manifest.json").unlink()
    return parts


def changed(parts, folder, **keys):
    """The run again, with other keys in its recipe."""
    parts.run.close()
    return build_parts(folder, Bandit([0.0, 0.0]), **{"num_steps": 4, "checkpoint": {"every": 2}, **keys})


def messages(parts):
    return [row["message"] for row in read_jsonl(parts.run.path / "events.jsonl")]


def test_differences_are_found_at_any_depth():
    before = {"a": 1, "b": {"c": [1], "d": {"e": 2}}, "gone": None, "left": 3}
    now = {"a": 1, "b": {"c": [2], "d": {"e": 3}}, "new": 4}
    assert changes(before, now) == {"b.c": ([1], [2]), "b.d.e": (2, 3), "left": (3, None), "new": (None, 4)}


def test_another_learning_rate_is_refused_until_it_is_allowed(stopped, tmp_path):
    parts = changed(stopped, tmp_path, optimizer={"lr": 0.5}, group_size=4)
    with pytest.raises(RecipeError, match=r"group_size: 8 -> 4; optimizer\.lr: 0\.05 -> 0\.5") as refused:
        start(parts, "auto")
    assert "--allow-change group_size --allow-change optimizer.lr" in str(refused.value)
    assert start(parts, "auto", ["group_size", "optimizer"]).step == 2
    assert "resumed with another optimizer.lr: 0.05 -> 0.5" in messages(parts)


def test_how_the_work_is_cut_may_change(stopped, tmp_path):
    parts = changed(stopped, tmp_path, engine={"micro_batch": 2}, checkpoint={"every": 1}, num_steps=9)
    assert start(parts, "auto").step == 2


def test_a_run_that_is_made_longer_is_one_that_was_longer_at_once(tmp_path):
    weights = []
    for name, lengths in (("at once", [4]), ("twice", [2, 4])):
        for num_steps in lengths:
            policy = Bandit([0.0, 0.0])
            parts = build_parts(tmp_path / name, policy, num_steps=num_steps, checkpoint={"every": 9})
            assert run_loop(parts, start(parts, "auto"), StopSignal()) == 0
            parts.run.close()
        weights.append(policy.module.weight.detach())
    assert torch.equal(*weights) and weights[0].abs().max() > 0.1
    assert "resumed with another num_steps: 2 -> 4" in messages(parts)


def test_a_longer_run_is_another_one_where_the_learning_rate_decays(stopped, tmp_path):
    allowed = ["optimizer.decay"]
    parts = changed(stopped, tmp_path, num_steps=9, optimizer={"lr": 0.05, "decay": "linear"})
    with pytest.raises(RecipeError, match="num_steps: 4 -> 9"):
        start(parts, "auto", allowed)
    assert start(parts, "auto", [*allowed, "num_steps"]).step == 2
    assert parts.engine.lr == pytest.approx(0.05 * 7 / 9), "the schedule of the longer run, from where it is"


def test_other_prompts_are_refused(stopped, tmp_path):
    parts = changed(stopped, tmp_path)
    parts.sampler._rows = [{"prompt": "another"}, *parts.sampler._rows[1:]]
    with pytest.raises(RecipeError, match=r"data\.prompts: the prompts are not those"):
        start(parts, "auto")
    assert start(parts, "auto", ["data.prompts"]).step == 2


def test_going_back_sets_later_checkpoints_aside(stopped, tmp_path):
    parts = changed(stopped, tmp_path)
    assert start(parts, "never") == BEGIN
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "superseded_step_000002",
        "superseded_step_000004",
    ]
    assert any("kept as superseded_step_000002" in message for message in messages(parts))


def test_a_missing_checkpoint_is_the_users_mistake(stopped, tmp_path):
    with pytest.raises(RecipeError, match=r"--resume .*manifest\.json: not there"):
        start(changed(stopped, tmp_path), str(tmp_path / "nowhere"))


def test_the_generators_of_user_code_come_back(stopped, tmp_path):
    state = random_state.capture()
    drawn = [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(2)]
    random_state.restore(state)
    assert drawn == [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(2)]
    parts = again(stopped, tmp_path, Bandit([0.0, 0.0]))
    start(parts, "auto")
    first = float(torch.rand(()))
    start(again(parts, tmp_path, Bandit([0.0, 0.0])), "auto")
    assert float(torch.rand(())) == first


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch):
    parts = build_parts(tmp_path, Bandit([0.0, 0.0]), num_steps=4, checkpoint={"every": 1})
    save, calls = parts.engine.save, []

    def full_at_first(directory):
        calls.append(directory)
        if len(calls) < 3:
            raise OSError(28, "No space left on device")
        save(directory)

    monkeypatch.setattr(parts.engine, "save", full_at_first)
    assert run_loop(parts, BEGIN, StopSignal()) == 0
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step_000003", "step_000004"]
    errors = [message for message in messages(parts) if "no checkpoint" in message]
    assert len(errors) == 2 and "No space left on device" in errors[0]


def test_a_run_whose_end_is_not_saved_has_failed(tmp_path, monkeypatch):
    parts = build_parts(tmp_path, Bandit([0.0, 0.0]), num_steps=2, checkpoint={"every": 1})

    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.engine, "save", full)
    with pytest.raises(CheckpointError, match="ends at step 2, which could not be saved"):
        run_loop(parts, BEGIN, StopSignal())

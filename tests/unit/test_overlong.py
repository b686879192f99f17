"""Completions at the limit of their length: hand-computed punishment, masked rows, and what the metrics say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.toys import Bandit, build_parts
from unified_rl.errors import RecipeError
from unified_rl.prepare import prepare
from unified_rl.recipe.objective import Objective
from unified_rl.rewards.overlong import counted, punishment
from unified_rl.rollout import Rollout
from unified_rl.types import Completion, Scores, Segment, Trajectory

LENGTHS = [2, 8, 9, 10]


def trajectory() -> Trajectory:
    """Four completions of at most ten tokens; the last one was cut."""
    mask = torch.arange(10) < torch.tensor(LENGTHS)[:, None]
    segment = Segment(
        actions={"tokens": torch.zeros(4, 10, dtype=torch.int64)},
        rollout_log_probs=torch.full((4, 10), -1.0).masked_fill(~mask, 0.0),
        loss_mask=mask,
        turn_ids=torch.zeros(4, 10, dtype=torch.int64),
        context_tokens=torch.ones(4, dtype=torch.int64),
    )
    completions = [Completion(text="x", images=(), truncated=length == 10) for length in LENGTHS]
    return Trajectory(
        group_ids=torch.zeros(4, dtype=torch.int64),
        segments={"text": segment},
        completions=completions,
        policy_version=0,
    )


def prepared_with(folder: Path, **keys: object) -> tuple:
    parts = build_parts(
        folder,
        Bandit([0.0, 0.0], num_steps=10),
        objective={"preset": "dr_grpo", **keys},
        group_size=4,
        prompts_per_step=1,
    )
    prompts = parts.sampler.rollout(0, rank=0, world_size=1)
    scores = Scores(total=torch.tensor([1.0, 1.0, 1.0, 0.0]), breakdown={}, shaped={}, report={})
    rollout = Rollout(prompts=prompts, trajectory=trajectory(), scores=scores, seconds=(0.0, 0.0))
    (part,), row = prepare(parts.policy, parts.recipe, parts.memory, rollout, 0)
    return part, row


def test_the_punishment_is_linear_in_the_last_part_of_the_limit():
    """Limit 10, margin 0.4: nothing up to 6 tokens, then a quarter a token."""
    objective = Objective(overlong="penalty", overlong_margin=0.4)
    segment = trajectory().segments["text"]
    assert punishment(segment, 10, objective).tolist() == pytest.approx([0.0, -0.5, -0.75, -1.0])
    assert punishment(segment, 10, Objective()).tolist() == [0.0] * 4


def test_a_penalty_enters_the_advantages(tmp_path: Path):
    part, _ = prepared_with(tmp_path, overlong="penalty", overlong_margin=0.4)
    rewards = torch.tensor([1.0, 0.5, 0.25, -1.0])
    torch.testing.assert_close(part.advantages, rewards - rewards.mean(), check_dtype=False)
    assert part.valid.all()


def test_a_masked_completion_counts_in_its_group_but_carries_no_loss(tmp_path: Path):
    part, row = prepared_with(tmp_path, overlong="mask")
    torch.testing.assert_close(part.advantages, torch.tensor([0.25, 0.25, 0.25, -0.75]), check_dtype=False)
    assert part.valid.tolist() == [True, True, True, False]
    assert row["frac_samples_with_gradient"] == 0.75
    assert row["completion_length"] == 29 / 4 and row["frac_truncated"] == 0.25


def test_kept_by_default():
    completions = [replace(each, truncated=True) for each in trajectory().completions]
    assert counted(completions, Objective()).all()
    assert not counted(completions, Objective(overlong="mask")).any()


def test_a_penalty_on_a_sum_of_normalised_rewards_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="overlong: gdpo normalises each reward"):
        build_parts(tmp_path, Bandit([0.0]), objective={"preset": "gdpo", "overlong": "penalty"})

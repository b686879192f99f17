"""Dynamic sampling: tied groups give their places to others, whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from toys import Bandit, build_parts

from unified_rl.train import collect
from unified_rl.types import Trajectory


def test_tied_groups_are_redrawn_from_other_prompts(tmp_path: Path):
    """Arm 0 has 95 %: most groups of 8 single tokens are tied, some are not."""
    keys: dict[str, Any] = {"prompts_per_step": 8, "objective": {"advantage": "group_mean"}}
    plain = build_parts(tmp_path / "a", Bandit([3.0, 0.0], num_steps=1), **keys)
    before, _, unfilled = collect(plain, 0)
    parts = build_parts(tmp_path / "b", Bandit([3.0, 0.0], num_steps=1), resample=30, **keys)
    kept, (prepared,), row = collect(parts, 0)
    rewards = kept.scores.total.view(8, 8)
    assert (rewards.amax(1) > rewards.amin(1)).all() and (prepared.advantages.view(8, 8) != 0).any(1).all()
    first = before.scores.total.view(8, 8)
    taught = first.amax(1) > first.amin(1)
    assert torch.equal(rewards[taught], first[taught]) and row["num_resampled"] == float((~taught).sum()) > 0
    assert row["num_redrawn"] >= 8 * row["num_resampled"] and row["reward"] == unfilled["reward"]
    # Every row still is what it says: its completion has its reward, its tokens, and a group of its own.
    tokens = prepared.segment.actions["tokens"]
    assert [completion.text for completion in kept.trajectory.completions] == [str(int(t)) for t in tokens]
    assert torch.equal(kept.scores.total, (tokens[:, 0] == 0).float())
    groups = kept.trajectory.group_ids.view(8, 8)
    assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) == 8
    assert [prompt.group_id for prompt in kept.prompts] == kept.trajectory.group_ids.tolist()
    again_kept, _, again_row = collect(parts, 0)
    assert torch.equal(again_kept.scores.total, kept.scores.total) and again_row["num_redrawn"] == row["num_redrawn"]


def test_redrawing_is_bounded(tmp_path: Path):
    parts = build_parts(tmp_path, Bandit([60.0, 0.0]), resample=2)
    _, (prepared,), row = collect(parts, 0)
    assert row["num_resampled"] == 0 and row["num_redrawn"] == 2 * 16 and prepared.advantages.eq(0).all()


def test_what_a_redrawn_row_costs_goes_with_it(tmp_path: Path):
    """A language model's rows tell the length of their prompts; several rounds must keep them."""

    class Telling(Bandit):
        def sample(self, prompts: Any, *, evaluation: bool = False) -> Trajectory:
            drawn = super().sample(prompts, evaluation=evaluation)
            told = torch.tensor([prompt.seed % 1000 for prompt in prompts])
            return replace(drawn, segments={"text": replace(drawn.segments["text"], context_tokens=told)})

    parts = build_parts(
        tmp_path, Telling([3.0, 0.0], num_steps=1), resample=30, prompts_per_step=8, engine={"micro_batch_tokens": 4000}
    )
    kept, _, row = collect(parts, 0)
    assert row["num_redrawn"] > 8 * row["num_resampled"] > 0  # more than one round
    told = kept.trajectory.segments["text"].context_tokens
    assert told is not None and told.tolist() == [prompt.seed % 1000 for prompt in kept.prompts]
    assert row["completion_length"] == 1.0

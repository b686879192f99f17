"""Sampling a batch of prompts and having it judged: prompts in, scored trajectories out."""

from collections.abc import Sequence
from dataclasses import dataclass

from unified_rl.protocols import Console, Policy
from unified_rl.rewards import LoadedReward, score
from unified_rl.tracking import Sample
from unified_rl.types import Prompt, Scores, Trajectory, concat_trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """N judged trajectories of this process."""

    prompts: Sequence[Prompt]
    trajectory: Trajectory
    scores: Scores


def sample(
    policy: Policy, prompts: Sequence[Prompt], *, batch: int, console: Console, evaluation: bool = False
) -> Trajectory:
    """Sample all prompts, `batch` at a time."""
    starts = range(0, len(prompts), batch)
    name = "evaluation" if evaluation else "rollout"
    parts = [
        policy.sample(prompts[start : start + batch], evaluation=evaluation)
        for start in console.track(starts, name, len(starts))
    ]
    return concat_trajectories(parts)


def judge(rewards: Sequence[LoadedReward], prompts: Sequence[Prompt], trajectory: Trajectory) -> Rollout:
    """Score the completions of a trajectory."""
    return Rollout(prompts=prompts, trajectory=trajectory, scores=score(rewards, prompts, trajectory.completions))


def shown(rollout: Rollout, num: int) -> list[Sample]:
    """The first `num` samples in the form that a run's folder keeps."""
    return [
        Sample(
            prompt=prompt.text,
            text=completion.text,
            images=list(completion.images),
            rewards={name: float(values[row]) for name, values in rollout.scores.breakdown.items()},
            seed=prompt.seed,
            condition_images=list(prompt.images),
        )
        for row, (prompt, completion) in enumerate(
            zip(rollout.prompts[:num], rollout.trajectory.completions[:num], strict=True)
        )
    ]

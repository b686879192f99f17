"""Sampling a batch of prompts and having it judged: prompts in, scored trajectories out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from unified_rl.engine.watch import enter
from unified_rl.protocols import Console, Policy
from unified_rl.rewards.scoring import LoadedReward, Scoring
from unified_rl.run_folder.sample import Sample
from unified_rl.types import Completion, Prompt, Scores, Trajectory, concat_trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """N judged trajectories of this process."""

    prompts: Sequence[Prompt]
    trajectory: Trajectory
    scores: Scores
    seconds: tuple[float, float]
    """Sampling, and waiting for the rewards after it."""


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    batch: int,
    console: Console,
    evaluation: bool = False,
    heard: Callable[[Sequence[Completion]], None] | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Sample all prompts, `batch` at a time.

    Args:
        heard: is given the completions of each batch as soon as they exist.
        before_each: is called before every batch and may raise.
    """
    starts = range(0, len(prompts), batch)
    name = "evaluation" if evaluation else "rollout"
    parts = []
    for start in console.track(starts, name, len(starts)):
        before_each()
        parts.append(policy.sample(prompts[start : start + batch], evaluation=evaluation))
        if heard is not None:
            heard(parts[-1].completions)
    return concat_trajectories(parts)


def roll_out(
    policy: Policy,
    rewards: Sequence[LoadedReward],
    prompts: Sequence[Prompt],
    *,
    batch: int,
    console: Console,
    evaluation: bool = False,
    before_each: Callable[[], None] = lambda: None,
) -> Rollout:
    """Sample all prompts and have them judged; rewards work on one batch while the next is sampled.

    `before_each` is called before every batch, while rewards are waited for, and once more when all is judged; it may
    raise.
    """
    started = time.perf_counter()
    scoring = Scoring(rewards, prompts, evaluation=evaluation)
    trajectory = sample(
        policy,
        prompts,
        batch=batch,
        console=console,
        evaluation=evaluation,
        heard=scoring.add,
        before_each=before_each,
    )
    sampled = time.perf_counter()
    enter("rewards")
    scores = scoring.finish(meanwhile=before_each)
    before_each()
    seconds = (sampled - started, time.perf_counter() - sampled)
    return Rollout(prompts=prompts, trajectory=trajectory, scores=scores, seconds=seconds)


def shown(rollout: Rollout, num: int) -> list[Sample]:
    """The first `num` samples in the form that a run's folder keeps."""
    return [
        Sample(
            prompt=prompt.text,
            text=completion.text,
            images=[each for each in completion.images if isinstance(each, Image.Image)],
            rewards={name: float(values[row]) for name, values in rollout.scores.breakdown.items()},
            seed=prompt.seed,
            condition_images=list(prompt.images),
            arrays=[_array(each) for each in completion.images if not isinstance(each, Image.Image)],
        )
        for row, (prompt, completion) in enumerate(
            zip(rollout.prompts[:num], rollout.trajectory.completions[:num], strict=True)
        )
    ]


def _array(media: Any) -> np.ndarray:
    return media.detach().float().cpu().numpy() if isinstance(media, Tensor) else np.asarray(media)

"""Recorded samples as a rollout: nothing is generated."""

import time
from collections.abc import Sequence

import torch

from unified_rl.data.recorded import RecordedSample, RecordedSampler
from unified_rl.engine import distributed
from unified_rl.errors import RecipeError
from unified_rl.protocols import Policy, RecordingPolicy
from unified_rl.rewards.scoring import LoadedReward, score
from unified_rl.rollout import Rollout
from unified_rl.types import Completion, Prompt, Recorded, Scores, concat_trajectories


def recall(
    policy: Policy, rewards: Sequence[LoadedReward], sampler: RecordedSampler, prompts: Sequence[Prompt], *, batch: int
) -> Rollout:
    """The recorded samples of a rollout's prompts (this process's share of them), with their rewards; those without one
    are judged by the recipe's.

    Args:
        batch: samples that the policy takes over at once.

    Raises:
        RecipeError: if the policy cannot take recorded samples over.
    """
    if not isinstance(policy, RecordingPolicy):
        raise RecipeError("data.rollouts: this policy cannot take recorded samples over; give data.prompts")
    started = time.perf_counter()
    samples = sampler.samples(prompts, first=distributed.rank() * len(prompts))
    recorded = [_recorded(sample) for sample in samples]
    starts = range(0, len(prompts), batch)
    trajectory = concat_trajectories(
        [policy.record(prompts[at : at + batch], recorded[at : at + batch]) for at in starts]
    )
    taken = time.perf_counter()
    completions = [each.completion for each in recorded]
    known = torch.tensor([torch.nan if sample.reward is None else sample.reward for sample in samples])
    scores = Scores(total=known, breakdown={"recorded": known}, shaped={"recorded": known}, report={})
    if any(sample.reward is None for sample in samples):
        scores = score(rewards, prompts, completions, evaluation=False)
    seconds = (taken - started, time.perf_counter() - taken)
    return Rollout(prompts=prompts, trajectory=trajectory, scores=scores, seconds=seconds)


def _recorded(sample: RecordedSample) -> Recorded:
    images = () if sample.picture is None else (sample.picture.open(),)
    return Recorded(
        completion=Completion(text=sample.text, images=images),
        token_ids=sample.token_ids,
        log_probs=sample.log_probs,
    )

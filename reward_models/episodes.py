"""Rewards of episodes: what the environment itself said (policies with `policy.environment`)."""

from collections.abc import Sequence


def episode_return(
    prompts: Sequence, completions: Sequence, *, episode_return: Sequence[float], **_
) -> Sequence[float]:
    """Sum of the environment's rewards over an episode, undiscounted."""
    return episode_return


def success(prompts: Sequence, completions: Sequence, *, success: Sequence[float], **_) -> Sequence[float]:
    """1.0 where the environment said that the task was done when the episode ended, else 0.0."""
    return success

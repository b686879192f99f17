"""Rewards of episodes: what the environment itself said (policies with `policy.environment`)."""

from collections.abc import Sequence


def episode_return(
    prompts: Sequence, completions: Sequence, *, episode_return: Sequence[float | None], **_
) -> Sequence[float | None]:
    """Sum of the environment's rewards over an episode, undiscounted; None where the environment failed."""
    return episode_return


def success(
    prompts: Sequence, completions: Sequence, *, success: Sequence[float | None], **_
) -> Sequence[float | None]:
    """1.0 where the environment said that the task was done when the episode ended, else 0.0; None where it failed."""
    return success

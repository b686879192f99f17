"""The recipe's `policy.environment` block."""

from typing import Any

from pydantic import Field

from unified_rl.recipe.block import Block


class EnvironmentBlock(Block):
    """What a vision-language-action policy acts in: a completion is then an episode of several turns."""

    name: str
    """`package.module:attr` or `file.py:attr` of a class or function that makes an environment
    (`unified_rl.data.environments.Environment`), or `gymnasium:ID`."""
    arguments: dict[str, Any] = {}
    """What it is made with."""
    max_turns: int = Field(default=8, ge=1)
    """An episode that has not ended by then is cut off."""
    timeout: float | None = Field(default=600.0, gt=0)
    """Seconds that it may take to begin an episode, or to take an action; None: any time."""
    max_failures: float = Field(default=0.1, ge=0, le=1)
    """Share of the episodes of a rollout batch in which it may fail (raise, or exceed the timeout) on an action: those
    end there and are left out of training. The run stops beyond."""

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

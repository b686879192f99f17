"""Keys of one reward in a recipe."""

from typing import Any, Literal

from pydantic import Field, model_validator

from unified_rl.recipe.block import Block


class Gate(Block):
    """Lets a reward count only where another one is high enough, for instance the format is right."""

    reward: str
    """The other reward, as metrics show it."""
    at_least: float = 1.0
    """Its lowest value with which this one counts."""
    otherwise: float = 0.0
    """What counts in place of this one where it does not."""


class RewardBlock(Block):
    """One reward. What counts in the trained sum is: clipped, then normalised, then gated, then weighted."""

    name: str
    """An entry point (`unified-rl list rewards`), `package.module:attr`, `path/to/file.py:attr`, the address of a
    reward server, `http://host:port/name`, or a folder that `unified-rl train-reward` wrote, `path/to/folder`."""
    weight: float = 1.0
    """Weight in the trained sum; 0: measured only."""
    arguments: dict[str, Any] = {}
    """Keyword arguments: handed to every call of a function, to the constructor of a class."""
    held_out: bool = False
    """Asked in evaluations only, never in training, so that training cannot exploit it; needs weight 0."""
    clip: tuple[float, float] | None = None
    """Range that it is cut to."""
    normalise: Literal["none", "batch"] = "none"
    """batch: zero mean and unit std over the rollout of all processes, so that weights compare."""
    only_if: Gate | None = None
    """Counts only where another reward allows it."""
    isolation: Literal["process", "thread"] = "process"
    """process: a process of its own, which can be killed. thread: inside the trainer, for what shares its device's
    memory; it cannot be killed."""
    device: str | None = None
    """Where a class or factory puts its model; None: the process's own device."""
    batch_size: int | None = Field(default=None, ge=1)
    """Most completions of one call; None: what was sampled at once."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds after which a call has failed; its process is killed. A thread cannot be killed, so the run ends."""
    memory_mib: int | None = Field(default=None, ge=1)
    """Resident memory above which the reward's process is killed (Linux)."""
    retries: int = Field(default=1, ge=0)
    """How often a failed call is repeated, after a random pause that grows."""
    max_failures: float = Field(default=0.1, ge=0, le=1)
    """The run stops if the reward failed for a larger share of a rollout's completions."""
    cache: bool = False
    """Do not ask again about the same prompt, columns and completion."""

    @property
    def shown_name(self) -> str:
        """As metrics show it."""
        remote = self.name.startswith(("http://", "https://"))
        return self.name.rstrip("/").rpartition(":" if ":" in self.name and not remote else "/")[2]

    @model_validator(mode="after")
    def _consistent(self) -> "RewardBlock":
        if self.held_out and self.weight != 0:
            raise ValueError(f"weight: {self.weight:g}, but held_out rewards are only measured; write weight: 0.0")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip: {list(self.clip)} is no range [low, high]")
        if self.isolation == "thread" and self.memory_mib is not None:
            raise ValueError("memory_mib: a thread has no memory of its own; use isolation: process")
        return self

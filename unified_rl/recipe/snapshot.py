"""The recipe's `ema` and `snapshots` blocks: copies of the trained weights that follow them."""

from typing import Literal

from pydantic import Field

from unified_rl.recipe.block import Block


class Snapshot(Block):
    """A copy that moves by `copy <- d copy + (1 - d) trained`, starting from the weights at the start of the run."""

    decay: float = Field(default=0.999, ge=0, le=1)
    """d once the warm-up is over. 0: a plain copy at each update; 1: stays what it was at the start."""
    warmup: Literal["none", "linear", "hyperbolic"] = "none"
    """How d rises to decay. At tick k, counted from 0: linear: slope x (k - delay), so 0 until delay;
    hyperbolic: (1 + k) / (10 + k)."""
    slope: float = Field(default=0.001, gt=0)
    delay: int = Field(default=0, ge=0)
    """Ticks before the linear warm-up. DiffusionNFT: slope 0.001, decay 0.5; or slope 0.0075, delay 75, decay 0.999."""
    every: int = Field(default=1, ge=1)
    """Ticks between two updates of the copy."""
    clock: Literal["step", "rollout"] = "step"
    """What a tick is: an optimiser step, or a rollout with all its updates."""


class Ema(Snapshot):
    """The snapshot named ema: an average of the trained weights, for evaluation and export."""

    warmup: Literal["none", "linear", "hyperbolic"] = "hyperbolic"

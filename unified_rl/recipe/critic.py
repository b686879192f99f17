"""The recipe's `objective.critic` block: PPO's value function."""

from typing import Literal

from pydantic import Field

from unified_rl.recipe.block import Block


class Critic(Block):
    """The value function of `advantage: gae`; its learning rate is `optimizer.critic_lr`."""

    network: Literal["head", "separate"] = "head"
    """Tokens: a head on the policy's own last hidden states, or on those of a second, trained copy of the model.
    Denoising steps always have a small convolutional network of (x_t, noise level)."""
    trunk_gradient: bool = False
    """head: let the value loss train the policy's trunk too."""
    width: int = Field(default=64, ge=1)
    """Hidden units of the head, channels of the convolutions."""
    level: Literal["step", "turn"] = "step"
    """What one decision is for the discount: each step, or each turn (its steps share one advantage)."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of the reward, a decision."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Generalised advantage estimation: 1: returns minus values (unbiased); 0: one-step differences."""
    whiten: bool = True
    """Shift and scale advantages to mean 0 and std 1 over all steps of the rollout."""
    value_coef: float = Field(default=0.5, gt=0)
    """Weight of the value loss beside the policy's."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """Values are not trained further than this from those of the rollout, in units of the reward; None: no bound."""

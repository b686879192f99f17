"""Keys of the recipe's `objective` block for what is no policy gradient; `objective.py` has the others."""

from typing import Literal

from pydantic import Field

from unified_rl.recipe.block import Block


class RewardGradient(Block):
    """Gradients of differentiable rewards through the picture (method reward_gradient)."""

    kind: Literal["last_steps", "clean_prediction", "renoised"] = "last_steps"
    """last_steps: through the last `steps` steps and the decoder (DRaFT-K, AlignProp). clean_prediction: through one
    step, whose predicted clean sample is decoded (ReFL). renoised: through the last step, which is taken from the
    finished sample, noised again `copies` times (DRaFT-LV)."""
    steps: tuple[int, int] = (1, 1)
    """Fewest and most steps from the end, drawn anew for each update; of clean_prediction: how many steps before the
    end its one step lies, 1 being the last."""
    copies: int = Field(default=2, ge=1)
    """renoised: noises of one sample."""
    margin: float | None = None
    """Train only while the reward is below this (ReFL: max(0, margin - reward)); None: always."""


class MethodBlock(Block):
    """What a rollout is trained with; a base of `Objective`."""

    method: str = "policy_gradient"
    """policy_gradient (the keys ratio, loss, aggregation...). Over the forward process of a denoiser: nft, awm.
    Imitation: sft (advantage: uniform, best or exponential). Over pairs or groups: dpo, dgpo. Through the picture:
    reward_gradient. Or your own: `package.module:function` or `file.py:function`."""
    beside: str | None = None
    """A second method on the same rollout, whose loss is added."""
    beside_coef: float = Field(default=1.0, gt=0)
    """Weight of that loss."""
    old_weights: str = "trained"
    """nft, awm, dgpo: the old policy to compare with, a name of `snapshots`; trained: the weights before the update."""
    temperature: float = Field(default=1.0, gt=0)
    """advantage exponential: exp(reward / temperature)."""
    subtract_mean: bool = False
    """advantage exponential or best, of denoisers: weights minus their group's mean, so that what all samples of a
    group have in common, the errors of a sampler with few steps included, is not imitated."""
    mix_coef: float = Field(default=1.0, gt=0)
    """nft: how far the positive policy lies from the old one, in units of the trained one's distance."""
    error_weight: Literal["uniform", "t", "t2", "huber", "ghuber"] | None = None
    """awm, and denoising errors of sft, dpo and dgpo: weight of the error at noise level t. t2 makes of a velocity's
    error that of the predicted clean sample. None: ghuber for awm, uniform for the others."""
    pair_coef: float = Field(default=0.1, gt=0)
    """dpo: of the margin (its beta; about 0.1 for texts, 2000 for denoising errors). dgpo: of the group's drift."""
    pair_form: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """dpo: the loss of a margin."""
    reward_gradient: RewardGradient = RewardGradient()

"""The recipe's `objective` block: how rewards become a loss."""

from typing import Literal

from pydantic import Field, field_validator

from unified_rl.errors import nearest
from unified_rl.recipe.block import Block
from unified_rl.recipe.critic import Critic
from unified_rl.recipe.method import MethodBlock
from unified_rl.recipe.method_rules import METHOD_KINDS, REFERENCE_METHODS
from unified_rl.recipe.objective_rules import GAUSSIAN_LOSSES, LOSS_NAMES


class KL(Block):
    """Divergence from the reference policy."""

    coef: float = Field(default=0.0, ge=0)
    estimator: Literal["k1", "k2", "k3", "gaussian", "prediction"] = "k3"
    """gaussian: exact, for Gaussian steps (mean over dims). prediction: mean squared distance of a denoiser's
    predictions, for methods over the forward process."""
    reference: str = "base"
    """What the policy is held near: base (frozen, or the adapter switched off), ema, or a name of snapshots."""
    place: Literal["loss", "reward"] = "loss"
    """loss: added to each step's loss. reward: its sum over a trajectory is taken off the reward before advantages."""
    target: float | None = Field(default=None, gt=0)
    """Steer coef, from its value here, so that the mean over steps stays at this many nats; None: coef is fixed."""
    gain_p: float = Field(default=0.2, ge=0)
    gain_i: float = Field(default=0.1, ge=0)
    """Proportional and integral gain of the controller, on the logarithm of coef."""


class Correction(Block):
    """Importance weights for a sampler that is not exactly the trained policy: old policy / rollout policy."""

    mode: Literal["none", "truncate", "mask"] = "none"
    """truncate: at most cap. mask: 0 above cap or below floor."""
    level: Literal["token", "sequence", "sequence_mean"] = "token"
    """Of each step, of the whole sequence (product), or its geometric mean."""
    cap: float = Field(default=2.0, gt=0)
    floor: float = Field(default=0.0, ge=0)


class Objective(MethodBlock):
    """How rewards become a loss, for one segment."""

    preset: str | None = None
    advantage: Literal[
        "group_std", "group_mean", "global_std", "rloo", "group_whitened", "batch_whitened", "prompt_std", "gdpo",
        "pass_k", "gae", "uniform", "exponential", "best", "best_worst",
    ] = "group_std"  # fmt: skip
    """What a reward is compared with and divided by. Minus the group's mean: over the group's std (GRPO), over nothing
    (Dr.GRPO: group_mean), over the std of all rewards (global_std) or of all centred rewards (group_whitened:
    REINFORCE++ with baseline). rloo: minus the mean of the other members. batch_whitened: mean and std of all rewards
    (REINFORCE++). prompt_std: mean and std of the prompt's past (DDPO). gdpo: each reward over its group's std, summed,
    then whitened. pass_k: only the best of a group, by its lead. gae: each step by a critic (PPO); see `critic`. For
    imitation and pairs: uniform: 1; exponential: exp(reward / temperature) over its group's mean (RWR); best: 1 for the
    group's best; best_worst: 1 and -1 (DPO)."""
    advantage_clip: float | None = Field(default=None, gt=0)
    std_eps: float = Field(default=1e-4, gt=0)
    """Of advantages that divide by a std of rewards: added to it, in units of the reward."""
    population_std: bool = False
    """Of the same: divide squares by their number (numpy), not by one less (torch)."""
    prompt_buffer: int = Field(default=32, ge=2)
    """prompt_std: how many rewards of a prompt are remembered."""
    prompt_min_count: int = Field(default=16, ge=2)
    """prompt_std: with fewer of them, the whole batch's mean and std are used."""
    ratio: Literal["token", "sequence", "sequence_token", "sequence_product", "none"] = "token"
    """Importance ratio of each step, or of the whole sequence (GSPO: its geometric mean; sequence_token: with the
    gradient of each step; sequence_product: the exact one, the product over steps); none: no ratio."""
    loss: str = "clip"
    """clip | cispo | sapo | reinforce | vespo | drpo | spo | guard | dppo, or your own: `package.module:function` or
    `file.py:function`."""
    clip_low: float = Field(default=0.2, ge=0)
    clip_high: float = Field(default=0.2, ge=0)
    """Distances of the bounds from 1; for cispo, clip_high is the bound itself."""
    threshold_unit: Literal["mean", "nats"] = "mean"
    """Gaussian steps: what clip_low, clip_high, max_divergence and kl.target are given in. mean: over the latent dims,
    as is usual, so that they mean less the higher the resolution. nats: the step's own log-ratio or divergence, the sum
    over dims; converted by their number."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of the loss for negative advantages (dual-clip PPO)."""
    delta: float | None = Field(default=None, gt=1)
    """Upper bound of the unclipped ratio (INTELLECT-2)."""
    penalty_range: float = Field(default=0.2, gt=0)
    """drpo, spo: the ratio's distance from 1 at which the quadratic penalty outweighs the advantage."""
    max_divergence: float = Field(default=1e-5, gt=0)
    """dppo: trust region, in nats from the old policy (Gaussian steps: mean over dims)."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """Mean over all steps; mean over sequences of their step means; of their step sums; sum over a constant length."""
    kl: KL = KL()
    correction: Correction = Correction()
    critic: Critic = Critic()
    old_log_probs: Literal["rollout", "recompute"] = "rollout"
    """The ratio's denominator: what the sampler reported, or an evaluation before the first update."""
    off_policy_mask: float | None = Field(default=None, gt=0)
    """Drop sequences with a negative advantage that the policy has left by more than this mean log-ratio, in nats."""
    entropy_coef: float = Field(default=0.0, ge=0)
    entropy_target: float | None = Field(default=None, gt=0)
    """Adapt entropy_coef by entropy_step an update, up below this mean entropy (nats a step) and down above it."""
    entropy_step: float = Field(default=0.005, gt=0)
    top_entropy: float = Field(default=1.0, gt=0, le=1)
    """Train only this share of the steps, those with the highest entropy."""
    stop_kl: float | None = Field(default=None, gt=0)
    """Skip the rest of a rollout's updates once the policy is further than this from the old one (update_kl, nats)."""
    train_steps: int | None = Field(default=None, ge=1)
    """Train only this many random steps of a rollout at each update; None: all."""

    overlong: Literal["keep", "mask", "penalty"] = "keep"
    """What becomes of completions that reach the limit of their length. mask: those that were cut carry no loss (their
    rewards still count in the group's statistics). penalty: the reward falls linearly, by 1 at the limit, over the last
    overlong_margin of it (DAPO's soft overlong punishment)."""
    overlong_margin: float = Field(default=0.2, gt=0, le=1)
    """penalty: a share of the most steps that a completion can have."""

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        if name not in LOSS_NAMES and ":" not in name:
            raise ValueError(f"no loss {name!r}{nearest(name, LOSS_NAMES)}; known: {', '.join(LOSS_NAMES)}")
        return name

    @field_validator("method", "beside")
    @classmethod
    def _known_method(cls, name: str | None) -> str | None:
        if name is not None and name not in METHOD_KINDS and ":" not in name:
            known = list(METHOD_KINDS)
            raise ValueError(f"no method {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        return name

    @property
    def methods(self) -> list[str]:
        """The method, and the one beside it."""
        return [self.method, *([self.beside] if self.beside else [])]

    @property
    def kinds(self) -> set[str | None]:
        """What the losses are functions of, see `METHOD_KINDS`; None for a method of the user's own."""
        return {METHOD_KINDS.get(method) for method in self.methods}

    @property
    def needs_reference(self) -> bool:
        """Whether the policy keeps what it needs to act as the frozen reference."""
        return (self.kl.coef > 0 and self.kl.reference == "base") or any(
            method in REFERENCE_METHODS or ":" in method for method in self.methods
        )

    @property
    def needs_anchor(self) -> bool:
        """Whether the policy is evaluated once more before the first update of a rollout."""
        return "steps" in self.kinds and (
            self.old_log_probs == "recompute"
            or self.loss in GAUSSIAN_LOSSES
            or self.top_entropy < 1
            or (self.kl.coef > 0 and self.kl.place == "reward")
        )

"""A recipe: the full description of a run. Every key, its default and what it means.

Blocks are strict: an unknown key is an error. `recipe_file` reads recipes from YAML. Neither may import torch:
`validate` and `--help` answer at once.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from unified_rl.errors import nearest
from unified_rl.objective_rules import GAUSSIAN_LOSSES, LOSS_NAMES, refusals


class Block(BaseModel):
    """A strict block of a recipe: unknown keys are errors, values are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Adapter(Block):
    """Which weights are trained."""

    kind: Literal["none", "lora"] = "none"
    """none: full fine-tuning; lora: peft adapters, the base weights frozen."""
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64.0, gt=0)
    targets: list[str] | Literal["auto"] = "auto"
    """Names of the linear layers that get adapters; auto: the attention projections."""


class DiffusionSampling(Block):
    """The behaviour policy of a diffusers pipeline."""

    num_inference_steps: int = Field(default=10, ge=1)
    kernel: Literal["auto", "flow_sde", "dance_sde", "cps", "ddim"] = "auto"
    """The transition kernel; auto: from the pipeline's scheduler (flow_sde or ddim)."""
    noise_level: float = Field(default=0.7, ge=0)
    """Noise of the kernel: Flow-GRPO's eta for flow_sde, the diffusion coefficient of dance_sde, the share of a quarter
    turn for cps (at most 1), DDIM's eta for ddim. 0: deterministic, nothing to train on."""
    noise_steps: int | None = Field(default=None, ge=1)
    """Only this many first steps, which lay out the picture, are stochastic and trained; the others follow the ODE
    (as in Flow-GRPO-Fast). None: all."""
    call: dict[str, Any] = {}
    """Further arguments of the pipeline's call, for instance guidance_scale, height, width."""


class TextSampling(Block):
    """The behaviour policy of a transformers generator: the logits processors, in this order."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    chat_template: bool = True
    """Render prompts with the processor's chat template."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are refused (never cut: a cut inside an image breaks the model)."""


SAMPLING: dict[str, type[Block]] = {"diffusion": DiffusionSampling, "causal_lm": TextSampling}


class PolicyBlock(Block):
    """The model to train."""

    model: str
    """A folder written by `save_pretrained`, or a hub name."""
    revision: str | None = None
    """Revision of a hub name; pin it."""
    family: Literal["diffusion", "causal_lm"]
    """Found from the model if left out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None
    """Attention implementation by the library's own name (transformers: eager, sdpa, flash_attention_2...; diffusers:
    native, _native_math, flash...). None: the library's choice."""
    adapter: Adapter = Adapter()
    train: list[str] | None = None
    """Regular expressions on parameter names: only matching parameters are trained. None: the family's default."""
    sampling: DiffusionSampling | TextSampling


class Data(Block):
    """Where prompts come from: a .jsonl, .csv or .txt file, `package.module:attr`, or `file.py:attr`."""

    prompts: str
    evaluation: str | None = None
    """Held-out prompts; None switches evaluation off."""


class RewardBlock(Block):
    """One reward."""

    name: str
    """An entry point (`unified-rl list rewards`), `package.module:attr`, or `path/to/file.py:attr`."""
    weight: float = 1.0
    """Weight in the trained sum; 0: measured only."""
    arguments: dict[str, Any] = {}
    """Keyword arguments handed to every call."""


class KL(Block):
    """Divergence from the reference policy."""

    coef: float = Field(default=0.0, ge=0)
    estimator: Literal["k1", "k2", "k3", "gaussian"] = "k3"
    """gaussian: exact, for Gaussian steps (mean over dims)."""
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


class Objective(Block):
    """How rewards become a loss, for one segment."""

    preset: str | None = None
    advantage: Literal[
        "group_std", "group_mean", "global_std", "rloo", "group_whitened", "batch_whitened", "prompt_std", "gdpo",
        "pass_k",
    ] = "group_std"  # fmt: skip
    """What a reward is compared with and divided by. Minus the group's mean: over the group's std (GRPO), over nothing
    (Dr.GRPO: group_mean), over the std of all rewards (global_std) or of all centred rewards (group_whitened:
    REINFORCE++ with baseline). rloo: minus the mean of the other members. batch_whitened: mean and std of all rewards
    (REINFORCE++). prompt_std: mean and std of the prompt's past (DDPO). gdpo: each reward over its group's std, summed,
    then whitened. pass_k: only the best of a group, by its lead."""
    advantage_clip: float | None = Field(default=None, gt=0)
    prompt_buffer: int = Field(default=32, ge=2)
    """prompt_std: how many rewards of a prompt are remembered."""
    prompt_min_count: int = Field(default=16, ge=2)
    """prompt_std: with fewer of them, the whole batch's mean and std are used."""
    ratio: Literal["token", "sequence", "sequence_token", "none"] = "token"
    """Importance ratio of each step, or of the whole sequence (GSPO: its geometric mean; sequence_token: with the
    gradient of each step); none: no ratio."""
    loss: str = "clip"
    """clip | cispo | sapo | reinforce | drpo | spo | guard | dppo, or your own: `package.module:function` or
    `file.py:function`."""
    clip_low: float = Field(default=0.2, ge=0)
    clip_high: float = Field(default=0.2, ge=0)
    """Distances of the bounds from 1; for cispo, clip_high is the bound itself."""
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

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        if name not in LOSS_NAMES and ":" not in name:
            raise ValueError(f"no loss {name!r}{nearest(name, LOSS_NAMES)}; known: {', '.join(LOSS_NAMES)}")
        return name

    @property
    def needs_anchor(self) -> bool:
        """Whether the policy is evaluated once more before the first update of a rollout."""
        return (
            self.old_log_probs == "recompute"
            or self.loss in GAUSSIAN_LOSSES
            or self.top_entropy < 1
            or (self.kl.coef > 0 and self.kl.place == "reward")
        )


class Optimizer(Block):
    """AdamW."""

    lr: float = Field(default=1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to zero at the last step."""


class EngineBlock(Block):
    """How the work is cut and sharded."""

    backend: Literal["auto", "local", "deepspeed"] = "auto"
    """auto: deepspeed if there are several processes or a ZeRO stage, else local."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch: int = Field(default=16, ge=1)
    """Trajectories in one window (one forward and backward)."""
    rollout_batch: int | None = Field(default=None, ge=1)
    """Trajectories sampled at once; None: as many as a window."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; None: torch's own choice, shared out between local processes."""


class Evaluation(Block):
    """The fixed exam: the same prompts and seeds every time."""

    every: int = Field(default=10, ge=1)
    num_prompts: int = Field(default=128, ge=1)
    seed: int = 1234
    sampling: dict[str, Any] = {}
    """Keys of policy.sampling that differ in evaluation, for instance noise_level: 0."""
    num_saved: int = Field(default=16, ge=0)
    """Samples written to the run's folder at each evaluation."""


class Checkpoint(Block):
    every: int = Field(default=20, ge=1)
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints stay."""


class Recipe(Block):
    """A whole run."""

    seed: int = 0
    num_steps: int = Field(default=60, ge=1)
    """Optimiser steps."""
    group_size: int = Field(default=16, ge=2)
    """Trajectories of one prompt."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Groups of one rollout, over all processes."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a rollout before the next one."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps of one pass; updates_per_rollout is epochs x minibatches."""
    resample: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO): how often groups whose rewards are all equal are redrawn from other prompts."""
    max_replay_gap: float = Field(default=1e-3, gt=0)
    """The run stops if a stored log-prob and its replay differ by more than this before the first update."""
    policy: PolicyBlock
    data: Data
    rewards: list[RewardBlock] = Field(min_length=1)
    objective: dict[str, Objective]
    """One block for all segments (stored under "all"), or one a segment."""
    optimizer: Optimizer = Optimizer()
    engine: EngineBlock = EngineBlock()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def samples_per_rollout(self) -> int:
        return self.group_size * self.prompts_per_step

    @property
    def updates_per_rollout(self) -> int:
        return self.epochs * self.minibatches

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.samples_per_rollout % self.minibatches:
            raise ValueError(f"minibatches: {self.minibatches} does not divide the {self.samples_per_rollout} samples")
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("rewards: every one has weight 0, so there is nothing to train on; give one a weight")
        for name, objective in self.objective.items():
            for key, reason in refusals(objective, self.policy.family):
                raise ValueError(f"objective.{name}.{key}: {reason}")
        return self

    def objective_for(self, segment: str) -> Objective:
        """The objective settings of a segment."""
        return self.objective.get(segment) or self.objective["all"]

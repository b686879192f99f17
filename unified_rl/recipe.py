"""A recipe: the full description of a run. Every key, its default and what it means.

Blocks are strict: an unknown key is an error. `recipe_file` reads recipes from YAML. Neither may import torch:
`validate` and `--help` answer at once.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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


class Objective(Block):
    """How rewards become a loss, for one segment."""

    preset: str | None = None
    advantage: Literal["group_std", "group_mean", "global_std"] = "group_std"
    """Centre by the group mean; then divide by the group's std, by nothing (Dr.GRPO), or by the std of all samples."""
    advantage_clip: float | None = Field(default=None, gt=0)
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each step, or of the whole sequence (GSPO: its geometric mean)."""
    loss: Literal["clip", "cispo", "sapo"] = "clip"
    clip_low: float = Field(default=0.2, ge=0)
    clip_high: float = Field(default=0.2, ge=0)
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of the loss for negative advantages (dual-clip PPO)."""
    delta: float | None = Field(default=None, gt=1)
    """Upper bound of the unclipped ratio (INTELLECT-2)."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """Mean over all steps; mean over sequences of their step means; of their step sums; sum over a constant length."""
    kl: KL = KL()
    entropy_coef: float = Field(default=0.0, ge=0)
    train_steps: int | None = Field(default=None, ge=1)
    """Train only this many random steps of a rollout at each update; None: all."""


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
            if objective.kl.estimator == "gaussian" and objective.kl.coef and self.policy.family != "diffusion":
                raise ValueError(f"objective.{name}.kl: gaussian needs Gaussian steps; use k3 for tokens")
            if objective.ratio == "sequence" and self.policy.family == "diffusion":
                raise ValueError(f"objective.{name}.ratio: sequence needs all steps in one forward; use token")
            if objective.train_steps is not None and self.policy.family != "diffusion":
                raise ValueError(f"objective.{name}.train_steps: for denoising steps; tokens are trained together")
        return self

    def objective_for(self, segment: str) -> Objective:
        """The objective settings of a segment."""
        return self.objective.get(segment) or self.objective["all"]

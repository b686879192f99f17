"""A recipe: the full description of a run. Every key, its default and what it means (the `policy`, `objective`
and reward blocks in files of their own).

Blocks are strict: an unknown key is an error. `file` reads recipes from YAML. None of them may import torch:
`validate` and `--help` answer at once.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from unified_rl.errors import nearest
from unified_rl.recipe.block import Block
from unified_rl.recipe.guard import Guard, guard_conflicts
from unified_rl.recipe.method_rules import data_conflicts, method_conflicts
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.objective_rules import refusals
from unified_rl.recipe.policy import STEPWISE, PolicyBlock
from unified_rl.recipe.reward import RewardBlock
from unified_rl.recipe.snapshot import Ema, Snapshot
from unified_rl.recipe.tracker import TrackerBlock


class Data(Block):
    """Where prompts come from: a .jsonl, .csv or .txt file, `package.module:attr`, or `file.py:attr`."""

    prompts: str = ""
    rollouts: str | None = None
    """In place of prompts: recorded samples to train on without generating any, a .jsonl or the folder of a run."""
    evaluation: str | None = None
    """Held-out prompts; None switches evaluation off."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """skip: a row of `prompts` whose picture cannot be read (damaged, too large, gone), or which a language model
    refuses (longer than max_prompt_tokens, text and pictures that do not fit), gives its place to the next row of the
    file, on all processes alike, and is counted; held-out rows are never skipped."""
    max_bad_images: float = Field(default=0.01, ge=0, le=1)
    """With skip: the run stops when more than this share of all rows was skipped (one row always may)."""


class Optimizer(Block):
    """AdamW."""

    lr: float = Field(default=1e-5, gt=0)
    critic_lr: float | None = Field(default=None, gt=0)
    """Of critics (objective.advantage: gae), with the same warm-up and decay; None: lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_skipped: int = Field(default=20, ge=1)
    """The run stops when this many updates in a row were skipped because their gradient was not finite."""
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to zero at the last step."""


class EngineBlock(Block):
    """How the work is cut and sharded."""

    backend: Literal["auto", "local", "deepspeed"] = "auto"
    """auto: deepspeed if there are several processes or a ZeRO stage, else local."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    """What GPUs leave to the main memory: the optimiser with its float32 weights (zero_stage 1 to 3), or the trained
    weights too (zero_stage 3)."""
    offload_folder: str | None = None
    """A folder on a fast disk (NVMe) that holds these states instead of the main memory, in files of each process that
    vanish with it."""
    micro_batch: int = Field(default=16, ge=1)
    """Trajectories in one window (one forward and backward)."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Language models: fill windows with trajectories of similar length, the longest first, up to this many tokens
    (prompt and completion, padding included) and at most micro_batch trajectories. None: micro_batch alone."""
    rollout_batch: int | None = Field(default=None, ge=1)
    """Trajectories sampled at once; None: as many as a window."""
    on_out_of_memory: Literal["stop", "halve"] = "stop"
    """halve: an update that does not fit into memory is made again in windows of half as many rows, and so are all that
    follow; with zero_stage 0 or 1."""
    deepspeed: dict[str, Any] | str = {}
    """DeepSpeed's own configuration, in place or as a JSON file, merged over what these keys say."""
    timeout: float = Field(default=1800.0, gt=0)
    """Seconds to wait for a process that is gone or stuck before the run is ended, with that process named."""
    straggler_factor: float = Field(default=1.5, gt=1)
    """A process that takes this many times as long as the mean of the others for its own rollout, rewards or update,
    three times in a row, is named in a warning."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; None: torch's own choice, shared out between local processes."""


class Evaluation(Block):
    """The fixed exam: the same prompts and seeds every time."""

    every: int = Field(default=10, ge=1)
    num_prompts: int = Field(default=128, ge=1)
    seed: int = 1234
    weights: Literal["trained", "ema"] = "trained"
    """Which weights are examined."""
    sampling: dict[str, Any] = {}
    """Keys of policy.sampling that differ in evaluation, for instance noise_level: 0, more num_inference_steps, or a
    larger call: {height: 1024}, whose arguments are changed one by one."""
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
    group_size: int = Field(default=16, ge=1)
    """Trajectories of one prompt; 1 for advantages that need no group (gae, batch_whitened, prompt_std, uniform), and
    for gradients of rewards."""
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
    """One block for all segments (stored under "all"), or one a segment; a segment without one is not trained."""
    optimizer: Optimizer = Optimizer()
    ema: Ema | None = None
    """Keep a moving average of the trained weights; checkpoints hold it as `ema/`, beside `policy/`."""
    snapshots: dict[str, Snapshot] = {}
    """Further copies of the trained weights, by name, for rollout_weights and objectives that compare with one."""
    rollout_weights: str = "trained"
    """Which weights draw rollouts: trained, ema, or a name of snapshots."""
    record_rollouts: bool = False
    """Keep all samples of all rollouts in the run's folder, with rewards, tokens and log-probs, for `data.rollouts` of
    a later run."""
    engine: EngineBlock = EngineBlock()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    trackers: list[TrackerBlock] = []
    """Services that show the run elsewhere: tensorboard, wandb, your own."""

    @property
    def samples_per_rollout(self) -> int:
        return self.group_size * self.prompts_per_step

    @property
    def updates_per_rollout(self) -> int:
        return self.epochs * self.minibatches

    @property
    def all_snapshots(self) -> dict[str, Snapshot]:
        """Every copy of the trained weights that the run keeps, by name."""
        return {**self.snapshots, **({"ema": self.ema} if self.ema else {})}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.samples_per_rollout % self.minibatches:
            raise ValueError(f"minibatches: {self.minibatches} does not divide the {self.samples_per_rollout} samples")
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("rewards: every one has weight 0, so there is nothing to train on; give one a weight")
        conflicts = (*data_conflicts(self), *guard_conflicts(self), *self.policy.refusals(self.engine.zero_stage))
        for key, reason in conflicts:
            raise ValueError(f"{key}: {reason}")
        for reserved in {"trained", "ema"} & set(self.snapshots):
            raise ValueError(f"snapshots.{reserved}: the name is taken; the average has a block of its own, ema")
        if self.rollout_weights not in ("trained", *self.all_snapshots):
            known = ["trained", *self.all_snapshots]
            raise ValueError(
                f"rollout_weights: no snapshot {self.rollout_weights!r}{nearest(self.rollout_weights, known)}"
            )
        if self.evaluation.weights == "ema" and self.ema is None:
            raise ValueError("evaluation.weights: ema needs the block ema, for instance ema: {decay: 0.99}")
        if self.engine.offload != "none" and self.engine.zero_stage < (3 if self.engine.offload == "all" else 1):
            needed = "3" if self.engine.offload == "all" else "1, 2 or 3"
            raise ValueError(f"engine.offload: {self.engine.offload} needs zero_stage {needed}")
        if self.engine.offload_folder is not None and self.engine.offload == "none":
            raise ValueError("engine.offload_folder: nothing is offloaded; say engine.offload: optimizer, or all")
        if self.engine.on_out_of_memory == "halve" and self.engine.zero_stage >= 2:
            raise ValueError(
                "engine.on_out_of_memory: halve needs zero_stage 0 or 1; from 2 on processes exchange gradients within"
                " each window, which one of them cannot leave alone"
            )
        if self.engine.micro_batch_tokens is not None and self.policy.family in STEPWISE:
            raise ValueError("engine.micro_batch_tokens: for language models; a denoiser's rows all cost the same")
        if self.optimizer.critic_lr is not None and all(part.advantage != "gae" for part in self.objective.values()):
            raise ValueError("optimizer.critic_lr: there is no critic; leave it out, or say objective.advantage: gae")
        self._check_references()
        alone = {"gae", "batch_whitened", "prompt_std", "uniform"}
        for name, objective in self.objective.items():
            compared = objective.kinds != {"reward"}  # a reward's gradient needs no advantage
            if self.group_size == 1 and compared and objective.advantage not in alone:
                raise ValueError(
                    f"group_size: 1 leaves {objective.advantage} (objective.{name}) nothing to compare with; "
                    "at least 2, or advantage: gae"
                )
        for name, objective in self.objective.items():
            for key, reason in refusals(objective, self.policy.family_of(name)):
                raise ValueError(f"objective.{name}.{key}: {reason}")
            for key, reason in method_conflicts(objective, self):
                raise ValueError(f"{key}: {reason}")
        return self

    @property
    def log_probs_are_means(self) -> bool:
        """Whether every trained step is Gaussian, with a log-prob that is a mean over its latent dims."""
        return {self.policy.family_of(name) for name in self.objective} == {"diffusion"}

    @property
    def kl_reference(self) -> str | None:
        """The copy of the trained weights that divergences are measured from; None: the base model."""
        named = {objective.kl.reference for objective in self.objective.values() if objective.kl.coef > 0} - {"base"}
        return min(named, default=None)

    def _check_references(self) -> None:
        known = ["base", *self.all_snapshots]
        penalised = {name: part.kl.reference for name, part in self.objective.items() if part.kl.coef > 0}
        for name, reference in penalised.items():
            if reference not in known:
                hint = nearest(reference, known) or "; add it to snapshots, or the block ema"
                raise ValueError(f"objective.{name}.kl.reference: no snapshot {reference!r}{hint}")
        if len({*penalised.values()}) > 1:
            raise ValueError("objective: all segments' divergences have one kl.reference; say the same in each")

    def objective_for(self, segment: str) -> Objective:
        """The objective settings of a segment that is trained."""
        return self.objective.get(segment) or self.objective["all"]

    def trains(self, segment: str) -> bool:
        """Whether a segment has objective settings; one without is sampled and not trained."""
        return segment in self.objective or "all" in self.objective

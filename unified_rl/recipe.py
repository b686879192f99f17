"""A recipe: the full description of a run, read from YAML, checked before anything heavy is imported.

Every block is strict: an unknown key is an error that names the nearest valid one. Presets only fill in keys that the
recipe leaves out, so a resolved recipe spells out everything that runs. This module must not import torch: `validate`
and `--help` answer at once.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unified_rl.presets import PRESETS

RECIPES = Path(__file__).parent.parent / "recipes"
"""Where the recipes that ship with the project lie; they may be named without their path."""


class RecipeError(Exception):
    """The user's recipe or arguments are wrong. The message is one line: where, what, what to do."""


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
    kernel: Literal["auto", "flow_sde", "ddim"] = "auto"
    """The transition kernel; auto: from the pipeline's scheduler."""
    noise_level: float = Field(default=0.7, ge=0)
    """Noise of the kernel: Flow-GRPO's eta for flow_sde, DDIM's eta for ddim. 0: deterministic, nothing to train on."""
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
        exam = {**self.policy.sampling.model_dump(), **self.evaluation.sampling}
        _resolve_sampling(exam, self.policy.family, "evaluation.sampling.")
        for name, objective in self.objective.items():
            if objective.kl.estimator == "gaussian" and objective.kl.coef and self.policy.family != "diffusion":
                raise ValueError(f"objective.{name}.kl: gaussian needs Gaussian steps; use k3 for tokens")
        return self

    def objective_for(self, segment: str) -> Objective:
        """The objective settings of a segment."""
        return self.objective.get(segment) or self.objective["all"]


class _UniqueLoader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, which YAML would silently resolve to the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"{key}: given twice (line {node.start_mark.line + 1}); keep one")
        return super().construct_mapping(node, deep)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        RecipeError: if there is neither.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path.resolve()
    shipped = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    raise RecipeError(f"{name}: no such recipe file{nearest(name, shipped)}")


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override, resolve and check a recipe.

    Raises:
        RecipeError: with one line that says where and what, for anything wrong in it.
    """
    path = find_recipe(name)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of blocks, see recipes/quickstart.yaml")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_recipe(raw, path.parent)


def parse_recipe(raw: dict, folder: Path) -> Recipe:
    """Resolve and check a recipe that is already a dictionary; relative paths are looked up in `folder` first."""
    raw = json.loads(json.dumps(raw, default=str))
    _check_keys(raw, Recipe, "")
    _resolve_policy(raw, folder)
    for block, key in (("data", "prompts"), ("data", "evaluation")):
        if isinstance(raw.get(block), dict) and isinstance(raw[block].get(key), str):
            raw[block][key] = _locate(raw[block][key], folder)
    for reward in raw["rewards"] if isinstance(raw.get("rewards"), list) else []:
        if isinstance(reward, dict) and isinstance(reward.get("name"), str) and ":" in reward["name"]:
            reward["name"] = _locate(reward["name"], folder)
    raw["objective"] = _resolve_objective(raw.get("objective") or {})
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_one_line(error)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def _apply_override(raw: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override}: an override is written a.b=value")
    *parents, last = key.split(".")
    at: Any = raw
    try:
        for part in parents:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        at[int(last) if isinstance(at, list) else last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"{key}: no such place in the recipe to override ({error})") from error


def _locate(value: str, folder: Path) -> str:
    """A path relative to the recipe's folder or to the working directory, made absolute; anything else unchanged."""
    path, separator, attribute = value.partition(":")
    for base in (folder, Path.cwd()):
        if path and (base / path).exists():
            return str((base / path).resolve()) + separator + attribute
    return value


def _resolve_policy(raw: dict, folder: Path) -> None:
    policy = raw.get("policy")
    if not isinstance(policy, dict) or not isinstance(policy.get("model"), str):
        return
    policy["model"] = _locate(policy["model"], folder)
    if "family" not in policy:
        policy["family"] = _family_of(Path(policy["model"]))
    if str(policy["family"]) in SAMPLING and isinstance(policy.setdefault("sampling", {}), dict):
        policy["sampling"] = _resolve_sampling(policy["sampling"], policy["family"], "policy.sampling.")


def _resolve_sampling(raw: dict, family: str, where: str) -> dict:
    _check_keys(raw, SAMPLING[family], where)
    try:
        return SAMPLING[family].model_validate(raw).model_dump()
    except ValidationError as error:
        raise RecipeError(where + _one_line(error)) from error


def _family_of(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return "diffusion"
    if (folder / "config.json").is_file():
        return "causal_lm"
    if folder.is_absolute() or folder.parts[:1] == (".",):
        raise RecipeError(f"policy.model: {folder} has neither model_index.json (diffusers) nor config.json")
    raise RecipeError(f"policy.model: no folder {folder}; for a hub name, say policy.family: {' or '.join(SAMPLING)}")


def _resolve_objective(raw: Any) -> dict:
    if not isinstance(raw, dict):
        raise RecipeError("objective: a mapping of keys, or of one block a segment, is needed")
    by_segment = bool(raw) and all(isinstance(value, dict) for value in raw.values()) and "kl" not in raw
    resolved = {}
    for name, block in (raw if by_segment else {"all": raw}).items():
        where = f"objective.{name}." if by_segment else "objective."
        _check_keys(block, Objective, where)
        preset = block.get("preset")
        if preset is not None and str(preset) not in PRESETS:
            raise RecipeError(f"{where}preset: no preset {preset!r}{nearest(str(preset), list(PRESETS))}")
        filled = dict(PRESETS[preset][1]) if preset else {}
        if isinstance(block.get("kl"), dict):
            block = {**block, "kl": {**filled.get("kl", {}), **block["kl"]}}
        resolved[name] = {**filled, **block}
    return resolved


def _check_keys(raw: Any, model: type[BaseModel], prefix: str) -> None:
    """Refuse unknown keys with the nearest valid name, before pydantic looks at values."""
    if not isinstance(raw, dict):
        return
    for key, value in raw.items():
        if key not in model.model_fields:
            raise RecipeError(f"{prefix}{key}: unknown key{nearest(str(key), list(model.model_fields))}")
        annotation = model.model_fields[key].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            _check_keys(value, annotation, f"{prefix}{key}.")
        elif key == "rewards" and isinstance(value, list):
            for index, item in enumerate(value):
                _check_keys(item, RewardBlock, f"{prefix}rewards.{index}.")


def nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    # "all" and the names of a union's members are ours; the user did not write them
    where = ".".join(str(part) for part in first["loc"] if part not in ("DiffusionSampling", "TextSampling", "all"))
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = re.sub(r"a valid dictionary or instance of \w+", "a block of keys", message)
    given = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
    return f"{where}: {message}{given}" if where else message

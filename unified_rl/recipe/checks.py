"""Checks across a recipe's blocks and against the files that it names, before a model is loaded; no torch."""

import json
import os
import re
from pathlib import Path

from unified_rl.data.environments import check_environment
from unified_rl.data.sources import check_source
from unified_rl.engine.deepspeed_config import raw_config
from unified_rl.errors import RecipeError, nearest
from unified_rl.imports import check_import
from unified_rl.policies.pipeline_table import refusal
from unified_rl.recipe.advice import advice
from unified_rl.recipe.policy import PIPELINES, DiffusionSampling, ImageTokenSampling, PolicyBlock
from unified_rl.recipe.schema import Recipe
from unified_rl.recipe.tracker import check_trackers
from unified_rl.rewards.scoring import check_rewards


def check_recipe(recipe: Recipe) -> list[str]:
    """Everything that can be known to be wrong before a model is loaded; returns warnings.

    Raises:
        RecipeError: for the first thing that is wrong.
    """
    warnings = _check_model(recipe.policy)
    if recipe.policy.writer is not None:
        warnings += _check_model(recipe.policy.writer.block, "policy.writer.model")
    _check_policy(recipe)
    _check_engine(recipe)
    check_rewards(recipe.rewards)
    check_trackers(recipe.trackers)
    return warnings + _check_data(recipe) + _check_counts(recipe) + advice(recipe)


def _check_model(policy: PolicyBlock, key: str = "policy.model") -> list[str]:
    folder = Path(policy.model)
    needed = "model_index.json" if policy.family in PIPELINES else "config.json"
    if folder.is_dir():
        if not (folder / needed).is_file():
            raise RecipeError(f"{key}: {folder} has no {needed}, which a {policy.family} model needs")
        if policy.family == "diffusion":
            _check_class(folder / needed, key)
        return []
    if folder.is_absolute() or policy.model.startswith(".") or policy.model.count("/") > 1:
        raise RecipeError(f"{key}: no folder {folder}; give one that save_pretrained wrote, or a hub name")
    pin = "" if policy.revision else "; pin it with policy.revision"
    return [f"{key}: no folder {policy.model} here, so it is taken from the hub{pin}"]


def _check_class(index: Path, key: str) -> None:
    """Refuse a pipeline whose class is known not to replay."""
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    reason = refusal(name) if isinstance(name, str) else None
    if reason is not None:
        raise RecipeError(f"{key}: {name}: {reason}")


def _check_policy(recipe: Recipe) -> None:
    sampling = recipe.policy.sampling
    segments = recipe.policy.segments
    for name in recipe.objective:
        if name not in ("all", *segments):
            hint = nearest(name, [*segments, "all"])
            raise RecipeError(f"objective.{name}: {recipe.policy.family} policies have no such segment here{hint}")
    for name, objective in recipe.objective.items():
        for key, value in (("loss", objective.loss), ("method", objective.method), ("beside", objective.beside)):
            if value is not None and ":" in value:
                check_import(value, f"objective.{key}" if name == "all" else f"objective.{name}.{key}")
    if isinstance(sampling, ImageTokenSampling):
        exam = recipe.evaluation.sampling.get("decoder")
        for decoder, where in ((sampling.decoder, "policy.sampling"), (exam, "evaluation.sampling")):
            if decoder is not None:
                check_import(decoder, f"{where}.decoder")
    if recipe.policy.environment is not None:
        check_environment(recipe.policy.environment.name)
    if recipe.policy.dtype != "float32" and recipe.policy.adapter.kind == "none":
        if recipe.engine.zero_stage < 2:
            raise RecipeError(
                f"policy.dtype: fine-tuning {recipe.policy.dtype} weights in full needs float32 copies of them, which"
                " engine.zero_stage 2 or 3 keeps (with one process too); or use float32, or policy.adapter.kind: lora"
            )
        if recipe.all_snapshots:
            raise RecipeError("ema, snapshots: follow float32 weights only; use policy.dtype: float32, or an adapter")
    for pattern in recipe.policy.train or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"policy.train: {pattern!r} is no regular expression: {error}") from error
    if not isinstance(sampling, DiffusionSampling):
        _check_savings(recipe)
        return
    if not recipe.trains("image"):
        return  # a frozen pipeline draws for its writer
    if sampling.noise_level == 0 and any("steps" in part.kinds for part in recipe.objective.values()):
        raise RecipeError(
            "policy.sampling.noise_level: 0 makes every step deterministic, so a policy gradient has nothing to train;"
            " try 0.7"
        )
    steps = recipe.objective_for("image").train_steps
    if steps is not None and steps > sampling.num_inference_steps:
        raise RecipeError(
            f"objective.train_steps: {steps} is more than policy.sampling.num_inference_steps ="
            f" {sampling.num_inference_steps}"
        )


def _check_savings(recipe: Recipe) -> None:
    """A model that is no pipeline has no parts to switch off or compile one by one."""
    policy = recipe.policy
    given = {f"memory.{key}": getattr(policy.memory, key) for key in policy.memory.model_fields_set}
    for key, value in {**given, "compile": policy.compile}.items():
        if key != "memory.gradient_checkpointing" and value not in (False, None, "keep"):
            raise RecipeError(
                f"policy.{key}: is for diffusers pipelines; memory.gradient_checkpointing is for all models"
            )


def _check_engine(recipe: Recipe) -> None:
    if recipe.engine.backend == "local" and recipe.engine.zero_stage:
        raise RecipeError(
            f"engine.zero_stage: {recipe.engine.zero_stage} needs deepspeed; say engine.backend: deepspeed, or auto"
        )

    raw_config(recipe.engine)


def _check_data(recipe: Recipe) -> list[str]:
    warnings = []
    num_rows = None
    if recipe.data.rollouts is not None:
        from unified_rl.data.recorded import check_recorded, load_recorded, weights_of  # imports torch

        check_recorded(recipe, load_recorded(recipe.data.rollouts, weights_of(recipe), recipe.group_size))
    else:
        num_rows = check_source(recipe.data.prompts, "data.prompts")
    if num_rows is not None and num_rows < recipe.prompts_per_step:
        warnings.append(
            f"data.prompts: {num_rows} prompts for prompts_per_step = {recipe.prompts_per_step}; they repeat"
        )
    if recipe.data.evaluation is None:
        warnings.append("data.evaluation: not given, so nothing is measured on held-out prompts")
        return warnings
    num_rows = check_source(recipe.data.evaluation, "data.evaluation")
    if num_rows is not None and num_rows < recipe.evaluation.num_prompts:
        warnings.append(f"data.evaluation: only {num_rows} prompts for num_prompts = {recipe.evaluation.num_prompts}")
    if os.path.realpath(recipe.data.evaluation) == os.path.realpath(recipe.data.prompts):
        warnings.append("data.evaluation: the same as data.prompts, so nothing held out is measured")
    return warnings


def _check_counts(recipe: Recipe) -> list[str]:
    warnings = []
    per_update = recipe.samples_per_rollout // recipe.minibatches
    rest = per_update % recipe.engine.micro_batch
    if rest and per_update > recipe.engine.micro_batch:
        warnings.append(
            f"engine.micro_batch: {recipe.engine.micro_batch} does not divide the {per_update} samples of an update;"
            f" its last window has {rest}"
        )
    rest = recipe.num_steps % recipe.updates_per_rollout
    if rest:
        warnings.append(
            f"num_steps: {recipe.num_steps} is no multiple of the {recipe.updates_per_rollout} updates of a rollout;"
            f" the last rollout is used for {rest}"
        )
    return warnings

"""What a resolved recipe will do, in words and counts, before any model is loaded; must not import torch."""

import inspect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from unified_rl.planning.footprint import LIBRARIES, estimate
from unified_rl.policies.pipeline_table import PipelineRow, pipeline_table
from unified_rl.recipe.block import Block
from unified_rl.recipe.explain_method import method_lines
from unified_rl.recipe.explain_noise import noise_lines
from unified_rl.recipe.explain_parts import environment_lines, writer_lines
from unified_rl.recipe.file import shipped_recipes
from unified_rl.recipe.guard import Guard
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.policy import PIPELINES, REMEMBERED_BYTES, SAMPLING, STEPWISE, PolicyBlock
from unified_rl.recipe.presets import PRESETS, RECIPE_PRESETS, SAMPLING_PRESETS
from unified_rl.recipe.reward import RewardBlock
from unified_rl.recipe.schema import Recipe
from unified_rl.recipe.step_counts import chain_windows, step_windows, trained_segments, trained_steps
from unified_rl.rewards.scoring import list_rewards

_MEANINGS = {
    "group_std": "reward minus the group's mean, over the group's std",
    "group_mean": "reward minus the group's mean",
    "global_std": "reward minus the group's mean, over the std of all samples",
    "rloo": "reward minus the mean of the group's others",
    "group_whitened": "reward minus the group's mean, over the std of all such differences",
    "batch_whitened": "reward minus the mean of all samples, over their std",
    "prompt_std": "reward minus the mean of the prompt's past, over its std",
    "gdpo": "each reward over its group's std, weighted sum, whitened over all samples",
    "uniform": "1 for every sample",
    "exponential": "exp(reward / temperature), over its mean in the group",
    "best": "1 for the best of a group, 0 for the others",
    "best_worst": "1 for the best and -1 for the worst of a group, 0 for the others",
    "gae": "of each step by a critic, generalised advantage estimation",
    "pass_k": "only the best of a group, by its lead over the second",
    "token": "of each step",
    "sequence": "of the whole sequence (geometric mean)",
    "sequence_token": "of the whole sequence, with the gradient of each step",
    "sequence_product": "of the whole sequence, exact (product over steps)",
    "none": "no ratio",
    "vespo": "REINFORCE with smooth, detached weights of whole sequences",
    "reinforce": "score function, no ratio",
    "drpo": "quadratic penalty on the ratio, weighted by the old probability",
    "spo": "quadratic penalty on the ratio",
    "guard": "PPO's clipped surrogate on the normalised ratio of Gaussian steps",
    "dppo": "ratio, masked where the exact divergence leaves the trust region",
    "clip": "PPO's clipped surrogate",
    "cispo": "REINFORCE with clipped, detached weights",
    "sapo": "soft gate in place of the clip",
    "token_mean": "mean over all steps of the update",
    "sequence_mean": "mean over sequences of their step means",
    "sequence_sum": "mean over sequences of their step sums",
    "constant": "sum over a constant length",
}
_POLICIES = {
    "diffusion": "any diffusers pipeline of the flow-matching or DDPM/DDIM family (a folder with model_index.json)",
    "causal_lm": "any transformers generator, text or vision-language (a folder with config.json)",
    "masked_diffusion": "a diffusers pipeline that fills in tokens (aMUSEd: a folder with model_index.json)",
    "masked_text": "a text denoiser: LLaDA2, DiffusionGemma, masked language models (a folder with config.json)",
    "image_tokens": "a transformers model that draws with tokens (Janus, Janus-Pro, Emu3; Chameleon with a decoder of"
    " yours; GLM-Image before its pipeline), and may think first",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The counts of a run."""

    samples_per_rollout: int
    updates_per_rollout: int
    samples_per_update: int
    num_rollouts: int
    total_samples: int
    steps_trained: int | None
    """Most steps of one trajectory that an update trains; None: not known before the model is loaded."""
    windows_per_update: int
    """Forward and backward passes of one update, over all processes."""
    num_evaluations: int
    """The base model's included; 0 without held-out prompts."""


def plan(recipe: Recipe) -> Plan:
    """Count what a run does."""
    per_update = recipe.samples_per_rollout // recipe.minibatches
    windows = math.ceil(per_update / recipe.engine.micro_batch)
    num_rollouts = math.ceil(recipe.num_steps / recipe.updates_per_rollout)
    steps = trained_steps(recipe)
    if recipe.policy.writer is not None and steps is not None:
        windows *= chain_windows(recipe)
    elif recipe.policy.family in STEPWISE and steps is not None:
        windows *= step_windows(recipe, steps)
    else:
        windows *= len(trained_segments(recipe))
    return Plan(
        samples_per_rollout=recipe.samples_per_rollout,
        updates_per_rollout=recipe.updates_per_rollout,
        samples_per_update=per_update,
        num_rollouts=num_rollouts,
        total_samples=num_rollouts * recipe.samples_per_rollout,
        steps_trained=steps,
        windows_per_update=windows,
        num_evaluations=1 + math.ceil(recipe.num_steps / recipe.evaluation.every) if recipe.data.evaluation else 0,
    )


def explain(recipe: Recipe) -> str:
    """A readable summary of a resolved recipe, as aligned plain text."""
    counts = plan(recipe)
    sections = [
        ("policy", _policy_lines(recipe)),
        ("memory", _memory_lines(recipe)),
        ("work", _work_lines(recipe, counts)),
        ("evaluation", _evaluation_lines(recipe, counts)),
        ("rewards", _reward_lines(recipe)),
    ]
    untrained = [name for name in recipe.policy.segments if not recipe.trains(name)]
    sections += [(f"objective of {name}", [("none", "this segment is sampled, not trained")]) for name in untrained]
    for name, objective in recipe.objective.items():
        title = "objective" if name == "all" else f"objective of {name}"
        sections.append((title, _objective_lines(objective, counts)))
    return "\n".join(_section(title, lines) for title, lines in sections)


def listing(kind: str) -> str:
    """What a recipe can name: "policies", "rewards", "objectives", "presets" or "recipes"."""
    lines: Sequence[tuple[str, str]]
    if kind == "policies":
        lines = [(name, f"{_POLICIES[name]}; sampling: {', '.join(SAMPLING[name].model_fields)}") for name in SAMPLING]
        lines += [(row.name, _pipeline_line(row)) for row in pipeline_table()]
    elif kind == "rewards":
        lines = list(list_rewards().items())
    elif kind == "objectives":
        lines = _key_lines(Objective)
    elif kind == "presets":
        lines = [(name, f"{paper}: {_compact(keys)}{_other_keys(name)}") for name, (paper, keys) in PRESETS.items()]
    else:
        lines = [(path.stem, _first_sentence(path.read_text(encoding="utf-8"))) for path in shipped_recipes()]
    return _aligned(lines, indent="")


def _other_keys(preset: str) -> str:
    """What a preset fills in beside the objective."""
    sampling = f"; policy.sampling: {_compact(SAMPLING_PRESETS[preset][1])}" if preset in SAMPLING_PRESETS else ""
    return sampling + (f"; {_compact(RECIPE_PRESETS[preset])}" if preset in RECIPE_PRESETS else "")


def _pipeline_line(row: PipelineRow) -> str:
    what = f"diffusion, {row.task}: {row.kernel + ', ' if row.kernel else ''}{row.replay}"
    return f"{what} ({row.note})" if row.note else what


def _policy_lines(recipe: Recipe) -> list[tuple[str, str]]:
    policy = recipe.policy
    adapter = policy.adapter
    if adapter.kind == "lora":
        targets = "the attention projections" if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        trained = f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, on {targets}"
    else:
        default = "" if policy.family in PIPELINES else " without the vision tower, if there is one"
        trained = "full fine-tuning" + (f" of {' | '.join(policy.train)}" if policy.train else default)
    return [
        ("model", policy.model + (f" @ {policy.revision}" if policy.revision else "")),
        ("family", f"{policy.family}, {policy.dtype}"),
        ("trained", trained),
        ("sampling", _compact(policy.sampling.model_dump(exclude_none=True))),
        *_speed_lines(policy),
        *noise_lines(recipe),
        *environment_lines(recipe),
        *writer_lines(recipe),
    ]


def _speed_lines(policy: PolicyBlock) -> list[tuple[str, str]]:
    """What saves memory or time, where it is not as by default."""
    savings: dict[str, Any] = policy.memory.model_dump(exclude_defaults=True)
    savings |= policy.model_dump(include={"attention", "compile"}, exclude_defaults=True)
    return [("savings", _compact(savings))] if savings else []


def _memory_lines(recipe: Recipe) -> list[tuple[str, str]]:
    footprint = estimate(recipe)
    if footprint is None:
        return [
            ("estimate", "none: there are no safetensors weights here to measure (--gpus 1 reads the configuration)")
        ]
    sizes = footprint.sizes
    lines = [(name, f"{_count(number)} parameters") for name, number in sizes.components.items()]
    shown = " + ".join(f"{name} {_size(number)}" for name, number in footprint.parts.items())
    unknown = "" if footprint.activations else "; activations are not counted"
    if any(objective.method == "reward_gradient" for objective in recipe.objective.values()):
        unknown += "; nor what the VAE and the reward keep for the gradient through them"
    return [
        *lines,
        ("trained", f"{_count(sizes.trained)} parameters"),
        ("estimate", f"{_size(footprint.total)} = {shown}{unknown}; ZeRO would share some of it out"),
        ("process", f"about {_size(footprint.total + LIBRARIES)} resident on a CPU, with Python and its libraries"),
        ("beside", f"encodings of prompts and pictures that are remembered, in time up to {_size(REMEMBERED_BYTES)}"),
    ]


def _work_lines(recipe: Recipe, counts: Plan) -> list[tuple[str, str]]:
    per_trajectory = "denoising steps" if recipe.policy.family in STEPWISE else "tokens"
    if recipe.policy.writer is not None:
        per_trajectory = "tokens and denoising steps"
    steps = "all" if counts.steps_trained is None else f"at most {counts.steps_trained}"
    return [
        ("rollout", f"{recipe.prompts_per_step} prompts x {recipe.group_size} = {counts.samples_per_rollout} samples"),
        (
            "updates",
            f"{recipe.epochs} epochs x {recipe.minibatches} minibatches = {counts.updates_per_rollout} a rollout",
        ),
        ("run", f"{recipe.num_steps} optimiser steps, {counts.num_rollouts} rollouts, {counts.total_samples} samples"),
        ("trained steps", f"{steps} {per_trajectory} of a trajectory in an update"),
        (
            "windows",
            f"{counts.windows_per_update} forward-backward passes an update"
            f" ({counts.samples_per_update} samples, {_at_once(recipe)})",
        ),
        ("optimiser", f"AdamW, {_compact(recipe.optimizer.model_dump())}"),
        ("engine", f"{recipe.engine.backend}, ZeRO stage {recipe.engine.zero_stage}"),
        ("checkpoints", f"every {recipe.checkpoint.every} steps, the newest {recipe.checkpoint.keep} are kept"),
        *([("trackers", ", ".join(block.name for block in recipe.trackers))] if recipe.trackers else []),
        *([("recorded", "all samples of all rollouts, for data.rollouts")] if recipe.record_rollouts else []),
        *_snapshot_lines(recipe),
    ]


def _snapshot_lines(recipe: Recipe) -> list[tuple[str, str]]:
    """What is kept of the trained weights beside themselves, and who acts with it."""
    copies = recipe.all_snapshots
    lines = [(f"copy {name}", _compact(rule.model_dump())) for name, rule in copies.items()]
    uses = f"rollouts by {recipe.rollout_weights}, evaluation of {recipe.evaluation.weights}"
    return [*lines, ("weights", uses)] if lines else []


def _at_once(recipe: Recipe) -> str:
    tokens = recipe.engine.micro_batch_tokens
    return f"{recipe.engine.micro_batch} at once" + ("" if tokens is None else f" if they fit into {tokens} tokens")


def _evaluation_lines(recipe: Recipe, counts: Plan) -> list[tuple[str, str]]:
    evaluation = recipe.evaluation
    if not counts.num_evaluations:
        return [("held out", "nothing: data.evaluation is not given")]
    total = counts.num_evaluations * evaluation.num_prompts
    lines = [
        ("held out", f"{evaluation.num_prompts} prompts of {recipe.data.evaluation}"),
        (
            "count",
            f"{counts.num_evaluations} (base, every {evaluation.every} steps, last step) = at most {total} samples,"
            f" {evaluation.num_saved} saved each time",
        ),
    ]
    if evaluation.sampling:
        lines.append(("sampling", _compact(evaluation.sampling)))
    return [*lines, ("guard", _compact(_changed(recipe.guard)))] if _changed(recipe.guard) else lines


def _reward_lines(recipe: Recipe) -> list[tuple[str, str]]:
    return [
        (
            reward.name,
            ("measured, not trained on" if reward.weight == 0 else f"weight {reward.weight:g}")
            + (f", {_names_only(reward.arguments)}" if reward.arguments else "")
            + (f", {_compact(changed)}" if (changed := _changed(reward)) else ""),
        )
        for reward in recipe.rewards
    ]


def _changed(block: RewardBlock | Guard) -> dict[str, Any]:
    """The other keys of a reward, or those of the guard, that are not at their default."""
    return block.model_dump(exclude_defaults=True, exclude={"name", "weight", "arguments"})


def _objective_lines(objective: Objective, counts: Plan) -> list[tuple[str, str]]:
    preset = objective.preset
    clip = ""
    if objective.loss in ("clip", "cispo", "guard"):
        clip = f", low {objective.clip_low:g}, high {objective.clip_high:g}"
    extras = {
        "dual_clip": objective.dual_clip,
        "delta": objective.delta,
        "penalty_range": objective.penalty_range if objective.loss in ("drpo", "spo") else None,
        "max_divergence": objective.max_divergence if objective.loss == "dppo" else None,
        "off_policy_mask": objective.off_policy_mask,
        "entropy_coef": objective.entropy_coef or None,
        "entropy_target": objective.entropy_target,
        "top_entropy": objective.top_entropy if objective.top_entropy < 1 else None,
    }
    clip += "".join(f", {name} {value:g}" for name, value in extras.items() if value is not None)
    if objective.threshold_unit == "nats":
        clip += ", thresholds in nats of the whole step"
    advantage = _meaning(objective.advantage)
    if objective.advantage_clip is not None:
        advantage += f", clipped to {objective.advantage_clip:g}"
    kl, correction = objective.kl, objective.correction
    steered = f", steered to {kl.target:g} nats a step" if kl.target is not None else ""
    if correction.mode == "none":
        corrected = "none: the sampling policy is the trained one"
    else:
        corrected = f"{correction.mode}, {correction.level}, cap {correction.cap:g}, floor {correction.floor:g}"
    lines = [
        ("preset", f"{preset}: {PRESETS[preset][0]}; keys of the recipe win" if preset else "none"),
        *method_lines(objective),
        ("advantage", advantage),
    ]
    shown_kl = "none (coef 0)"
    if kl.coef:
        shown_kl = f"{kl.estimator} from {kl.reference}, in the {kl.place}, coef {kl.coef:g}{steered}"
    if "steps" not in objective.kinds:
        return [*lines, ("kl", shown_kl)]
    lines += [
        ("ratio", _meaning(objective.ratio)),
        ("loss", _meaning(objective.loss) + clip),
        ("aggregation", _meaning(objective.aggregation)),
        ("kl", shown_kl),
        ("correction", corrected),
        *([("critic", _compact(objective.critic.model_dump()))] if objective.advantage == "gae" else []),
        ("old log-probs", "evaluated anew before the first update" if objective.needs_anchor else "the rollout's"),
    ]
    if counts.updates_per_rollout == 1:
        policy = "every update is on-policy (one a rollout): ratios are 1 and no clip acts"
    else:
        later = (
            "nothing corrects the others (no ratio)" if objective.loss == "reinforce" else "ratios act from the second"
        )
        policy = f"the first of {counts.updates_per_rollout} updates is on-policy; {later}"
    if objective.stop_kl is not None:
        policy += f"; the rest is skipped beyond update_kl {objective.stop_kl:g}"
    return [*lines, ("on-policy", policy)]


def _meaning(value: str) -> str:
    return f"{value} ({_MEANINGS.get(value, 'your own')})"


def _key_lines(block: type[Block]) -> list[tuple[str, str]]:
    lines = []
    for name, field in block.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Block):
            lines += [(f"{name}.{key}", text) for key, text in _key_lines(field.annotation)]
            continue
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        values = f"{' | '.join(choices)}; " if choices else ""
        about = f"  {inspect.cleandoc(field.description)}" if field.description else ""
        lines.append((name, f"{values}default {field.default}.{about}"))
    return lines


def _first_sentence(text: str) -> str:
    """Of the comment that a recipe begins with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    joined = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"(?<=\.) (?=[A-Z])", joined, maxsplit=1)[0]


def _names_only(arguments: dict[str, Any]) -> str:
    """Names of arguments without their values, which may be secrets (an API key)."""
    return f"arguments {', '.join(arguments)}"


def _compact(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()[1:-1]


def _count(number: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _section(title: str, lines: Sequence[tuple[str, str]]) -> str:
    return f"{title}\n{_aligned(lines, indent='  ')}"


def _aligned(lines: Sequence[tuple[str, str]], *, indent: str) -> str:
    width = max((len(name) for name, _ in lines), default=0)
    return "".join(f"{indent}{name:<{width}}  {text}\n" for name, text in lines)

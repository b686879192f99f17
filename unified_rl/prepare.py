"""What is known of a rollout before its first update: advantages, and where needed the policy's own view of it.

The extra evaluation (the *anchor*) is only made for objectives that ask for it: recomputed old log-probs, means of
Gaussian steps, entropies, or a divergence that goes into the reward.
"""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unified_rl.advantages import batch_advantages, gdpo_advantages, group_advantages, pass_k_advantages
from unified_rl.batching import spans
from unified_rl.data.prompts import stable
from unified_rl.engine import distributed
from unified_rl.memory import Memory
from unified_rl.objectives import kl as divergence
from unified_rl.objectives.sample_weights import SAMPLE_WEIGHTS, contrast
from unified_rl.protocols import Policy
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.objective_rules import GAUSSIAN_LOSSES
from unified_rl.recipe.schema import Recipe
from unified_rl.rewards.overlong import counted, length_metrics, punishment
from unified_rl.rollout import Rollout
from unified_rl.types import Prompt, Segment
from unified_rl.valuation import Valued, step_values, value_metrics, valued_advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """The policy at the start of a rollout's updates, without gradients, on the CPU."""

    log_probs: Tensor
    """[N, S]; the rollout's own at steps that were left out."""
    entropy: Tensor | None
    """[N, S] in nats, or None where the policy does not compute it."""
    means: Tensor | None
    """[N, S, ...] of Gaussian steps, for the losses that compare them; 0 at steps that were left out."""
    kl: Tensor | None
    """[N, S] from the reference, 0 where masked, if it goes into the reward."""
    values: Tensor | None
    """[N, S] of the critic, if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One segment of a rollout with all that its updates share."""

    name: str
    segment: Segment
    prompts: Sequence[Prompt]
    """Of the N rows."""
    objective: Objective
    advantages: Tensor
    """[N] of this process, or [N, S] where a critic tells its steps apart."""
    valid: Tensor
    """[N] bool: rows that carry loss: those with a reward, and not masked for their length."""
    anchor: Anchor | None
    valued: Valued | None
    """With a critic: what it is trained towards."""


def trained_rows(num_rows: int, minibatch: int, minibatches: int) -> range:
    """The rows of one minibatch: every `minibatches`-th, so that each holds members of every group."""
    return range(minibatch, num_rows, minibatches)


def used_steps(segment: Segment) -> list[int]:
    """The steps with a random decision in any row of any process: a policy that evaluates one step a forward must make
    as many forwards everywhere. Where segments differ in length (tokens, all in one forward), those of this process."""
    used = segment.loss_mask.any(0).float().tolist()
    longest, shortest = distributed.max_over_ranks([float(len(used)), -float(len(used))])
    anywhere = distributed.max_over_ranks(used) if longest == -shortest else used
    return [step for step, decided in enumerate(anywhere) if decided]


def chosen_steps(name: str, segment: Segment, recipe: Recipe, index: int, number: int) -> list[int]:
    """The steps of update `number` of rollout `index`: those with a random decision in any row, or `train_steps` of
    them, drawn anew for each update.

    The draw is a function of the recipe's seed and the numbers, the same on every process; only segments of as many
    columns everywhere may draw.
    """
    objective = recipe.objective_for(name)
    rng = random.Random(f"{recipe.seed}/{index}/{number}/{name}")
    stochastic = used_steps(segment)
    if objective.train_steps is None or objective.train_steps >= len(stochastic):
        return stochastic
    return sorted(rng.sample(stochastic, objective.train_steps))


def prepare(
    policy: Policy, recipe: Recipe, memory: Memory, rollout: Rollout, index: int
) -> tuple[list[Prepared], dict[str, float]]:
    """Advantages and anchors of all segments of rollout number `index`, and what they add to the metrics."""
    prepared: list[Prepared] = []
    row: dict[str, float] = {}
    num_steps = num_nats = 0.0
    started = time.perf_counter()
    for name, segment in rollout.trajectory.segments.items():
        if not recipe.trains(name):
            continue
        objective = recipe.objective_for(name)
        anchor = make_anchor(policy, name, segment, recipe, index) if objective.needs_anchor else None
        total = rollout.scores.total + punishment(segment, policy.max_steps[name], objective)
        if segment.context_tokens is not None:
            row |= length_metrics(segment, rollout.trajectory.completions)
        penalties = None
        if anchor is not None and anchor.kl is not None:
            penalties = memory.kl_coef(name, objective) * anchor.kl
            steps, nats = distributed.sum_over_ranks([float(segment.loss_mask.sum()), float(anchor.kl.sum())])
            num_steps, num_nats = num_steps + steps, num_nats + nats
            row["kl"] = num_nats / max(num_steps, 1.0)
        valued = None
        if objective.advantage == "gae":
            known = anchor.values if anchor is not None else None
            values = step_values(policy, name, segment, recipe.engine.micro_batch) if known is None else known
            advantages, valued = valued_advantages(objective, segment, values, total, penalties)
        else:
            total = total if penalties is None else total - penalties.sum(1)
            advantages = advantages_of(name, objective, total, rollout, recipe, memory)
        prepared.append(
            Prepared(
                name=name,
                segment=segment,
                prompts=rollout.prompts,
                objective=objective,
                advantages=advantages,
                valid=~total.isnan() & counted(rollout.trajectory.completions, objective),
                anchor=anchor,
                valued=valued,
            )
        )
        if anchor is not None:
            row["time/anchor"] = time.perf_counter() - started
    row |= value_metrics([part.valued for part in prepared if part.valued is not None])
    teaching = torch.stack([_any_step(part.advantages.ne(0.0)) & part.valid for part in prepared]).any(0)
    valid = ~rollout.scores.total.isnan()
    num_teaching, num_valid = distributed.sum_over_ranks([float(teaching.sum()), float(valid.sum())])
    return prepared, {**row, "frac_samples_with_gradient": num_teaching / max(num_valid, 1.0)}


def _any_step(flags: Tensor) -> Tensor:
    """[N] or [N, S] flags to [N]."""
    return flags if flags.ndim == 1 else flags.any(1)


def advantages_of(
    name: str, objective: Objective, total: Tensor, rollout: Rollout, recipe: Recipe, memory: Memory
) -> Tensor:
    """[N] advantages of this process's rows, from the rewards of all processes.

    Args:
        total: [N] the trained reward of this process's rows; NaN excludes.
    """
    rewards, group_ids = distributed.gather_rows(total), distributed.gather_rows(rollout.trajectory.group_ids)
    kind = objective.advantage
    spread: Any = {
        "clip": objective.advantage_clip,
        "std_eps": objective.std_eps,
        "population_std": objective.population_std,
    }
    assert kind != "gae", "advantages of a critic are made of its values"
    if kind == "batch_whitened":
        advantages = batch_advantages(rewards, **spread)
    elif kind == "prompt_std":
        keys = distributed.gather_objects([prompt_key(prompt) for prompt in rollout.prompts])
        advantages = memory.prompts(name).advantages(rewards, keys, clip=objective.advantage_clip)
    elif kind == "gdpo":
        breakdown = {name: distributed.gather_rows(values) for name, values in rollout.scores.shaped.items()}
        weights = {reward.shown_name: reward.weight for reward in recipe.rewards}
        advantages = gdpo_advantages(breakdown, weights, ~rewards.isnan(), group_ids, **spread)
    elif kind in SAMPLE_WEIGHTS:
        advantages = SAMPLE_WEIGHTS[kind](rewards, group_ids, objective.temperature)
        if objective.subtract_mean:
            advantages = contrast(advantages, rewards, group_ids)
    elif kind == "pass_k":
        advantages = pass_k_advantages(rewards, group_ids, **spread)
    else:
        advantages = group_advantages(rewards, group_ids, normalise=kind, **spread)  # type: ignore[arg-type]
    start = distributed.rank() * len(total)
    return advantages[start : start + len(total)]


def prompt_key(prompt: Prompt) -> str:
    """A name of what a prompt asks, the same in every rollout and process: its text, pictures and columns (a mask, the
    frames of a video), not its seed."""
    asked = [prompt.text, list(prompt.images), dict(prompt.columns)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=_content).encode()).hexdigest()[:16]


def _content(value: object) -> str:
    """What JSON does not know, as text that only depends on it."""
    if isinstance(value, Image.Image):
        return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()
    return stable(value)


@torch.no_grad()
def make_anchor(policy: Policy, name: str, segment: Segment, recipe: Recipe, index: int) -> Anchor:
    """Evaluate a segment once more, in the very windows that the updates will use: a low-precision forward depends on
    its batch's shape, and the first ratio must be 1. Steps that no update of the rollout trains are left out, unless a
    sum over the whole trajectory is asked for."""
    objective = recipe.objective_for(name)
    shape = segment.rollout_log_probs.shape
    log_probs = segment.rollout_log_probs.clone()
    entropy, means, kl, values = torch.full(shape, torch.nan), None, None, None
    with_kl = objective.kl.coef > 0 and objective.kl.place == "reward"
    if with_kl:
        kl = torch.zeros(shape)
    with_means = objective.loss in GAUSSIAN_LOSSES
    if with_kl or objective.correction.level != "token" or objective.advantage == "gae":
        steps = used_steps(segment)
    else:
        draws = [chosen_steps(name, segment, recipe, index, number) for number in range(recipe.updates_per_rollout)]
        steps = sorted({step for draw in draws for step in draw})
    for minibatch in range(recipe.minibatches):
        for rows, run in spans(
            segment,
            trained_rows(shape[0], minibatch, recipe.minibatches),
            steps,
            recipe.engine,
            steps_per_forward=policy.steps_per_forward[name],
        ):
            part = segment.rows(rows)
            stats = policy.log_prob(name, part, run)
            log_probs[rows, run] = stats.log_probs.to(log_probs)
            if stats.entropy is not None:
                entropy[rows, run] = stats.entropy.to(entropy)
            if stats.values is not None:
                values = torch.zeros(shape) if values is None else values
                values[rows, run] = stats.values.to(values)
            if with_means and stats.mean is not None:
                if means is None:
                    means = torch.zeros(*shape, *stats.mean.shape[2:], dtype=stats.mean.dtype)
                means[rows, run] = stats.mean.to(means)
            if kl is not None:
                with policy.reference():
                    reference = policy.log_prob(name, part, run)
                mask = part.loss_mask[:, run].to(stats.log_probs.device)
                kl[rows, run] = divergence.between(stats, reference, objective.kl.estimator, mask).to(kl)
    known = None if bool(entropy.isnan().all()) else entropy
    return Anchor(log_probs=log_probs, entropy=known, means=means, kl=kl, values=values)

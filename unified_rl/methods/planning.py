"""What the plans of all methods share: which rows are trained, their weights, and seeds of their noise."""

import hashlib
import random
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.assemble import Parts
from unified_rl.engine import distributed
from unified_rl.errors import RecipeError
from unified_rl.imports import load_import
from unified_rl.objectives import aggregate
from unified_rl.objectives.forward_process import ForwardTerms
from unified_rl.objectives.preference import ScoreTerms
from unified_rl.prepare import Prepared, trained_rows
from unified_rl.protocols import DenoisingPolicy, Policy
from unified_rl.recipe.method_rules import METHOD_KINDS
from unified_rl.recipe.schema import Recipe
from unified_rl.types import Prompt, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One method in one optimiser step."""

    method: str
    coef: float
    """Weight of its loss."""
    index: int
    """Of the rollout."""
    number: int
    """Of the update within the rollout."""


def kind_of(method: str) -> str:
    """What a method's loss is a function of: "steps", "denoising", "scores" or "reward"."""
    if method in METHOD_KINDS:
        return METHOD_KINDS[method]
    return {ForwardTerms: "denoising", ScoreTerms: "scores"}[_terms_of(method)]


def _terms_of(method: str) -> type:
    function = load_import(method, "objective.method")
    hints = list(typing.get_type_hints(function).values())
    if not hints or hints[0] not in (ForwardTerms, ScoreTerms):
        raise RecipeError(
            f"objective.method: {method} does not say what it is a function of; annotate its parameter as"
            " ForwardTerms or ScoreTerms"
        )
    return hints[0]


def loss_of(method: str, table: dict[str, Callable]) -> Callable:
    """The loss function of a method: ours, or the one that the recipe imports."""
    return table[method] if method in table else load_import(method, "objective.method")


def rows_of(recipe: Recipe, prepared: Prepared, planned: Planned) -> range:
    """The rows of this process that an update trains."""
    return trained_rows(len(prepared.advantages), planned.number % recipe.minibatches, recipe.minibatches)


def prompts_of(prepared: Prepared, rows: Rows) -> list[Prompt]:
    """The prompts of a window's rows."""
    if isinstance(rows, slice):
        return list(prepared.prompts[rows])
    return [prepared.prompts[row] for row in rows]


def levels_of(parts: Parts, policy: DenoisingPolicy, prepared: Prepared, planned: Planned) -> list[int]:
    """The noise levels of an update: all of the schedule, or `train_steps` drawn ones, the same on every process."""
    num = policy.num_levels(prepared.name, prepared.segment)
    wanted = prepared.objective.train_steps
    if wanted is None or wanted >= num:
        return list(range(num))
    rng = random.Random(f"{parts.recipe.seed}/{planned.index}/{planned.number}/{prepared.name}/levels")
    return sorted(rng.sample(range(num), wanted))


def noise_seeds(recipe: Recipe, planned: Planned, step: int, names: Sequence[int]) -> list[int]:
    """A seed for each row's noise at a step, from what names the row; never from its place in a window."""
    seeds = []
    for name in names:
        digest = hashlib.sha256(f"{recipe.seed}/{planned.index}/{planned.number}/{step}/{name}".encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)
    return seeds


def row_weights(mask: Tensor) -> Tensor:
    """[N] shares of the rows of a mask [N] in their mean over all processes, 0 where masked."""
    column = mask[:, None]
    num_steps, num_sequences = distributed.sum_over_ranks(aggregate.counts(column))
    shares = aggregate.weights(
        column, "token_mean", num_steps=num_steps, num_sequences=num_sequences, max_length=1, dtype=torch.float64
    )
    return shares[:, 0]


def trained_mask(recipe: Recipe, prepared: Prepared, planned: Planned) -> Tensor:
    """[N] bool: rows of this update whose reward counts."""
    rows = rows_of(recipe, prepared, planned)
    mask = torch.zeros(len(prepared.valid), dtype=torch.bool)
    mask[rows.start : rows.stop : rows.step] = True
    return mask & prepared.valid


def denoiser(policy: Policy, method: str) -> DenoisingPolicy:
    """The policy, as one that can be trained on its noised samples.

    Raises:
        RecipeError: if it is none.
    """
    if not isinstance(policy, DenoisingPolicy):
        raise RecipeError(f"objective.method: {method} needs a denoiser's prediction, which this policy has not")
    return policy

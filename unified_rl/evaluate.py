"""The fixed exam: the same held-out prompts with the same seeds, for the base model and along the run."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from unified_rl.data.prompts import evaluation_prompts
from unified_rl.data.sources import load_rows
from unified_rl.engine import distributed
from unified_rl.errors import RecipeError
from unified_rl.guard import MEANINGS, statistics, within_groups
from unified_rl.policies import build_policy, check_rows
from unified_rl.protocols import Console, Policy
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.schema import Recipe
from unified_rl.rewards.scoring import LoadedReward, load_rewards
from unified_rl.rollout import Rollout, roll_out
from unified_rl.run_folder.checkpoint import find_checkpoint
from unified_rl.run_folder.tracking import make_console
from unified_rl.types import Prompt


def load_exam(recipe: Recipe) -> list[Prompt]:
    """This process's share of the held-out prompts; empty if the recipe has none."""
    if recipe.data.evaluation is None:
        return []
    rows = load_rows(recipe.data.evaluation, "data.evaluation")
    check_rows(recipe, rows, "data.evaluation")
    return evaluation_prompts(
        rows,
        num=recipe.evaluation.num_prompts,
        seed=recipe.evaluation.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def evaluate(
    policy: Policy, rewards: Sequence[LoadedReward], exam: Sequence[Prompt], recipe: Recipe, console: Console
) -> tuple[dict[str, float], Rollout]:
    """Sample and judge the exam; returns the means over all processes, and this process's samples.

    The metrics are `reward`, `rewards/<name>/mean` and `rewards/<name>/std` (over samples, excluded ones left out),
    `stats/<name>` (see `guard`) and `num_samples`.
    """
    batch = recipe.engine.rollout_batch or recipe.engine.micro_batch
    rollout = roll_out(policy, rewards, exam, batch=batch, console=console, evaluation=True)
    columns = {"": rollout.scores.total, **rollout.scores.breakdown}
    valid = {name: values[~values.isnan()].double() for name, values in columns.items()}
    moments = [(len(part), float(part.sum()), float(part.square().sum())) for part in valid.values()]
    totals = distributed.sum_over_ranks([number for moment in moments for number in moment])
    metrics = {}
    for index, name in enumerate(columns):
        count, total, squares = totals[3 * index : 3 * index + 3]
        mean = total / count if count else float("nan")
        metrics[f"rewards/{name}/mean" if name else "reward"] = mean
        if name:
            metrics[f"rewards/{name}/std"] = max(squares / count - mean**2, 0.0) ** 0.5 if count else float("nan")
    metrics |= {f"stats/{name}": value for name, value in _statistics(rollout).items()}
    return {**metrics, "num_samples": distributed.sum_over_ranks([len(exam)])[0]}, rollout


def _statistics(rollout: Rollout) -> dict[str, float]:
    """What the samples look like, as means over the processes."""
    mine = statistics(rollout.trajectory.completions)
    num = float(len(rollout.prompts))
    known = [number for name in MEANINGS for number in (num * mine.get(name, 0.0), num if name in mine else 0.0)]
    sums = distributed.sum_over_ranks(known)
    pairs = zip(MEANINGS, sums[::2], sums[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count > 0.0}


def group_diversity(rollout: Rollout) -> dict[str, float]:
    """`group_diversity`, how much pictures of one prompt differ, as a mean over all groups; nothing without any."""
    mine, count = within_groups(rollout.trajectory.completions, rollout.trajectory.group_ids.tolist())
    total, groups = distributed.sum_over_ranks([mine, float(count)])
    return {"group_diversity": total / groups} if groups else {}


def evaluate_command(target: str, overrides: list[str]) -> int:
    """`unified-rl evaluate RUN|RECIPE`: measure the base model and, for a run, its newest checkpoint; prints a table.

    Raises:
        RecipeError: if the target is neither, or its recipe names no held-out prompts.
    """
    folder = Path(target)
    is_run = (folder / "recipe.yaml").is_file()
    recipe = load_recipe(str(folder / "recipe.yaml") if is_run else target, overrides)
    if recipe.data.evaluation is None:
        raise RecipeError("data.evaluation: no held-out prompts in this recipe; name some")
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    rewards = load_rewards(recipe.rewards, device=str(distributed.device()))
    exam = load_exam(recipe)
    console = make_console()
    policy = build_policy(recipe, distributed.device())
    columns = {"base": evaluate(policy, rewards, exam, recipe, console)[0]}
    checkpoint = find_checkpoint(folder, "auto", console.log) if is_run else None
    if checkpoint is not None:
        policy.restore(checkpoint / ("policy" if recipe.evaluation.weights == "trained" else recipe.evaluation.weights))
        columns[checkpoint.name] = evaluate(policy, rewards, exam, recipe, console)[0]
    sys.stdout.write(_table(columns))
    return 0


def _table(columns: dict[str, dict[str, float]]) -> str:
    rows = [["", *columns]]
    for key in next(iter(columns.values())):
        rows.append([key, *(f"{metrics[key]:.4g}" for metrics in columns.values())])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"

"""An update that does not fit into memory: the same one again in windows half as large, or an end that says what to do.

Gradients and metrics of a try that failed are dropped on all processes, and denominators are global, so a halved update
is the whole one up to rounding. Rollouts keep the batch that they had.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from unified_rl.assemble import Parts
from unified_rl.blame import skipped_update
from unified_rl.engine import distributed
from unified_rl.metrics import StepMetrics
from unified_rl.recipe.schema import Recipe
from unified_rl.update import accumulate, finish
from unified_rl.windows import Window


class TooLargeError(RuntimeError):
    """An update does not fit into memory."""


def as_fitted(parts: Parts) -> Parts:
    """The parts of a run that goes on, with windows as small as they were when it stopped: a sum of other windows is
    another one in its last bits."""
    recipe = parts.recipe
    for _ in range(parts.memory.halvings if recipe.engine.on_out_of_memory == "halve" else 0):
        recipe = _halved(recipe) or recipe
    return parts if recipe is parts.recipe else replace(parts, recipe=recipe)


def fitted_update(
    parts: Parts,
    windows: list[Window],
    replan: Callable[[Parts], list[Window]],
    *,
    first_update: bool,
    judge: Callable[[float, Sequence[float], Sequence[Window]], None] = lambda gap, gaps, windows: None,
) -> tuple[dict[str, float], Parts]:
    """One optimiser step on `windows`, or on smaller ones; called by every process.

    Args:
        replan: cuts the same update anew, as its recipe's `engine` says.
        judge: `update.Judge` that is also given the windows.

    Returns:
        The update's metrics, and the parts to go on with, whose recipe has the `micro_batch` that fitted.

    Raises:
        TooLargeError: if memory runs out, and the recipe does not ask for halving or one row alone is too much.
    """
    halve = parts.recipe.engine.on_out_of_memory == "halve"

    def look(gap: float, gaps: Sequence[float]) -> None:
        judge(gap, gaps, windows)

    while True:
        metrics, message = _tried(parts, windows, first_update=first_update)
        if message and not halve:
            raise TooLargeError(f"{message}; {_advice(parts.recipe)}, or say engine.on_out_of_memory: halve")
        # Nothing is exchanged within windows under the stages that may halve, so a process can leave them alone.
        failed = [text for text in distributed.gather_objects([message]) if text] if halve else []
        if not failed:
            found = finish(parts.policy, parts.engine, metrics, look)
            if not math.isfinite(found["grad_norm"]):
                parts.run.log_event("warning", skipped_update(parts, windows, metrics.bad))
            return found, parts
        parts.engine.discard()
        windows = []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = _halved(parts.recipe)
        if smaller is None:
            raise TooLargeError(f"{failed[0]}, with one row a window; {_advice(parts.recipe)}")
        parts = replace(parts, recipe=smaller)
        parts.memory.halvings += 1
        said = f"{failed[0]}; from now on engine.micro_batch is {smaller.engine.micro_batch}"
        parts.run.log_event("warning", said)
        parts.console.log(f"warning: {said}")
        windows = replan(parts)


def _tried(parts: Parts, windows: list[Window], *, first_update: bool) -> tuple[StepMetrics, str]:
    """The metrics of all windows, and what is to be said if memory ran out in one. Called for its scope, too: an
    error's frames hold the tensors of the window that failed."""
    metrics = StepMetrics()
    try:
        accumulate(parts.policy, parts.engine, windows, metrics, first_update=first_update)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # For the machine's own memory torch has no type of error.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        cause = str(error).partition("\n")[0][:200] or type(error).__name__
        return metrics, f"process {distributed.rank()} ran out of memory in an update ({cause})"
    return metrics, ""


def _halved(recipe: Recipe) -> Recipe | None:
    """The recipe with windows of half as many rows and rollouts as before; None if they have one row."""
    engine = recipe.engine
    rows = recipe.samples_per_rollout // recipe.minibatches // distributed.world_size()
    largest = min(engine.micro_batch, rows)
    if largest <= 1:
        return None
    tokens = engine.micro_batch_tokens
    changed = {
        "micro_batch": largest // 2,
        "micro_batch_tokens": None if tokens is None else max(1, tokens // 2),
        "rollout_batch": engine.rollout_batch or engine.micro_batch,
    }
    return recipe.model_copy(update={"engine": engine.model_copy(update=changed)})


def _advice(recipe: Recipe) -> str:
    block = recipe.engine
    size = f"engine.micro_batch ({block.micro_batch})"
    if block.micro_batch_tokens is not None:
        size = f"engine.micro_batch_tokens ({block.micro_batch_tokens}) or {size}"
    return (
        f"`unified-rl validate` shows the estimate; lower {size}, raise engine.zero_stage ({block.zero_stage}), train"
        " an adapter (policy.adapter), or set policy.memory.gradient_checkpointing"
    )

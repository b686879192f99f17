"""What the trainer adds to the model's own work.

One optimiser step (rollout, rewards, windows, optimiser) is timed against the bare calls of the trained module that it
needs, repeated with the very arguments that the step used: forwards without gradients for the rollout, forwards and
backwards for the update. Both alternate in one run, so that the ratio does not depend on what else the machine does.

    python benchmarks/step_overhead.py [RECIPE ...]
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from unified_rl.assemble import Parts, assemble
from unified_rl.engine import distributed
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.recipe.file import load_recipe
from unified_rl.run_folder.tracking import NullRun
from unified_rl.train import collect, plan_update
from unified_rl.update import update

REPEATS = 5
OVERRIDES = ["data.evaluation=null", "engine.threads=1", "epochs=1"]
Call = tuple[tuple, dict[str, Any], bool]


def step(parts: Parts, index: int) -> tuple[float, float, float]:
    """Seconds of one step: sampling, judging, updating."""
    _, prepared, row = collect(parts, index)
    started = time.perf_counter()
    for number in range(parts.recipe.updates_per_rollout):
        windows = plan_update(parts, prepared, index, number)
        update(parts.policy, parts.engine, windows, first_update=number == 0)
    return row["time/rollout"], row["time/reward"], time.perf_counter() - started


def recorded(module: torch.nn.Module, action: Callable[[], object]) -> list[Call]:
    """The module's calls during `action`, each with whether gradients were on."""
    calls: list[Call] = []
    original = type(module).forward

    @functools.wraps(original)  # generate() inspects the signature
    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            calls.append((args, dict(kwargs), torch.is_grad_enabled()))
        return original(self, *args, **kwargs)

    type(module).forward = note  # type: ignore[method-assign]
    try:
        action()
    finally:
        type(module).forward = original  # type: ignore[method-assign]
    return calls


def bare(module: torch.nn.Module, calls: list[Call]) -> tuple[float, float]:
    """Seconds of the same calls alone: without gradients, and with (backward included)."""
    seconds = {False: 0.0, True: 0.0}
    cache = None
    for args, kwargs, with_grad in calls:
        if kwargs.get("past_key_values") is not None:
            if cache is None or kwargs["input_ids"].shape[1] > 1:
                cache = DynamicCache(config=module.config.get_text_config())
            kwargs = {**kwargs, "past_key_values": cache}
        started = time.perf_counter()
        with torch.set_grad_enabled(with_grad):
            output = module(*args, **kwargs)
            if with_grad:
                (output[0] if isinstance(output, tuple) else output.logits).sum().backward()
        seconds[with_grad] += time.perf_counter() - started
    module.zero_grad()
    return seconds[False], seconds[True]


def measure(name: str) -> None:
    recipe = load_recipe(name, OVERRIDES)
    torch.set_num_threads(recipe.engine.threads or 1)
    parts = assemble(recipe, NullRun(Path()))
    step(parts, 0)
    # What plain generation calls: the policy's own shares prefills within a group, and may so be faster than "bare".
    if isinstance(parts.policy, CausalLMPolicy):
        parts.policy.shares_prefill = False
    calls = recorded(parts.policy.module, lambda: step(parts, 1))
    if isinstance(parts.policy, CausalLMPolicy):
        parts.policy.shares_prefill = True
    ours, theirs = [], []
    for repeat in range(REPEATS):
        ours.append(step(parts, 2 + repeat))
        theirs.append(bare(parts.policy.module, calls))
    sampling, judging, updating = (statistics.median(part) for part in zip(*ours, strict=True))
    forwards, backwards = (statistics.median(part) for part in zip(*theirs, strict=True))
    total = statistics.median(sum(a) / sum(b) for a, b in zip(ours, theirs, strict=True))
    print(
        f"{name}: rollout {sampling:.2f} s / bare {forwards:.2f} s = {sampling / forwards:.2f}, "
        f"update {updating:.2f} s / bare {backwards:.2f} s = {updating / backwards:.2f}, rewards {judging:.2f} s, "
        f"whole step / bare {total:.2f}"
    )


if __name__ == "__main__":
    distributed.initialise()
    for recipe_name in sys.argv[1:] or ["quickstart", "quickstart_ddpo", "quickstart_vlm"]:
        measure(recipe_name)

"""One process of `test_methods_equality`: the gradient of a toy's first update, summed over all processes.

If there are several, the last one runs out of memory in the middle of the update, and all make it again in smaller
windows.
"""

import functools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from test_methods import Denoiser
from toys import Bandit, build_parts

from unified_rl.engine import distributed
from unified_rl.engine.local import LocalEngine
from unified_rl.fitting import fitted_update
from unified_rl.train import collect, plan_update


def run_out_at_second(engine: LocalEngine, loss: torch.Tensor) -> None:
    """A backward pass after which the next one, for once, finds no memory when it is half done."""
    loss.backward()
    engine.backward = functools.partial(run_out, engine)


def run_out(engine: LocalEngine, loss: torch.Tensor) -> None:
    loss.backward()
    del engine.backward
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def keep_gradient(module: torch.nn.Module, kept: list[torch.Tensor]) -> float:
    kept.append(module.weight.grad)
    return 0.0


def main(folder: Path, cases: list[tuple[str, dict]]) -> None:
    distributed.initialise()
    rank, size = distributed.rank(), distributed.world_size()
    found = []
    for number, (kind, objective) in enumerate(cases):
        policy = {"text": Bandit, "picture": Denoiser}[kind]([0.3, 0.1])
        engine = {"micro_batch": 3, "on_out_of_memory": "halve"}
        keys = {"group_size": 4, "prompts_per_step": 3, "engine": engine}
        parts = build_parts(folder / f"{size}_{rank}_{number}", policy, objective=objective, **keys)
        with torch.no_grad():
            policy._start += 0.2  # a reference that is not the policy
        parts.engine.rank, parts.engine.world_size = rank, size  # what the sampler shares prompts out by
        _, prepared, _ = collect(parts, 0)
        plan = functools.partial(plan_update, prepared=prepared, index=0, number=0)
        windows = plan(parts)
        if rank == size - 1 and size > 1:
            parts.engine.backward = functools.partial(run_out_at_second, parts.engine)
        parts.engine.step = functools.partial(keep_gradient, policy.module, kept := [])
        _, after = fitted_update(parts, windows, plan, first_update=True)
        assert after.recipe.engine.micro_batch == (3 if size == 1 else 1)
        found.append(distributed.sum_over_ranks(kept[0].tolist()))
    if rank == 0:
        (folder / f"gradients_{size}.json").write_text(json.dumps(found))
    distributed.shutdown()

"""One process of `test_methods_equality`: the gradient of a toy's first update, summed over all processes."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from test_methods import Denoiser
from toys import Bandit, build_parts

from unified_rl.engine import distributed
from unified_rl.metrics import StepMetrics
from unified_rl.train import collect, plan_updates


def main(folder: Path, cases: list[tuple[str, dict]]) -> None:
    distributed.initialise()
    rank, size = distributed.rank(), distributed.world_size()
    found = []
    for number, (kind, objective) in enumerate(cases):
        policy = {"text": Bandit, "picture": Denoiser}[kind]([0.3, 0.1])
        keys = {"group_size": 4, "prompts_per_step": 3, "engine": {"micro_batch": 3}}
        parts = build_parts(folder / f"{size}_{rank}_{number}", policy, objective=objective, **keys)
        with torch.no_grad():
            policy._start += 0.2  # a reference that is not the policy
        parts.engine.rank, parts.engine.world_size = rank, size  # what the sampler shares prompts out by
        _, prepared, _ = collect(parts, 0)
        for window in next(plan_updates(parts, prepared, 0)):
            window.loss(policy, window, StepMetrics(), first_update=True).backward()
        gradient = policy.module.weight.grad
        found.append(distributed.sum_over_ranks(gradient.tolist()))
    if rank == 0:
        (folder / f"gradients_{size}.json").write_text(json.dumps(found))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""What one of four processes holds of weights and optimiser under each ZeRO stage, against the planner's prediction.

torchrun --standalone --nproc-per-node 4 benchmarks/zero_memory.py
"""

from types import SimpleNamespace

import torch
from torch import nn

from unified_rl.engine import build_engine, distributed
from unified_rl.planning.planner import Model, need
from unified_rl.recipe.schema import EngineBlock, Optimizer

WIDTH, LAYERS = 768, 8
SIZE = LAYERS * (WIDTH * WIDTH + WIDTH)
MODEL = Model(trained=SIZE, module=SIZE, beside=0, frozen_bytes=4, trained_bytes=4)
ALL_SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def storage(tensors: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


CUTS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all")]


def held(stage: int, offload: str) -> int:
    """Bytes of weights, float32 copies and moments of this process after one step, wherever they are."""
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    block = EngineBlock(
        backend="deepspeed", zero_stage=stage, offload=offload, deepspeed=ALL_SHARDED if stage == 3 else {}
    )
    engine = build_engine(module, SimpleNamespace(engine=block, optimizer=Optimizer()), num_steps=1)
    with engine.window():
        engine.backward(module(torch.ones(2, WIDTH)).pow(2).mean())
    engine.step()
    adam = engine._zero.optimizer if stage else engine._adam
    weights = [p.ds_tensor if stage == 3 else p.data for p in module.parameters()]
    moments = [value for state in adam.state.values() for value in state.values() if value.dim()]
    copies = [parameter.data for parameter in adam.state] if stage else []
    return storage([*weights, *moments, *copies])


def main() -> None:
    distributed.initialise(300)
    found = {cut: held(*cut) for cut in CUTS}
    if distributed.is_main():
        print(f"{SIZE / 1e6:.1f} M float32 parameters, {distributed.world_size()} processes; MiB of one of them")
        for (stage, offload), measured in found.items():
            predicted = need(MODEL, stage, distributed.world_size(), 1, offload)
            planned = predicted.weights + predicted.optimizer + predicted.host
            print(
                f"ZeRO-{stage}, offload {offload:<9}: {measured / 2**20:7.1f} measured, {planned / 2**20:7.1f} planned,"
                f" {measured / found[CUTS[0]]:.0%} of ZeRO-0"
            )
    distributed.shutdown()


if __name__ == "__main__":
    main()

"""Engines: who owns the optimiser, gradient accumulation and sharding of the trained module."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from unified_rl.protocols import Engine
    from unified_rl.recipe.schema import Recipe


def build_engine(module: "nn.Module", recipe: "Recipe", *, num_steps: int) -> "Engine":
    """The engine that `recipe.engine` asks for, around `module`, which is moved to this process's device.

    `distributed.initialise` comes first. The module itself stays callable and is what policies call.

    Args:
        num_steps: optimiser steps of the whole run, for the learning rate's decay.
    Raises:
        RecipeError: if the local engine is asked for with several processes or a ZeRO stage, or nothing is trained.
    """
    from unified_rl.engine import distributed
    from unified_rl.errors import RecipeError

    block, world_size = recipe.engine, distributed.world_size()
    if block.backend == "local":
        if world_size > 1:
            raise RecipeError(f"engine.backend: local is one process, but {world_size} run; use auto or deepspeed")
        if block.zero_stage:
            raise RecipeError(f"engine.zero_stage: {block.zero_stage} needs backend auto or deepspeed, not local")
    if block.backend == "deepspeed" or world_size > 1 or block.zero_stage:
        from unified_rl.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, recipe.optimizer, block=block, num_steps=num_steps)
    from unified_rl.engine.local import LocalEngine

    return LocalEngine(module, recipe.optimizer, num_steps=num_steps)

"""DeepSpeed's configuration, from the recipe's readable keys and, where they do not reach, its own JSON.

What the trainer relies on cannot be overridden: the same thing would have two names, of which one lies.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unified_rl.errors import RecipeError
from unified_rl.recipe.schema import EngineBlock

OWNED = {
    "train_batch_size": "prompts_per_step and group_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "engine.micro_batch (windows are summed until a step)",
    "managed_gradient_accumulation": "the trainer, which sums windows itself",
    "gradient_clipping": "optimizer.max_grad_norm",
    "gradient_allreduce_op": "the trainer, whose losses carry global denominators",
    "prescale_gradients": "the trainer, whose losses carry global denominators",
    "gradient_predivide_factor": "the trainer, whose losses carry global denominators",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup_steps and optimizer.decay",
    "bf16": "policy.dtype",
    "bf16.enabled": "policy.dtype",
    "bfloat16": "policy.dtype",
    "torch_autocast": "policy.dtype",
    "amp": "policy.dtype",
    "zero_optimization.zenflow": "engine.offload",
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.cpu_offload_param": "engine.offload",
    "fp16.enabled": "policy.dtype",
    "data_types": "the trainer, which accumulates gradients in float32",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload and engine.offload_folder",
    "zero_optimization.offload_optimizer.ratio": "engine.offload (all of the optimiser)",
    "zero_optimization.offload_param.device": "engine.offload and engine.offload_folder",
    "zenflow": "engine.offload",
}
"""Keys of DeepSpeed's that the recipe says in its own words."""


def raw_config(block: EngineBlock) -> dict[str, Any]:
    """The recipe's own DeepSpeed JSON, given in place or as a file.

    Raises:
        RecipeError: if it cannot be read, or says what the recipe says elsewhere.
    """
    raw: Any = block.deepspeed
    if isinstance(raw, str):
        try:
            raw = json.loads(Path(raw).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"engine.deepspeed: {block.deepspeed} is not readable as JSON: {error}") from error
        if not isinstance(raw, dict):
            raise RecipeError(f"engine.deepspeed: {block.deepspeed} holds no JSON object")
    for path, value in _paths(raw):
        if path in OWNED:
            raise RecipeError(f"engine.deepspeed.{path}: is set by {OWNED[path]}; leave it out")
        # A null in place of a block would take out all that the recipe says in it.
        if not isinstance(value, Mapping) and any(owned.startswith(f"{path}.") for owned in OWNED):
            raise RecipeError(f"engine.deepspeed.{path}: is not {value!r} but a block of keys")
    return raw


def _paths(raw: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every key with the names of the blocks around it, and its value."""
    found: list[tuple[str, Any]] = []
    for key, value in raw.items():
        found.append((f"{prefix}{key}", value))
        if isinstance(value, Mapping):
            found += _paths(value, f"{prefix}{key}.")
    return found


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, blocks merged key by key."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def build_config(block: EngineBlock, *, dtype: str, max_grad_norm: float, on_gpu: bool) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` gets.

    Args:
        dtype: "float32", "bfloat16" or "float16": of the trained weights.
    """
    stage = block.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        # Overlap reduces in the order of the hooks even at stage 1, and buys nothing on CPU.
        "overlap_comm": stage >= 2 and on_gpu,
    }
    if block.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if block.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        # Required by DeepSpeed, used for its own statistics only.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Sum over ranks. Stage 3 has no such switch: there `backward` undoes the average.
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "communication_data_type": "fp32",
        # At stage 0 DeepSpeed neither reports the norm nor skips a non-finite one, so the engine does both itself.
        "gradient_clipping": max_grad_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        # Never pulls in a compiled optimiser in place of ours.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": zero,
    }
    if dtype != "float32":
        config["fp16" if dtype == "float16" else "bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged(config, raw_config(block))

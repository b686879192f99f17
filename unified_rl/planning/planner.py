"""What a run needs on several GPUs, from the model's configuration alone: memory and traffic of each ZeRO stage.

Rajbhandari et al. 2020 (arXiv 1910.02054), section 3, with what this engine does: gradients are summed in float32,
and every stage from 1 on keeps a float32 copy of what it updates. Counted are states, and below them the activations
of a window where the configuration tells; caches and the buckets of collectives come on top.
"""

from collections.abc import Collection
from dataclasses import dataclass

from unified_rl.errors import RecipeError
from unified_rl.planning.footprint import window_activations
from unified_rl.planning.weights import BYTES, measure, sizes_of, trained_components
from unified_rl.recipe.schema import Recipe

GIB = 2**30
USABLE = 0.8
"""Share of a GPU's memory for states, where activations are unknown; the rest is for them and for buckets."""
USABLE_BY_ALL = 0.9
"""For both together, where they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the plan is made of, in parameters."""

    trained: int
    module: int
    """Of the module that ZeRO shards, frozen ones included."""
    beside: int
    """Of what every process holds beside it: encoders, a VAE, a frozen reference."""
    frozen_bytes: int
    """Bytes of one frozen parameter."""
    trained_bytes: int
    """Bytes of one trained parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Of one process and ZeRO stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    """Moments, and float32 copies where the stage keeps them."""
    traffic: float
    """Bytes that a process sends for one optimiser step, its windows included; rollouts come on top at stage 3."""
    host: float = 0.0
    """What `engine.offload` keeps in main memory, or in files, instead."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def need(model: Model, stage: int, num_gpus: int, num_windows: int, offload: str = "none") -> Need:
    """Bytes that one of `num_gpus` processes holds and sends.

    Args:
        num_windows: forward and backward passes of an optimiser step of one process.
        offload: as `engine.offload`; a stage that does not allow it keeps all on the GPU. Gradients are counted on the
            GPU even where DeepSpeed moves them.
    """
    trained, own = model.trained, model.trained_bytes
    sharded = trained * own + (model.module - trained) * model.frozen_bytes
    beside = model.beside * model.frozen_bytes
    copies = 4.0 if stage else 0.0
    ring = (num_gpus - 1) / num_gpus
    gradients, weights = 4.0 * trained, float(own * trained)
    traffic = {
        0: 2 * gradients,
        1: 2 * gradients + weights,
        2: 2 * gradients * num_windows + weights,
        3: (gradients + 2 * sharded) * num_windows,
    }[stage]
    own_weights = sharded / (num_gpus if stage == 3 else 1)
    optimizer = (8.0 + copies) * trained / (num_gpus if stage else 1)
    host = optimizer if (offload == "optimizer" and stage) or (offload == "all" and stage == 3) else 0.0
    optimizer -= host
    if offload == "all" and stage == 3:
        host, own_weights = host + own_weights, 0.0
    return Need(
        stage=stage,
        weights=beside + own_weights,
        gradients=gradients / (num_gpus if stage >= 2 else 1),
        optimizer=optimizer,
        traffic=traffic * ring,
        host=host,
    )


def model_of(recipe: Recipe) -> Model:
    """What a recipe trains, from the model's configuration files.

    Where its class is not known to the libraries: from the headers of its safetensors files, which count persistent
    buffers as parameters.

    Raises:
        RecipeError: if neither can be had.
    """
    from unified_rl.planning.configs import UnknownModelError, shapes_from_configs

    with_reference = any(objective.kl.coef > 0 for objective in recipe.objective.values())
    try:
        components = shapes_from_configs(recipe.policy)
        sizes = sizes_of(recipe.policy, components, with_reference=with_reference)
    except UnknownModelError:
        sizes = measure(recipe.policy, with_reference=with_reference)
        if sizes is None:
            raise
    if sizes is None:
        raise RecipeError(f"--gpus: no component of {recipe.policy.model} is known to be what is trained")
    frozen = BYTES[recipe.policy.dtype]
    module = sum(sizes.components[name] for name in trained_components(sizes.components))
    adapter = recipe.policy.adapter.kind != "none"
    reference = sizes.reference_bytes // frozen
    return Model(
        trained=sizes.trained,
        module=module + (sizes.trained if adapter else 0),
        beside=sum(sizes.components.values()) - module + reference,
        frozen_bytes=frozen,
        trained_bytes=4 if adapter else frozen,
    )


def stages_of(recipe: Recipe) -> tuple[int, ...]:
    """The ZeRO stages that a recipe's other keys allow."""
    least = {"none": 0, "optimizer": 1, "all": 3}[recipe.engine.offload]
    if recipe.policy.dtype != "float32" and recipe.policy.adapter.kind == "none":
        least = max(least, 2)
    return tuple(
        stage
        for stage in range(least, 4)
        if not any(key == "engine.zero_stage" for key, _ in recipe.policy.refusals(stage))
    )


def table(
    model: Model,
    *,
    num_gpus: int,
    gpu_memory: float,
    num_windows: int,
    offload: str = "none",
    offload_to: str = "main memory",
    stages: Collection[int] = (0, 1, 2, 3),
    activations: int | None = None,
) -> str:
    """The plan as text, with the smallest stage that fits.

    Args:
        gpu_memory: GiB of one GPU.
        offload_to: where offloaded states are, in words.
        stages: to advise among.
        activations: bytes of one window on one process; None: unknown.
    """
    lines = [f"plan for {num_gpus} GPUs of {gpu_memory:g} GiB, states of one process, {num_windows} windows a step"]
    lines.append("  ZeRO   weights  gradients  optimiser     total   sent a step   fits")
    share = USABLE if activations is None else USABLE_BY_ALL
    fitting = []
    for stage in (0, 1, 2, 3):
        found = need(model, stage, num_gpus, num_windows, offload)
        fits = "yes" if found.total + (activations or 0) <= share * gpu_memory * GIB else "no"
        if stage not in stages:
            fits = "ruled out by other keys"
        elif fits == "yes":
            fitting.append(stage)
        cells = (found.weights, found.gradients, found.optimizer, found.total, found.traffic)
        weights, gradients, optimizer, total, traffic = (f"{number / GIB:.2f}" for number in cells)
        lines.append(
            f"  {stage:<4} {weights:>9} {gradients:>10} {optimizer:>10} {total:>9} {traffic:>13}   "
            f"{fits}{f', and {found.host / GIB:.2f} in {offload_to}' if found.host else ''}"
        )
    counted = "states"
    if activations is not None:
        lines.append(f"  activations of a window {activations / GIB:.2f} on top, within a factor of two")
        counted = "both"
    advice = f"engine.zero_stage: {fitting[0]}" if fitting else "none fits: more GPUs, an adapter, or policy.dtype"
    lines.append(f"  all in GiB; {share:.0%} of a GPU is counted on for {counted}; take {advice}")
    return "\n".join(lines) + "\n"


def explain_plan(recipe: Recipe, num_gpus: int, gpu_memory: float) -> str:
    """`table` of a recipe."""
    from unified_rl.planning.configs import config_folder
    from unified_rl.recipe.explain import plan

    windows = max(1, -(-plan(recipe).windows_per_update // num_gpus))
    return table(
        model_of(recipe),
        num_gpus=num_gpus,
        gpu_memory=gpu_memory,
        num_windows=windows,
        offload=recipe.engine.offload,
        offload_to=recipe.engine.offload_folder or "main memory",
        stages=stages_of(recipe),
        activations=window_activations(recipe, config_folder(recipe.policy)),
    )

"""What a run needs on several GPUs, from the model's files alone: memory and traffic of each ZeRO stage.

Rajbhandari et al. 2020 (arXiv 1910.02054), section 3, with what this engine does: gradients are summed in float32,
and every stage from 1 on keeps a float32 copy of what it updates. Counted are states; activations, caches and the
buckets of collectives come on top. Must not import torch.
"""

from dataclasses import dataclass

from unified_rl.errors import RecipeError
from unified_rl.planning.weights import BYTES, measure, trained_components
from unified_rl.recipe.schema import Recipe

GIB = 2**30
USABLE = 0.8
"""Share of a GPU's memory for states; the rest is for activations and buckets."""


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

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def need(model: Model, stage: int, num_gpus: int, num_windows: int) -> Need:
    """Bytes that one of `num_gpus` processes holds and sends.

    Args:
        num_windows: forward and backward passes of an optimiser step of one process.
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
    return Need(
        stage=stage,
        weights=beside + sharded / (num_gpus if stage == 3 else 1),
        gradients=gradients / (num_gpus if stage >= 2 else 1),
        optimizer=(8.0 + copies) * trained / (num_gpus if stage else 1),
        traffic=traffic * ring,
    )


def model_of(recipe: Recipe) -> Model:
    """What a recipe trains, from the headers of its safetensors files.

    Raises:
        RecipeError: if they are not here.
    """
    with_reference = any(objective.kl.coef > 0 for objective in recipe.objective.values())
    sizes = measure(recipe.policy, with_reference=with_reference)
    if sizes is None:
        raise RecipeError("--gpus: the plan is made from safetensors headers, and policy.model has none here")
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


def table(model: Model, *, num_gpus: int, gpu_memory: float, num_windows: int) -> str:
    """The plan as text, with the smallest stage that fits.

    Args:
        gpu_memory: GiB of one GPU.
    """
    lines = [f"plan for {num_gpus} GPUs of {gpu_memory:g} GiB, states of one process, {num_windows} windows a step"]
    lines.append("  ZeRO   weights  gradients  optimiser     total   sent a step   fits")
    fitting = []
    for stage in (0, 1, 2, 3):
        found = need(model, stage, num_gpus, num_windows)
        fits = found.total <= USABLE * gpu_memory * GIB
        fitting += [stage] if fits else []
        cells = (found.weights, found.gradients, found.optimizer, found.total, found.traffic)
        weights, gradients, optimizer, total, traffic = (f"{number / GIB:.2f}" for number in cells)
        lines.append(
            f"  {stage:<4} {weights:>9} {gradients:>10} {optimizer:>10} {total:>9} {traffic:>13}   "
            f"{'yes' if fits else 'no'}"
        )
    advice = f"engine.zero_stage: {fitting[0]}" if fitting else "none fits: more GPUs, an adapter, or policy.dtype"
    lines.append(f"  all in GiB; {USABLE:.0%} of a GPU is counted on for states; take {advice}")
    return "\n".join(lines) + "\n"


def explain_plan(recipe: Recipe, num_gpus: int, gpu_memory: float) -> str:
    """`table` of a recipe."""
    from unified_rl.recipe.explain import plan

    windows = max(1, -(-plan(recipe).windows_per_update // num_gpus))
    return table(model_of(recipe), num_gpus=num_gpus, gpu_memory=gpu_memory, num_windows=windows)

"""What both engines share: AdamW, the learning rate of a step, and one clipped update."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unified_rl.errors import RecipeError
from unified_rl.recipe.schema import Optimizer


def trained_parameters(module: nn.Module, *, low_precision: bool = False) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad`, by name, each tied one once.

    Args:
        low_precision: the engine updates float32 copies of parameters that are smaller.

    Raises:
        RecipeError: if there are none, or one is not float32 and the engine keeps no copy; or if they differ.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained:
        raise RecipeError("policy: no parameter requires gradients, so there is nothing to train")
    first = next(iter(trained.values())).dtype
    for name, parameter in trained.items():
        dtype = str(parameter.dtype).removeprefix("torch.")
        if parameter.dtype != torch.float32 and not low_precision:
            # An update of lr 1e-5 is lost in bfloat16's 8 bits: it would train nothing without saying so.
            raise RecipeError(
                f"policy.dtype: the trained parameter {name} is {dtype}; use engine.zero_stage 2 or 3 (with one process"
                " too), which update float32 copies, or float32, or an adapter"
            )
        if parameter.dtype != first:
            raise RecipeError(f"policy.dtype: {name} is {dtype}, other trained parameters are not; use float32")
    return trained


CRITIC = ("critics.", "trunks.")
"""Beginnings of the names of a critic's parameters."""


def build_optimizer(trained: Mapping[str, nn.Parameter], optimizer: Optimizer) -> torch.optim.AdamW:
    """AdamW over the trained parameters, by name, with one weight decay; a critic's are a group of their own.

    A group's `lr_factor` times the run's learning rate is its own.
    """
    critic = [parameter for name, parameter in trained.items() if name.startswith(CRITIC)]
    policy = [parameter for name, parameter in trained.items() if not name.startswith(CRITIC)]
    factor = 1.0 if optimizer.critic_lr is None else optimizer.critic_lr / optimizer.lr
    groups: list[dict[str, Any]] = [{"params": policy, "lr_factor": 1.0}]
    if critic:
        groups.append({"params": critic, "lr_factor": factor})
    return torch.optim.AdamW(
        groups,
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )


def lr_at(step: int, num_steps: int, optimizer: Optimizer) -> float:
    """Learning rate of optimiser step `step`, counted from 0, of `num_steps`.

    Warm-up rises linearly and reaches `lr` with step `warmup_steps - 1`; the decay starts behind it and would reach
    zero at step `num_steps`, the first that is not run.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.decay == "none":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, num_steps - optimizer.warmup_steps)
    progress = min(1.0, progress)
    if optimizer.decay == "linear":
        return optimizer.lr * (1.0 - progress)
    return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate, `lr` being the run's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def clipped_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], lr: float, max_norm: float) -> float:
    """Clip the gradients to `max_norm`, update with `lr`, drop the gradients; returns the norm before clipping.

    A parameter without a gradient counts as one with a zero gradient, as under ZeRO, where it lies in the same flat
    vector as the others: its moments decay. A non-finite norm skips the update.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    if math.isfinite(norm):
        set_lr(optimizer, lr)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

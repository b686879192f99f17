"""Coefficient-preserving step of a rectified flow: fresh noise replaces a part of the predicted noise."""

import math

import torch
from torch import Tensor

from unified_rl.transitions.gaussian import at_least_float32


def transition(
    velocity: Tensor, latents: Tensor, *, sigma: float | Tensor, next_sigma: float | Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the coefficient-preserving step (Wang and Yu 2025, arXiv 2509.05952).

    x_next = (1 - next_sigma) * clean + next_sigma * (cos(angle) * noise + sin(angle) * z) with the model's clean and
    noise and angle = noise_level * pi / 2: the total noise stays what the schedule asks for. Public code drops the
    variance from its log-prob; here std is the step's own, so that ratios mean the same as with the other kernels. The
    last step (next_sigma 0) is deterministic.

    Args:
        velocity: [B, ...] the model's prediction of noise - clean.
        latents: [B, ...].
        sigma, next_sigma: noise level of this state and of the next one, falling; floats, 0-d tensors, or tensors that
            broadcast against the latents ([B, 1, ...]).
        noise_level: in [0, 1]; 0 is the plain Euler step of the ODE, with std 0.

    Returns:
        mean [B, ...] and the full std, 0-d or broadcastable, in float32 or better.
    """
    assert velocity.shape == latents.shape, f"velocity {tuple(velocity.shape)}, latents {tuple(latents.shape)}"
    assert 0.0 <= noise_level <= 1.0, f"noise_level {noise_level} is a share of a quarter turn, in [0, 1]"
    velocity, latents = at_least_float32(velocity), at_least_float32(latents)
    sigma, next_sigma = (
        torch.as_tensor(value, dtype=torch.float64, device=latents.device) for value in (sigma, next_sigma)
    )
    angle = noise_level * math.pi / 2.0
    kept_noise = next_sigma * math.cos(angle)
    # clean = x - sigma * v and noise = x + (1 - sigma) * v, collected by x and v.
    on_latents = 1.0 - next_sigma + kept_noise
    on_velocity = kept_noise * (1.0 - sigma) - (1.0 - next_sigma) * sigma
    mean = latents * on_latents.to(latents) + velocity * on_velocity.to(latents)
    return mean, (next_sigma * math.sin(angle)).to(latents)

"""Ancestral step of a variance-exploding diffusion, x_sigma = clean + sigma * noise."""

import torch
from torch import Tensor

from unified_rl.transitions.gaussian import at_least_float32


def transition(
    clean: Tensor, latents: Tensor, *, sigma: float | Tensor, next_sigma: float | Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of an ancestral Euler step (k-diffusion's sampler for EDM, arXiv 2206.00364).

    std = eta * next_sigma * sqrt(1 - next_sigma^2 / sigma^2), and the ODE's direction fills up what is left of
    next_sigma. In these coordinates it is the DDIM step with the same eta (`ddim.transition`). The last step
    (next_sigma 0) is deterministic.

    Args:
        clean: [B, ...] the model's prediction of the clean sample.
        latents: [B, ...].
        sigma, next_sigma: noise level of this state and of the next one, falling; floats, 0-d tensors, or tensors that
            broadcast against the latents ([B, 1, ...]).
        eta: in [0, 1]; 0 is the plain Euler step of the ODE (std 0), 1 the full ancestral noise.

    Returns:
        mean [B, ...] and the full std, 0-d or broadcastable, in float32 or better.
    """
    assert clean.shape == latents.shape, f"clean {tuple(clean.shape)}, latents {tuple(latents.shape)}"
    assert 0.0 <= eta <= 1.0, f"eta {eta} is a share of the ancestral noise, in [0, 1]"
    clean, latents = at_least_float32(clean), at_least_float32(latents)
    sigma, next_sigma = (
        torch.as_tensor(value, dtype=torch.float64, device=latents.device) for value in (sigma, next_sigma)
    )
    std = eta * next_sigma * (1.0 - (next_sigma / sigma).square()).clamp(min=0.0).sqrt()
    kept = (next_sigma.square() - std.square()).clamp(min=0.0).sqrt() / sigma
    return clean * (1.0 - kept).to(latents) + latents * kept.to(latents), std.to(latents)

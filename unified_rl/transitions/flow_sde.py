"""Stochastic step of a rectified flow, x_sigma = (1 - sigma) * clean + sigma * noise, with Flow-GRPO's noise."""

import torch
from torch import Tensor

from unified_rl.transitions.gaussian import at_least_float32

PURE_NOISE = 0.998
"""A schedule that begins above this begins with noise alone: rounding may leave its first sigma a little beside 1, and
the multistep solvers' flow schedules begin up to 0.001 below."""


def transition(
    velocity: Tensor,
    latents: Tensor,
    *,
    sigma: float | Tensor,
    next_sigma: float | Tensor,
    second_sigma: float | Tensor,
    noise_level: float,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of Flow-GRPO's step (Liu et al. 2025, arXiv 2505.05470, eq. 9).

    The diffusion is noise_level * sqrt(sigma / (1 - sigma)). It diverges at sigma = 1, where the second sigma of the
    schedule stands in (in the square root's denominator only), as the authors' code does; here also for a first sigma
    above `PURE_NOISE`.

    Args:
        velocity: [B, ...] the model's prediction of noise - clean.
        latents: [B, ...].
        sigma, next_sigma: noise level of this state and of the next one, in (0, 1] and [0, 1), falling; rounding may
            put the first one above 1.
        second_sigma: the schedule's second value, below 1.
        noise_level: Flow-GRPO's a; 0 is the plain Euler step of the ODE, with std 0.

    Sigmas are floats, 0-d tensors, or tensors that broadcast against the latents ([B, 1, ...]).

    Returns:
        mean [B, ...] and the full std (sqrt(dt) included), 0-d or broadcastable, in float32 or better.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=latents.device)
    second_sigma = torch.as_tensor(second_sigma, dtype=torch.float64, device=latents.device)
    # Of all sigmas only the first one is above the second.
    divergence = 1.0 - torch.where(sigma > PURE_NOISE, torch.minimum(sigma, second_sigma), sigma)
    return reverse_sde(
        velocity, latents, sigma=sigma, next_sigma=next_sigma, diffusion=noise_level * (sigma / divergence).sqrt()
    )


def reverse_sde(
    velocity: Tensor,
    latents: Tensor,
    *,
    sigma: float | Tensor,
    next_sigma: float | Tensor,
    diffusion: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Euler-Maruyama step of an SDE that has the flow's marginals, for any diffusion coefficient.

    mean = x + (v - diffusion^2 / 2 * score) * dt with the score of the flow, -(x + (1 - sigma) * v) / sigma, and
    dt = next_sigma - sigma < 0 (derived in arXiv 2505.05470, appendix A). Arguments and results as in `transition`.
    """
    assert velocity.shape == latents.shape, f"velocity {tuple(velocity.shape)}, latents {tuple(latents.shape)}"
    velocity, latents = at_least_float32(velocity), at_least_float32(latents)
    # Coefficients in float64: differences of neighbouring sigmas lose digits in float32.
    sigma, next_sigma, diffusion = (
        torch.as_tensor(value, dtype=torch.float64, device=latents.device) for value in (sigma, next_sigma, diffusion)
    )
    dt = next_sigma - sigma
    pull = diffusion.square() / (2.0 * sigma)
    mean = latents * (1.0 + pull * dt).to(latents) + velocity * ((1.0 + pull * (1.0 - sigma)) * dt).to(latents)
    return mean, (diffusion * (-dt).sqrt()).to(latents)

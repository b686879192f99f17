"""Stochastic step of a rectified flow with DanceGRPO's noise, which is the same at every sigma."""

from torch import Tensor

from unified_rl.transitions.flow_sde import reverse_sde


def transition(
    velocity: Tensor, latents: Tensor, *, sigma: float | Tensor, next_sigma: float | Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of DanceGRPO's step (Xue et al. 2025, arXiv 2505.07818, eq. 6).

    Args:
        velocity: [B, ...] the model's prediction of noise - clean.
        latents: [B, ...].
        sigma, next_sigma: noise level of this state and of the next one, falling; floats, 0-d tensors, or tensors that
            broadcast against the latents ([B, 1, ...]).
        noise_level: the constant diffusion coefficient; 0 is the plain Euler step of the ODE, with std 0.

    Returns:
        mean [B, ...] and the full std (noise_level * sqrt(dt)), 0-d or broadcastable, in float32 or better.
    """
    return reverse_sde(velocity, latents, sigma=sigma, next_sigma=next_sigma, diffusion=noise_level)

"""Forward-process objectives: they need the model's prediction at (x_t, t), and no log-prob of a sampled chain.

x_t = (1 - t) * clean + t * noise, and a velocity predicts noise - clean.
"""

import torch
from torch import Tensor

MIN_ERROR = 1e-5
"""Floor of the adaptive weight's denominator, in latent units."""


def nft_rewards(advantages: Tensor, clip: float) -> Tensor:
    """Advantages [B] mapped to optimality probabilities in [0, 1]: clamp(A / clip, -1, 1) / 2 + 1 / 2.

    DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117), algorithm 1, with the advantage clip (5 in the authors' code)
    as the scale.
    """
    return (advantages / clip).clamp(-1.0, 1.0) / 2.0 + 0.5


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    *,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    rewards: Tensor,
    mix_coef: float,
) -> Tensor:
    """DiffusionNFT's loss: r * |positive - clean|^2 + (1 - r) * |negative - clean|^2, over mix_coef.

    The positive policy is old + mix_coef * (velocity - old), the negative one its mirror image (Zheng et al. 2025,
    arXiv 2509.16117, eq. 5, in the clean-sample form with the adaptive weight of its authors' code, which divides each
    error by its own mean absolute error).

    Args:
        velocity: [B, ...] the trained policy's prediction at (x_t, t).
        old_velocity: [B, ...] the sampling policy's; a constant.
        clean, noise: [B, ...] the generated sample and fresh noise.
        timestep: [B] in (0, 1].
        rewards: [B] optimality probabilities in [0, 1], see `nft_rewards`.
        mix_coef: the paper's beta, above 0.

    Returns:
        [B]. The authors' loss is the mean of it times their advantage clip.
    """
    shape = velocity.shape
    assert old_velocity.shape == shape and clean.shape == shape and noise.shape == shape, "all must be [B, ...]"
    assert timestep.shape == rewards.shape == shape[:1], "timestep and rewards must be [B]"
    old_velocity = old_velocity.detach()
    change = mix_coef * (velocity - old_velocity)
    t = timestep.reshape(-1, *[1] * (velocity.ndim - 1))
    noisy = (1.0 - t) * clean + t * noise
    positive = _adaptive_error(noisy - t * (old_velocity + change), clean)
    negative = _adaptive_error(noisy - t * (old_velocity - change), clean)
    return (rewards * positive + (1.0 - rewards) * negative) / mix_coef


def velocity_distance(velocity: Tensor, ref_velocity: Tensor) -> Tensor:
    """Mean over dims of the squared distance to the reference's prediction: the KL surrogate of these objectives.

    [B, ...] and [B, ...] to [B]; the reference is a constant.
    """
    assert velocity.shape == ref_velocity.shape, f"{tuple(velocity.shape)} against {tuple(ref_velocity.shape)}"
    return (velocity - ref_velocity.detach()).square().flatten(1).mean(1)


def _adaptive_error(predicted_clean: Tensor, clean: Tensor) -> Tensor:
    """[B] squared error over its own mean absolute error (a constant, in float64: it becomes small)."""
    error = (predicted_clean - clean).flatten(1)
    with torch.no_grad():
        scale = error.double().abs().mean(1).clamp(min=MIN_ERROR)
    return (error.square() / scale.unsqueeze(1).to(error.dtype)).mean(1)

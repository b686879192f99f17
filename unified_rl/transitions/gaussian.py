"""Densities of Gaussian steps: x_next = mean + std * z with z ~ N(0, 1), the same std in every latent dimension.

The field's "log-prob" of such a step is its log-density averaged over the latent dimensions; the sum and the number of
dimensions come with it, because a threshold on the mean changes its meaning with the resolution.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianLogProb:
    """Log-density of one Gaussian step of B rows, in nats."""

    mean_over_dims: Tensor
    """[B] averaged over the latent dimensions: what DDPO, Flow-GRPO and DanceGRPO call the log-prob."""
    sum: Tensor
    """[B] the log-density itself."""
    num_dims: int
    """Latent dimensions of a row."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> GaussianLogProb:
    """Log-density of N(mean, std^2) at x, in float32 or better.

    Args:
        x: [B, ...] the state that was reached; gradients flow into it too, so pass a recorded one.
        mean: [B, ...].
        std: full standard deviation of the step, 0-d or broadcastable ([B, 1, ...]); must not be 0, a deterministic
            step has no density.
    """
    assert x.shape == mean.shape and x.ndim >= 2, f"x {tuple(x.shape)} and mean {tuple(mean.shape)} must be [B, ...]"
    x, mean, std = at_least_float32(x), at_least_float32(mean), at_least_float32(std)
    per_dim = -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2.0 * math.pi)
    assert per_dim.shape == x.shape, f"std {tuple(std.shape)} does not broadcast to {tuple(x.shape)}"
    mean_over_dims = per_dim.flatten(1).mean(1)
    num_dims = x[0].numel()
    return GaussianLogProb(mean_over_dims=mean_over_dims, sum=mean_over_dims * num_dims, num_dims=num_dims)


def kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """KL divergence of two steps with the same std, averaged over the latent dimensions, in nats.

    (mean - ref_mean)^2 / (2 std^2): the KL of Flow-GRPO (arXiv 2505.05470), with the step's full variance. The public
    flow_grpo code leaves sqrt(dt) out of std here, so that the same coefficient penalises less there, by a factor dt.

    Args:
        mean, ref_mean: [B, ...].
        std: full standard deviation of the step, 0-d or broadcastable; must not be 0.

    Returns:
        [B], float32 or better.
    """
    assert mean.shape == ref_mean.shape and mean.ndim >= 2, f"{tuple(mean.shape)} against {tuple(ref_mean.shape)}"
    mean, ref_mean, std = at_least_float32(mean), at_least_float32(ref_mean), at_least_float32(std)
    return (0.5 * ((mean - ref_mean) / std).square()).flatten(1).mean(1)

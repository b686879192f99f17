"""Step of a multistep consistency sampler: jump to the clean sample, then put noise back for the next level.

x = signal * clean + spread * noise at every level.
"""

import math

import torch
from torch import Tensor

from unified_rl.transitions.gaussian import at_least_float32


def transition(
    clean: Tensor, noise: Tensor, *, next_signal: float | Tensor, next_spread: float | Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one jump (multistep consistency sampling, arXiv 2303.01469, algorithm 1; as a
    policy: RLCM, arXiv 2404.03673).

    x_next = next_signal * clean + next_spread * (sqrt(1 - noise_level^2) * noise + noise_level * z): at noise_level 1
    the noise is all fresh, as those samplers have it; below, a part of the predicted noise is kept, and the total
    stays what the schedule asks for. The last step (next_spread 0) is deterministic.

    Args:
        clean, noise: [B, ...] the model's prediction of both.
        next_signal, next_spread: factors of the next state; floats, 0-d tensors, or broadcastable ([B, 1, ...]).
        noise_level: in [0, 1].

    Returns:
        mean [B, ...] and the full std, 0-d or broadcastable, in float32 or better.
    """
    assert clean.shape == noise.shape, f"clean {tuple(clean.shape)}, noise {tuple(noise.shape)}"
    assert 0.0 <= noise_level <= 1.0, f"noise_level {noise_level} is a share of the fresh noise, in [0, 1]"
    clean, noise = at_least_float32(clean), at_least_float32(noise)
    next_signal, next_spread = (
        torch.as_tensor(value, dtype=torch.float64, device=clean.device) for value in (next_signal, next_spread)
    )
    kept = next_spread * math.sqrt(1.0 - noise_level**2)
    return clean * next_signal.to(clean) + noise * kept.to(clean), (next_spread * noise_level).to(clean)

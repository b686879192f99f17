"""Stochastic DDIM step of a variance-preserving diffusion.

x_t = sqrt(alpha_prod) * clean + sqrt(1 - alpha_prod) * noise.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from unified_rl.transitions.gaussian import at_least_float32

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def transition(
    model_output: Tensor,
    latents: Tensor,
    *,
    alpha_prod: float | Tensor,
    next_alpha_prod: float | Tensor,
    eta: float,
    prediction_type: PredictionType,
    clip_range: float | None = None,
    limit: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a DDIM step (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

    Args:
        model_output: [B, ...] the prediction alone: outputs with a learned variance are split by the caller.
        latents: [B, ...].
        alpha_prod, next_alpha_prod: cumulative product of alphas at this state and at the next, in (0, 1], rising;
            floats, 0-d tensors, or tensors that broadcast against the latents ([B, 1, ...]).
        eta: 0 is deterministic DDIM (std 0), 1 has DDPM's posterior variance.
        prediction_type: what the model predicts, in diffusers' words.
        clip_range: clamp the predicted clean sample to +-clip_range (diffusers' clip_sample); None leaves it.

        limit: what else bounds the predicted clean sample (dynamic thresholding); comes in place of `clip_range`.

    Returns:
        mean [B, ...] and the full std, 0-d or broadcastable, in float32 or better.

    Raises:
        ValueError: for an unknown prediction type.
    """
    assert model_output.shape == latents.shape, f"output {tuple(model_output.shape)}, latents {tuple(latents.shape)}"
    model_output, latents = at_least_float32(model_output), at_least_float32(latents)
    alpha, next_alpha = (
        torch.as_tensor(value, dtype=torch.float64, device=latents.device) for value in (alpha_prod, next_alpha_prod)
    )
    # The last step may stay where it is (alphas equal), and rounding must not make its variance negative.
    variance = ((1.0 - next_alpha) / (1.0 - alpha) * (1.0 - alpha / next_alpha)).clamp(min=0.0)
    std = eta * variance.sqrt()
    noise_share = (1.0 - next_alpha - std.square()).clamp(min=0.0).sqrt()

    clean, noise = _clean_and_noise(model_output, latents, alpha, prediction_type)
    if limit is not None:
        clean = limit(clean)
    elif clip_range is not None:
        clean = clean.clamp(-clip_range, clip_range)
    return clean * next_alpha.sqrt().to(latents) + noise * noise_share.to(latents), std.to(latents)


def _clean_and_noise(
    model_output: Tensor, latents: Tensor, alpha: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    signal, spread = alpha.sqrt().to(latents), (1.0 - alpha).sqrt().to(latents)
    if prediction_type == "epsilon":
        return (latents - spread * model_output) / signal, model_output
    if prediction_type == "v_prediction":
        return signal * latents - spread * model_output, signal * model_output + spread * latents
    if prediction_type == "sample":
        return model_output, (latents - signal * model_output) / spread
    raise ValueError(f"prediction_type {prediction_type!r}; known: epsilon, v_prediction, sample")

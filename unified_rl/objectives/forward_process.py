"""Forward-process objectives: they noise a clean sample again and need the denoiser's prediction there, and no log-prob
of a sampled chain.

All losses are in terms of the prediction's error in the denoiser's own parametrisation (velocity, noise...). What a
perfect prediction would be is known, and the predicted clean sample is linear in the prediction, so that one formula
serves every parametrisation:

    predicted clean - clean = clean_scale * (output - target)

For a rectified flow, x_t = (1 - t) * clean + t * noise, output is a velocity, target = noise - clean, clean_scale = -t.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_ERROR = 1e-5
"""Floor of the adaptive weight's denominator, in latent units."""
MAX_LOG_RATIO = 20.0
_HUBER = 1e-5
AWM_WEIGHT = "ghuber"
"""Its authors' default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardTerms:
    """What a loss over the forward process may use, for B rows at one noise level."""

    output: Tensor
    """[B, ...] the trained policy's prediction, with gradients."""
    target: Tensor
    """[B, ...] a perfect one."""
    old_output: Tensor
    """[B, ...] the prediction of the weights that `objective.old_weights` names, without gradients; those being the
    trained ones, `output` itself."""
    clean_scale: Tensor
    """[] see the module's docstring."""
    level: Tensor
    """[] in (0, 1]: the share of noise in x_t, the t of a flow."""
    advantages: Tensor
    """[B], clipped as the recipe says."""
    advantage_scale: float
    """`objective.advantage_clip`, or 5."""
    mix_coef: float
    error_weight: str
    clip_low: float
    clip_high: float


ForwardLoss = Callable[[ForwardTerms], Tensor]
"""Terms to losses [B]."""


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """[B, ...] and [B, ...] to [B]: mean over dims of the squared difference."""
    assert output.shape == target.shape, f"{tuple(output.shape)} against {tuple(target.shape)}"
    return (output - target).square().flatten(1).mean(1)


def denoising_score(output: Tensor, target: Tensor, level: Tensor, weight: str = "uniform") -> Tensor:
    """[B] minus half the squared error: the log-likelihood of the target under a unit Gaussian at the prediction, up to
    a constant and averaged over dims. It stands for a sample's log-prob in preference and imitation objectives.

    Args:
        level, weight: of `weighted_error`. Where little noise is left, velocities and noises are hard to predict and
            say nothing of the picture, so that without a weight their errors are most of the loss.
    """
    return -0.5 * weighted_error(squared_error(output, target), level, weight)


def nft_rewards(advantages: Tensor, clip: float) -> Tensor:
    """Advantages [B] mapped to optimality probabilities in [0, 1]: clamp(A / clip, -1, 1) / 2 + 1 / 2.

    DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117), algorithm 1, with the advantage clip (5 in the authors' code)
    as the scale.
    """
    return (advantages / clip).clamp(-1.0, 1.0) / 2.0 + 0.5


def nft_loss(terms: ForwardTerms) -> Tensor:
    """DiffusionNFT's loss: r * |positive - clean|^2 + (1 - r) * |negative - clean|^2, over mix_coef.

    The positive policy is old + mix_coef * (output - old), the negative one its mirror image (Zheng et al. 2025,
    arXiv 2509.16117, eq. 5, in the clean-sample form with the adaptive weight of its authors' code, which divides each
    error by its own mean absolute error), times the scale of the advantages, as the authors do.

    Returns:
        [B].
    """
    old = terms.old_output.detach()
    change = terms.mix_coef * (terms.output - old)
    rewards = nft_rewards(terms.advantages, terms.advantage_scale)
    positive = _adaptive_error(terms.clean_scale * (old + change - terms.target))
    negative = _adaptive_error(terms.clean_scale * (old - change - terms.target))
    return terms.advantage_scale * (rewards * positive + (1.0 - rewards) * negative) / terms.mix_coef


def awm_loss(terms: ForwardTerms) -> Tensor:
    """Advantage-weighted matching: PPO's clipped surrogate with minus the weighted error in the log-prob's place.

    Xue et al. 2025 (arXiv 2509.25050, eq. 8); the weights of its authors' code are those of `weighted_error`. With one
    update a rollout the ratio is 1 and the gradient A * grad(weighted error).

    Returns:
        [B].
    """
    error = weighted_error(squared_error(terms.output, terms.target), terms.level, terms.error_weight)
    with torch.no_grad():
        old_error = weighted_error(squared_error(terms.old_output, terms.target), terms.level, terms.error_weight)
    ratio = (old_error - error).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1.0 - terms.clip_low, 1.0 + terms.clip_high)
    return torch.max(-ratio * terms.advantages, -clipped * terms.advantages)


def weighted_error(error: Tensor, level: Tensor, weight: str) -> Tensor:
    """AWM's weights of a squared error [B] at noise level [] t. t2 makes of a velocity's error the clean sample's.

    uniform: error. t: t * error. t2: t^2 * error. huber: t * (sqrt(error + 1e-10) - 1e-5). ghuber, the authors'
    default: 4 t * ((error + 1e-10)^(1/4) - 1e-10^(1/4)).

    Raises:
        ValueError: for an unknown weight.
    """
    small = _HUBER**2
    if weight == "uniform":
        return error
    if weight == "t":
        return level * error
    if weight == "t2":
        return level.square() * error
    if weight == "huber":
        return level * ((error + small).sqrt() - _HUBER)
    if weight == "ghuber":
        return level / 0.25 * ((error + small).pow(0.25) - small**0.25)
    raise ValueError(f"error_weight {weight!r}; known: uniform, t, t2, huber, ghuber")


def _adaptive_error(clean_error: Tensor) -> Tensor:
    """[B] squared error over its own mean absolute error (a constant, in float64: it becomes small)."""
    error = clean_error.flatten(1)
    with torch.no_grad():
        scale = error.double().abs().mean(1).clamp(min=MIN_ERROR)
    return (error.square() / scale.unsqueeze(1).to(error.dtype)).mean(1)


FORWARD_LOSSES: dict[str, ForwardLoss] = {"nft": nft_loss, "awm": awm_loss}
"""By the name that `objective.method` has for them; another of this kind is one function and one line."""

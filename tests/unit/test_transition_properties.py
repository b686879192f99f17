"""Properties of the kernels on models with a closed form: a Gaussian target, of which the exact denoiser is known."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from unified_rl.transitions import ancestral, cps, dance_sde, ddim, flow_sde, gaussian, renoise

MEAN, STD = 0.6, 0.4
"""Of the target; every state of the forward process is Gaussian, and every kernel's mean is affine in the latents."""
Law = Callable[[Tensor], tuple[Tensor, Tensor]]


def clean_and_noise(latents: Tensor, signal: float, level: float) -> tuple[Tensor, Tensor]:
    """E[clean | x] and E[noise | x] for x = signal * clean + level * noise."""
    variance = (signal * STD) ** 2 + level**2
    residual = latents - signal * MEAN
    return MEAN + signal * STD**2 / variance * residual, level / variance * residual


def moments_after(laws: list[Law], mean: float, std: float) -> tuple[float, float]:
    """Mean and std of the last state: an affine Gaussian step maps moments exactly, without any draw."""
    for law in laws:
        (at_zero, at_one), noise = law(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
        slope = float(at_one - at_zero)
        mean, std = float(at_zero) + slope * mean, math.hypot(slope * std, float(noise))
    return mean, std


def flow_laws(kernel: str, noise_level: float, num_steps: int) -> list[Law]:
    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()

    def law(latents: Tensor, sigma: float, following: float) -> tuple[Tensor, Tensor]:
        clean, noise = clean_and_noise(latents, 1 - sigma, sigma)
        schedule = {"sigma": sigma, "next_sigma": following, "noise_level": noise_level}
        if kernel == "flow_sde":
            return flow_sde.transition(noise - clean, latents, second_sigma=sigmas[1], **schedule)
        return {"dance_sde": dance_sde, "cps": cps}[kernel].transition(noise - clean, latents, **schedule)

    return [lambda x, s=s, t=t: law(x, s, t) for s, t in itertools.pairwise(sigmas)]


def ddim_laws(eta: float, num_steps: int) -> list[Law]:
    alphas = torch.linspace(math.pi / 2 - 0.01, 0.0, num_steps + 1, dtype=torch.float64).cos().square().tolist()

    def law(latents: Tensor, alpha: float, following: float) -> tuple[Tensor, Tensor]:
        _, noise = clean_and_noise(latents, math.sqrt(alpha), math.sqrt(1 - alpha))
        return ddim.transition(
            noise, latents, alpha_prod=alpha, next_alpha_prod=following, eta=eta, prediction_type="epsilon"
        )

    return [lambda x, a=a, b=b: law(x, a, b) for a, b in itertools.pairwise(alphas)]


def ancestral_laws(eta: float, num_steps: int) -> list[Law]:
    sigmas = [*torch.logspace(1.5, -3, num_steps, dtype=torch.float64).tolist(), 0.0]

    def law(latents: Tensor, sigma: float, following: float) -> tuple[Tensor, Tensor]:
        clean, _ = clean_and_noise(latents, 1.0, sigma)
        return ancestral.transition(clean, latents, sigma=sigma, next_sigma=following, eta=eta)

    return [lambda x, s=s, t=t: law(x, s, t) for s, t in itertools.pairwise(sigmas)]


@pytest.mark.parametrize(
    ("laws", "start"),
    [
        *((lambda n, k=k: flow_laws(k, 0.5, n), (0.0, 1.0)) for k in ("flow_sde", "dance_sde")),
        (lambda n: flow_laws("cps", 0.1, n), (0.0, 1.0)),
        *((lambda n, eta=eta: ddim_laws(eta, n), (MEAN * math.cos(math.pi / 2 - 0.01), 1.0)) for eta in (0.3, 1.0)),
        *((lambda n, eta=eta: ancestral_laws(eta, n), (MEAN, 10**1.5)) for eta in (0.3, 1.0)),
    ],
    ids=["flow_sde", "dance_sde", "cps", "ddim-0.3", "ddim-1", "ancestral-0.3", "ancestral-1"],
)
def test_samples_have_the_target_s_distribution(laws: Callable[[int], list[Law]], start: tuple[float, float]):
    """With small steps the noisy sampler ends where the ODE does: in the target. The error falls with the step."""
    errors = []
    for num_steps in (50, 400):
        mean, std = moments_after(laws(num_steps), *start)
        errors.append(abs(mean - MEAN) + abs(std - STD))
    assert errors[1] < 0.02 and errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
def test_noise_level_0_is_the_ode(kernel: str):
    assert moments_after(flow_laws(kernel, 0.0, 20), 0.0, 1.0) == pytest.approx(
        moments_after(flow_laws("cps", 0.0, 20), 0.0, 1.0), abs=1e-9
    )


def test_ancestral_is_ddim_in_other_coordinates():
    """x_ve = x_vp / sqrt(alpha), sigma^2 = (1 - alpha) / alpha."""
    alpha, following, eta = 0.3, 0.7, 0.8
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    mean, std = ddim.transition(
        noise, latents, alpha_prod=alpha, next_alpha_prod=following, eta=eta, prediction_type="epsilon"
    )
    sigma, next_sigma = math.sqrt((1 - alpha) / alpha), math.sqrt((1 - following) / following)
    exploded = latents / math.sqrt(alpha)
    ve_mean, ve_std = ancestral.transition(
        exploded - sigma * noise, exploded, sigma=sigma, next_sigma=next_sigma, eta=eta
    )
    torch.testing.assert_close(ve_mean, mean / math.sqrt(following))
    torch.testing.assert_close(ve_std, std / math.sqrt(following))


def test_renoise_keeps_the_spread():
    """Whatever share of the noise is fresh, the next state has the schedule's total: 0.8^2 = (0.48^2 + 0.64^2)."""
    clean, noise = torch.full((1, 1), 2.0), torch.full((1, 1), 1.0)
    mean, std = renoise.transition(clean, noise, next_signal=0.6, next_spread=0.8, noise_level=0.6)
    torch.testing.assert_close(mean, torch.full((1, 1), 0.6 * 2.0 + 0.8 * 0.8))
    torch.testing.assert_close(std, torch.tensor(0.48))


KERNELS: dict[str, Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "flow_sde": lambda output, x, s, t: flow_sde.transition(
        output, x, sigma=s, next_sigma=t, second_sigma=0.9, noise_level=0.7
    ),
    "dance_sde": lambda output, x, s, t: dance_sde.transition(output, x, sigma=s, next_sigma=t, noise_level=0.4),
    "cps": lambda output, x, s, t: cps.transition(output, x, sigma=s, next_sigma=t, noise_level=0.5),
    "ddim": lambda output, x, s, t: ddim.transition(
        output, x, alpha_prod=1 - s, next_alpha_prod=1 - t, eta=0.9, prediction_type="epsilon"
    ),
    "ancestral": lambda output, x, s, t: ancestral.transition(output, x, sigma=s, next_sigma=t, eta=0.8),
    "renoise": lambda output, x, s, t: renoise.transition(
        output, x - output, next_signal=1 - t, next_spread=t, noise_level=0.6
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_score_function_gradient_is_that_of_the_expected_reward(name: str):
    """Two steps with output = a * x + b and a quartic reward: expectations by Gauss-Hermite nodes are exact, so that
    the policy gradient must equal finite differences of the expected reward."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    kernel, levels = KERNELS[name], (0.8, 0.5, 0.3)
    first, second = (grid.flatten() for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    share = torch.outer(weights, weights).flatten()

    def expected(theta: Tensor) -> tuple[Tensor, Tensor]:
        """The expected reward by reparameterised nodes, and the score-function surrogate on them."""
        x = torch.full((len(share), 1), 0.9, dtype=torch.float64)
        log_prob = torch.zeros(len(share), dtype=torch.float64)
        for level, following, z in zip(levels, levels[1:], (first, second), strict=False):
            start = x.detach()
            mean, std = kernel(theta[0] * start + theta[1], start, level, following)
            x = (mean + std * z[:, None]).detach()
            log_prob = log_prob + gaussian.log_prob(x, mean, std).sum
        reward = -((x[:, 0] - 0.2) ** 4)
        return (share * reward).sum(), (share * reward * log_prob).sum()

    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    _, surrogate = expected(theta)
    (gradient,) = torch.autograd.grad(surrogate, theta)
    for index in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[index] = 1e-5
        with torch.no_grad():
            slope = (expected(theta + shift)[0] - expected(theta - shift)[0]) / 2e-5
        assert float(gradient[index]) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)

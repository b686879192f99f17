"""Transition kernels: hand-computed numbers, public implementations' numbers, and laws that every kernel obeys."""

import itertools
import math

import pytest
import torch
from oracle_files import load, of_case
from torch import Tensor

from unified_rl.objectives.policy_gradient import policy_loss
from unified_rl.transitions import categorical, cps, dance_sde, ddim, flow_sde, gaussian

KERNELS, ARRAYS = load("transition_kernels")


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# --- public implementations


def test_every_oracle_case_is_covered() -> None:
    kernels = [case["kernel"] for case in KERNELS["cases"]]
    assert {name: kernels.count(name) for name in kernels} == {"flow_sde": 28, "dance_sde": 28, "ddim": 16}


def oracle_transition(case: dict, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if case["kernel"] == "ddim":
        settings = KERNELS["ddim_scheduler"]
        roots = torch.linspace(settings["beta_start"] ** 0.5, settings["beta_end"] ** 0.5, 1000)
        alphas = (1.0 - roots.square()).cumprod(0)
        following = max(case["timestep"] - 1000 // case["num_steps"], 0)
        return ddim.transition(
            fields["model_output"],
            fields["latents"],
            alpha_prod=alphas[case["timestep"]],
            next_alpha_prod=alphas[following],
            eta=case["eta"],
            prediction_type=case["prediction_type"],
        )
    sigma, next_sigma = fields["sigmas"][case["step"]], fields["sigmas"][case["step"] + 1]
    velocity, latents = fields["velocity"], fields["latents"]
    if case["kernel"] == "dance_sde":
        return dance_sde.transition(
            velocity, latents, sigma=sigma, next_sigma=next_sigma, noise_level=case["noise_level"]
        )
    return flow_sde.transition(
        velocity,
        latents,
        sigma=sigma,
        next_sigma=next_sigma,
        second_sigma=fields["sigmas"][1],
        noise_level=case["noise_level"],
    )


@pytest.mark.parametrize("case", KERNELS["cases"], ids=lambda case: f"{case['name']}-{case['kernel']}")
def test_kernel_matches_public_implementation(case: dict) -> None:
    fields = of_case(ARRAYS, case)
    mean, std = oracle_transition(case, fields)
    got = gaussian.log_prob(fields["next_latents"], mean, std).mean_over_dims
    # A log-prob is a difference of terms of size 1, so that its own error is relative to 1 where it is near 0.
    torch.testing.assert_close(got, fields["log_prob_mean_over_dims"], rtol=1e-5, atol=1e-6)
    assert mean.dtype == std.dtype == torch.float32
    if "mean" in fields:
        torch.testing.assert_close(mean, fields["mean"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(std.expand(3), fields["noise_std"], rtol=1e-5, atol=0.0)


# --- Gaussian densities


def test_gaussian_log_prob_by_hand() -> None:
    # Dim 1 is one std off, dim 2 three: -(1 + 9) / 2 / 2 = -2.5 on average, minus ln(0.5) and ln(2 pi) / 2.
    got = gaussian.log_prob(row(1.5, -0.5), row(1.0, 1.0), torch.tensor(0.5))
    expected = -2.5 + math.log(2.0) - 0.5 * math.log(2.0 * math.pi)
    assert got.num_dims == 2 and got.mean_over_dims.dtype == torch.float64
    torch.testing.assert_close(got.mean_over_dims, torch.tensor([expected], dtype=torch.float64))
    torch.testing.assert_close(got.sum, torch.tensor([2.0 * expected], dtype=torch.float64))


def test_gaussian_log_prob_with_a_std_per_row_is_that_of_torch() -> None:
    torch.manual_seed(0)
    x, mean = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    std = torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(gaussian.log_prob(x, mean, std).sum, expected)


def test_gradient_of_gaussian_log_prob() -> None:
    torch.manual_seed(0)
    x, std = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    mean = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    gaussian.log_prob(x, mean, std).mean_over_dims.sum().backward()
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / std**2 / 3)


def test_gaussian_log_prob_is_computed_in_float32_from_bfloat16() -> None:
    x = torch.ones(1, 3, dtype=torch.bfloat16)
    got = gaussian.log_prob(x, x * 1.5, torch.tensor(0.3, dtype=torch.bfloat16)).mean_over_dims
    assert got.dtype == torch.float32


def test_gaussian_kl_is_that_of_torch() -> None:
    torch.manual_seed(0)
    mean, ref_mean, std = torch.randn(2, 5), torch.randn(2, 5), torch.tensor([[0.3], [1.7]])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(ref_mean, std)).mean(1)
    torch.testing.assert_close(gaussian.kl(mean, ref_mean, std), expected)
    assert gaussian.kl(row(3.0, 1.0), row(1.0, 1.0), torch.tensor(0.5)).tolist() == [4.0]


# --- flow kernels by hand


def test_flow_sde_by_hand() -> None:
    # diffusion 0.7, pull 0.49 / (2 * 0.5), dt -0.25: 2 * (1 - 0.1225) - 0.25 * (1 + 0.245); std 0.7 * 0.5.
    mean, std = flow_sde.transition(row(1.0), row(2.0), sigma=0.5, next_sigma=0.25, second_sigma=0.9, noise_level=0.7)
    torch.testing.assert_close((mean, std), (row(1.44375), torch.tensor(0.35, dtype=torch.float64)))


def test_first_step_of_flow_sde_uses_the_second_sigma() -> None:
    # diffusion^2 = 0.49 / 0.2, pull 1.225, dt -0.2: 1 * (1 - 0.245) - 0.2 * 2; std = sqrt(2.45 * 0.2).
    mean, std = flow_sde.transition(row(2.0), row(1.0), sigma=1.0, next_sigma=0.8, second_sigma=0.8, noise_level=0.7)
    torch.testing.assert_close((mean, std), (row(0.355), torch.tensor(0.7, dtype=torch.float64)))


@pytest.mark.parametrize("first", [1.0 - 6e-8, 1.0 + 1.2e-7, 0.9997])
def test_a_first_sigma_beside_1_is_that_of_pure_noise(first: float) -> None:
    """Rounding: shifts of 2.11 and 8.39 in diffusers' flow scheduler. 0.9997: the flow schedule of DPM-Solver++."""
    _, std = flow_sde.transition(row(2.0), row(1.0), sigma=first, next_sigma=0.8, second_sigma=0.8, noise_level=0.7)
    assert float(std) == pytest.approx(0.7, rel=1e-3)


def test_only_the_first_step_of_flow_sde_uses_the_second_sigma() -> None:
    schedule = {"sigma": 0.9985, "next_sigma": 0.9, "noise_level": 0.7}  # as in a long schedule with a large shift
    _, std = flow_sde.transition(row(2.0), row(1.0), second_sigma=0.9985, **schedule)
    assert float(std) == pytest.approx(0.7 * math.sqrt(0.9985 / 0.0015 * 0.0985))


def test_dance_sde_by_hand() -> None:
    # clean 1.5, score -(2 - 0.5 * 1.5) / 0.25 = -5; mean 2 - 0.25 * 1 - 0.25 * 0.045 * 5.
    mean, std = dance_sde.transition(row(1.0), row(2.0), sigma=0.5, next_sigma=0.25, noise_level=0.3)
    torch.testing.assert_close((mean, std), (row(1.69375), torch.tensor(0.15, dtype=torch.float64)))


def test_cps_by_hand() -> None:
    # clean 2, noise -1, a third of a quarter turn: cos 0.866, sin 0.5.
    mean, std = cps.transition(row(-3.0), row(-0.4), sigma=0.8, next_sigma=0.5, noise_level=1.0 / 3.0)
    expected = 0.5 * 2.0 - 0.5 * math.sqrt(0.75)
    torch.testing.assert_close((mean, std), (row(expected), torch.tensor(0.25, dtype=torch.float64)))


def test_last_step_of_cps_returns_the_clean_sample() -> None:
    mean, std = cps.transition(row(-3.0), row(-0.4), sigma=0.8, next_sigma=0.0, noise_level=0.9)
    torch.testing.assert_close(mean, row(2.0))
    assert std == 0.0


# --- laws of the flow kernels

FLOW_KERNELS = {
    "flow_sde": lambda velocity, latents, **arguments: flow_sde.transition(
        velocity, latents, second_sigma=0.95, **arguments
    ),
    "dance_sde": dance_sde.transition,
    "cps": cps.transition,
}


@pytest.mark.parametrize("kernel", FLOW_KERNELS)
@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.01])
def test_without_noise_a_step_is_eulers(kernel: str, sigma: float) -> None:
    torch.manual_seed(0)
    velocity, latents = torch.randn(2, 2, 3, 4, 4)
    mean, std = FLOW_KERNELS[kernel](velocity, latents, sigma=sigma, next_sigma=sigma / 3, noise_level=0.0)
    torch.testing.assert_close(mean, latents + (sigma / 3 - sigma) * velocity)
    assert std == 0.0


@pytest.mark.parametrize("kernel", FLOW_KERNELS)
def test_sigma_may_be_a_float_a_tensor_or_one_a_row(kernel: str) -> None:
    torch.manual_seed(0)
    velocity, latents = torch.randn(2, 2, 3, 4, 4, dtype=torch.bfloat16)
    step = FLOW_KERNELS[kernel]
    mean, std = step(
        velocity,
        latents,
        sigma=torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1),
        next_sigma=torch.tensor([0.9, 0.25]).reshape(2, 1, 1, 1),
        noise_level=0.7,
    )
    assert mean.dtype == std.dtype == torch.float32 and mean.shape == latents.shape
    for index, (sigma, next_sigma) in enumerate([(1.0, torch.tensor(0.9)), (torch.tensor(0.5), 0.25)]):
        pair = slice(index, index + 1)
        one_mean, one_std = step(velocity[pair], latents[pair], sigma=sigma, next_sigma=next_sigma, noise_level=0.7)
        torch.testing.assert_close((mean[pair], std[index].squeeze()), (one_mean, one_std))


def gaussian_velocity(x: Tensor, sigma: float, mean: float, std: float) -> Tensor:
    """E[noise - clean | x_sigma = x] for clean ~ N(mean, std^2)."""
    variance = ((1.0 - sigma) * std) ** 2 + sigma**2
    return -mean + (sigma - (1.0 - sigma) * std**2) / variance * (x - (1.0 - sigma) * mean)


@pytest.mark.parametrize(
    ("kernel", "noise_level"), [("flow_sde", 0.0), ("flow_sde", 0.7), ("flow_sde", 1.0), ("dance_sde", 0.6)]
)
def test_sde_keeps_the_marginals_of_the_ode(kernel: str, noise_level: float) -> None:
    """On a Gaussian target the velocity is known and every step affine, so moments propagate without sampling.

    Starts below sigma 1, where Flow-GRPO's diffusion diverges and its first step is a convention.
    """

    def marginal(sigma: float) -> tuple[float, float]:
        return (1.0 - sigma) * 1.5, ((1.0 - sigma) * 0.5) ** 2 + sigma**2

    sigmas = torch.linspace(0.95, 0.0, 2001, dtype=torch.float64).tolist()
    (mean, variance), points = marginal(sigmas[0]), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        velocity = gaussian_velocity(points, sigma, mean=1.5, std=0.5)
        image, std = FLOW_KERNELS[kernel](velocity, points, sigma=sigma, next_sigma=next_sigma, noise_level=noise_level)
        offset, slope = float(image[0]), float(image[1] - image[0])
        mean, variance = offset + slope * mean, slope**2 * variance + float(std) ** 2
        expected_mean, expected_variance = marginal(next_sigma)
        assert mean == pytest.approx(expected_mean, abs=2e-3)
        assert variance == pytest.approx(expected_variance, rel=5e-3)


def test_score_function_gradient_is_the_gradient_of_the_expected_reward() -> None:
    """A chain of three flow_sde steps with velocity = parameter * x, and reward x^2 of the last state."""
    sigmas, num_rows = [0.9, 0.6, 0.3, 0.1], 400_000

    def transition(parameter: float | Tensor, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        sigma, next_sigma = sigmas[step], sigmas[step + 1]
        return flow_sde.transition(
            parameter * x, x, sigma=sigma, next_sigma=next_sigma, second_sigma=0.6, noise_level=0.7
        )

    def expected_reward(parameter: float) -> float:
        second_moment = 1.0
        for step in range(3):
            gain, std = transition(parameter, row(1.0), step)
            second_moment = float(gain) ** 2 * second_moment + float(std) ** 2
        return second_moment

    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(num_rows, 1, generator=generator)]
    for step in range(3):
        mean, std = transition(0.4, states[-1], step)
        states.append(mean + std * torch.randn(num_rows, 1, generator=generator))
    rewards = states[-1].square().squeeze(1)

    parameter = torch.tensor(0.4, requires_grad=True)
    log_probs = torch.stack(
        [
            gaussian.log_prob(states[step + 1], *transition(parameter, states[step], step)).mean_over_dims
            for step in range(3)
        ],
        dim=1,
    )
    advantages = (rewards - rewards.mean()).unsqueeze(1).expand(num_rows, 3)
    loss = policy_loss(
        log_probs,
        log_probs.detach(),
        advantages,
        torch.ones(num_rows, 3, dtype=torch.bool),
        loss="clip",
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.per_step.sum(1).mean().backward()
    finite_difference = (expected_reward(0.4 + 1e-4) - expected_reward(0.4 - 1e-4)) / 2e-4
    assert parameter.grad is not None
    assert -float(parameter.grad) == pytest.approx(finite_difference, rel=0.02)


# --- DDIM


def test_ddim_with_full_noise_is_the_posterior_of_ddpm() -> None:
    """Ho et al. 2020, arXiv 2006.11239, eq. 7, at neighbouring steps."""
    clean, noise, alpha, next_alpha = row(2.0, -1.0), row(0.3, 0.7), 0.5, 0.6
    latents = math.sqrt(alpha) * clean + math.sqrt(1.0 - alpha) * noise
    beta = 1.0 - alpha / next_alpha
    expected = (
        math.sqrt(next_alpha) * beta / (1.0 - alpha) * clean
        + math.sqrt(alpha / next_alpha) * (1.0 - next_alpha) / (1.0 - alpha) * latents
    )
    mean, std = ddim.transition(
        noise, latents, alpha_prod=alpha, next_alpha_prod=next_alpha, eta=1.0, prediction_type="epsilon"
    )
    torch.testing.assert_close(mean, expected)
    assert float(std) == pytest.approx(math.sqrt((1.0 - next_alpha) / (1.0 - alpha) * beta))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_types_of_ddim_agree(prediction_type: ddim.PredictionType) -> None:
    clean, noise, alpha, next_alpha = row(2.0, -1.0), row(0.3, 0.7), 0.36, 0.64
    latents = 0.6 * clean + 0.8 * noise
    output = {"epsilon": noise, "v_prediction": 0.6 * noise - 0.8 * clean, "sample": clean}[prediction_type]
    mean, std = ddim.transition(
        output, latents, alpha_prod=alpha, next_alpha_prod=next_alpha, eta=0.0, prediction_type=prediction_type
    )
    torch.testing.assert_close(mean, 0.8 * clean + 0.6 * noise)
    assert std == 0.0
    clipped, _ = ddim.transition(
        output,
        latents,
        alpha_prod=alpha,
        next_alpha_prod=next_alpha,
        eta=0.0,
        prediction_type=prediction_type,
        clip_range=1.5,
    )
    torch.testing.assert_close(clipped, 0.8 * clean.clamp(-1.5, 1.5) + 0.6 * noise)


def test_ddim_step_that_stays_where_it_is_has_no_noise() -> None:
    alpha = torch.tensor(0.9991)
    latents = row(0.5, 2.0)
    mean, std = ddim.transition(
        row(1.0, 1.0), latents, alpha_prod=alpha, next_alpha_prod=alpha, eta=1.0, prediction_type="epsilon"
    )
    assert std == 0.0
    torch.testing.assert_close(mean, latents)


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="known: epsilon"):
        ddim.transition(
            row(1.0),
            row(1.0),
            alpha_prod=0.5,
            next_alpha_prod=0.6,
            eta=1.0,
            prediction_type="flow",  # type: ignore[arg-type]
        )


# --- categorical steps


def test_categorical_by_hand() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]]).log()
    got = categorical.log_probs(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(got, torch.tensor([[math.log(0.25), 0.0]]))
    torch.testing.assert_close(categorical.entropy(logits), torch.tensor([[1.5 * math.log(2.0), 0.0]]))


def test_categorical_ignores_an_offset_and_computes_in_float32() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 7).bfloat16(), torch.randint(7, (2, 3))
    got = categorical.log_probs(logits, tokens)
    expected = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(categorical.entropy(logits.double() + 1e4), categorical.entropy(logits.double()))


def test_suppressed_tokens_have_no_gradient_and_poison_none() -> None:
    logits = torch.tensor([[[1.0, -math.inf, 2.0, -200.0]]], dtype=torch.float64, requires_grad=True)
    (categorical.log_probs(logits, torch.tensor([[2]])) + categorical.entropy(logits)).sum().backward()
    without = torch.tensor([[[1.0, 2.0, -200.0]]], dtype=torch.float64, requires_grad=True)
    (categorical.log_probs(without, torch.tensor([[1]])) + categorical.entropy(without)).sum().backward()
    assert logits.grad is not None and without.grad is not None and logits.grad[0, 0, 1] == 0.0
    torch.testing.assert_close(logits.grad[..., [0, 2, 3]], without.grad)


def test_gradients_of_categorical_steps() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (2, 2))
    assert torch.autograd.gradcheck(lambda logits: categorical.log_probs(logits, tokens), logits)
    assert torch.autograd.gradcheck(categorical.entropy, logits)

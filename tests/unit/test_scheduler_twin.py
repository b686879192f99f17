"""The stochastic twin of a scheduler keeps its schedule and its process, also where a checkpoint leaves them to the
class's defaults."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from unified_rl.policies.scheduler_head import (
    SamplePass,
    SchedulerHead,
    UnsupportedPipelineError,
    stochastic_scheduler,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("cls", "spacing", "first"),
    [
        (EulerDiscreteScheduler, "linspace", 999),
        (UniPCMultistepScheduler, "linspace", 999),
        (PNDMScheduler, "leading", 800),
        (DDPMScheduler, "leading", 800),
    ],
)
def test_spacing_is_the_original_classs_default(cls, spacing, first):
    scheduler = cls.from_config(BETAS)  # as a scheduler_config.json without the key
    assert "timestep_spacing" in scheduler.config["_use_default_values"]
    twin = stochastic_scheduler(scheduler, "ddim", SchedulerHead())
    twin.set_timesteps(5)
    assert twin.config.timestep_spacing == spacing and int(twin.timesteps[0]) == first
    assert twin.alphas_cumprod.equal(scheduler.alphas_cumprod)


@pytest.mark.parametrize("keys", [{}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_a_solver_s_times_are_kept(cls, spacing: str, keys: dict):
    """PixArt's DPM-Solver never comes to time 0; Karras sigmas crowd at the end."""
    scheduler = cls.from_config({**BETAS, "timestep_spacing": spacing, **keys})
    twin = stochastic_scheduler(scheduler, "ddim", SchedulerHead())
    scheduler.set_timesteps(10)
    twin.set_timesteps(10)
    assert twin.timesteps.tolist() == scheduler.timesteps.round().int().tolist()
    assert twin.final_alpha_cumprod == 1.0, "and their last sigma is zero"


def test_times_that_round_to_one_are_refused_with_the_most_steps_that_are_apart():
    scheduler = DPMSolverMultistepScheduler.from_config({**BETAS, "use_karras_sigmas": True})
    twin = stochastic_scheduler(scheduler, "ddim", SchedulerHead())
    with pytest.raises(UnsupportedPipelineError, match=r"num_inference_steps: with 50, .* use at most 44"):
        twin.set_timesteps(50)
    twin.set_timesteps(44)
    assert len(set(twin.timesteps.tolist())) == 44


@pytest.mark.parametrize("cls", [HeunDiscreteScheduler, PNDMScheduler])
def test_a_solver_of_two_calls_a_step_is_spaced_as_its_config_says(cls):
    twin = stochastic_scheduler(cls.from_config({**BETAS, "timestep_spacing": "trailing"}), "ddim", SchedulerHead())
    twin.set_timesteps(4)
    assert twin.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_multistep_solver_s_flow_schedule_is_kept(cls, shift: float, drawn: tuple[Tensor, Tensor]):
    """Wan's and Sana's, whose last step is a quarter of the way. Without noise a twin takes Euler steps along it."""

    def scheduler() -> Any:
        return cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)

    own, head, (velocity, latents) = scheduler(), SchedulerHead(), drawn
    twin = stochastic_scheduler(scheduler(), "flow_sde", head)
    own.set_timesteps(10)
    twin.set_timesteps(10)
    assert twin.sigmas.equal(own.sigmas) and twin.timesteps.equal(own.timesteps) and twin.sigmas[-2] > 0.2
    for noise_level in (0.0, 0.7):
        twin.set_timesteps(10)
        head.begin(tape := SamplePass(seeds=[3, 4]), noise_level=noise_level, noisy=[0])
        state = latents
        for timestep in twin.timesteps:
            state = twin.step(velocity, timestep, state, return_dict=False)[0]
        if noise_level == 0.0:
            torch.testing.assert_close(state, latents - own.sigmas[0] * velocity, rtol=1e-5, atol=1e-5)
    # std = 0.7 sqrt(1 / (1 - sigma_1)) sqrt(1 - sigma_1)
    assert tape.log_probs[0].mean().item() == pytest.approx(-0.5 - np.log(0.7 * np.sqrt(2 * np.pi)), abs=0.3)


def test_a_flow_prediction_over_other_sigmas_is_refused():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction")
    with pytest.raises(UnsupportedPipelineError, match="no transition kernel for this scheduler"):
        stochastic_scheduler(scheduler, "auto", SchedulerHead())


def stepped(scheduler: Any, output: Tensor, latents: Tensor, noise_level: float, kernel: str = "auto") -> list[Tensor]:
    """The states of a twin's loop in which the denoiser always gives `output`."""
    head = SchedulerHead()
    twin = stochastic_scheduler(scheduler, kernel, head)
    twin.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    head.begin(tape := SamplePass(seeds=[3, 4]), noise_level=noise_level, noisy=None)
    for timestep in twin.timesteps:
        latents = twin.step(output, timestep, latents, return_dict=False)[0]
    return tape.states


def own_steps(scheduler: Any, output: Tensor, latents: Tensor) -> list[Tensor]:
    """The same of the scheduler itself."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    states = []
    for timestep in scheduler.timesteps:
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        states.append(latents)
    return states


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [({}, "flow_sde"), ({"invert_sigmas": True}, "flow_sde"), ({"use_karras_sigmas": True}, "ancestral")],
)
def test_without_noise_a_flow_twin_steps_as_its_scheduler(settings: dict, kernel: str, drawn: tuple[Tensor, Tensor]):
    def scheduler() -> FlowMatchEulerDiscreteScheduler:
        made = FlowMatchEulerDiscreteScheduler(**settings)
        if kernel == "ancestral":  # as Cosmos's pipelines do
            made.register_to_config(sigma_max=80.0, sigma_min=0.002)
        return made

    own = own_steps(scheduler(), *drawn)
    for state, expected in zip(stepped(scheduler(), *drawn, noise_level=0.0, kernel=kernel), own, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


def test_tokens_with_times_of_their_own_are_given_the_opposite_velocity(drawn: tuple[Tensor, Tensor]):
    """LTX's conditions and Sana-WM; at the step's own time such tokens go where all others do."""
    output, latents = drawn
    head, plain = SchedulerHead(), FlowMatchEulerDiscreteScheduler()
    own, twin = FlowMatchEulerDiscreteScheduler(), stochastic_scheduler(plain, "auto", head)
    head.begin(SamplePass(seeds=[3, 4]), noise_level=0.0, noisy=None)
    for scheduler in (own, twin):
        state = latents
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
        for timestep, expected in zip(scheduler.timesteps, own_steps(plain, output, latents), strict=True):
            times = timestep.expand(2, 3)
            state = scheduler.step(-output, timestep, state, per_token_timesteps=times, return_dict=False)[0]
            torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
def test_inverted_sigmas_are_the_same_process_told_from_the_other_end(kernel: str, drawn: tuple[Tensor, Tensor]):
    output, latents = drawn
    plain = stepped(FlowMatchEulerDiscreteScheduler(), output, latents, 0.7, kernel)
    mirrored = stepped(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), -output, latents, 0.7, kernel)
    for state, expected in zip(mirrored, plain, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


def test_a_flow_scheduler_over_exploding_sigmas_is_ancestral(drawn: tuple[Tensor, Tensor]):
    """Against k-diffusion's formula by hand: sigma 80 to 0.5 in one step, eta 0.5."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.5)
    head = SchedulerHead()
    twin = stochastic_scheduler(scheduler, "auto", head)
    twin.set_timesteps(sigmas=np.linspace(1.0, 0.5, 2))
    assert head.kernel == "ancestral" and twin.sigmas.tolist() == pytest.approx([80.0, 0.5, 0.0])
    head.begin(tape := SamplePass(seeds=[3, 4]), noise_level=0.5, noisy=None)
    noise, latents = drawn[0], 80.0 * drawn[1]
    twin.step(noise, twin.timesteps[0], latents)
    std = 0.5 * 0.5 * (1 - (0.5 / 80) ** 2) ** 0.5
    mean = latents - 80.0 * noise + (0.5**2 - std**2) ** 0.5 * noise
    z = (tape.states[0] - mean).double() / std
    expected = (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).flatten(1).mean(1)
    assert tape.log_probs[0].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert tape.levels[0] == (1.0, 80.0)

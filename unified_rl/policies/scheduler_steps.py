"""The stochastic steps of diffusers' schedulers, by family of processes: what each scheduler's own schedule, prediction
type and boundary conditions mean for the transition kernels.

A step is a function (scheduler, head, model_output, timestep, sample) that advances the scheduler and returns a
`Transition`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import CMStochasticIterativeScheduler, LCMScheduler, SCMScheduler
from torch import Tensor

from unified_rl.transitions import ancestral, cps, dance_sde, ddim, flow_sde, renoise


@dataclass(frozen=True, slots=True)
class Forward:
    """The forward process at the current step, x_t = signal * clean + level * noise, and what is predicted there."""

    output: Tensor
    """[rows, ...] the denoiser's prediction."""
    signal: Tensor
    level: Tensor
    """0-d."""
    predicts: str
    """velocity (noise - clean), epsilon, v_prediction or sample (diffusers' words)."""


@dataclass(frozen=True, slots=True)
class Transition:
    """The current step of a pipeline's loop."""

    law: Callable[[], tuple[Tensor, Tensor]]
    """Computes (mean, std); std is 0-d, the full standard deviation."""
    forward: Forward

    def __call__(self) -> tuple[Tensor, Tensor]:
        return self.law()


class Noise(Protocol):
    """What a step asks the policy head for."""

    kernel: str

    @property
    def noise_level(self) -> float: ...


Step = Callable[[Any, Noise, Tensor, Any, Tensor], Transition]


def _advance(scheduler: Any, timestep: Any) -> int:
    """The index of this step in the schedule; the scheduler goes on to the next."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    index = int(scheduler.step_index)
    scheduler._step_index += 1
    return index


def flow_step(scheduler: Any, head: Noise, model_output: Tensor, timestep: Any, sample: Tensor) -> Transition:
    """A rectified flow: the model predicts noise - clean."""
    index = _advance(scheduler, timestep)
    sigmas, velocity = scheduler.sigmas, model_output
    if scheduler.config.get("invert_sigmas", False):  # the clean sample's share, rising to 1 (Mochi), and clean - noise
        sigmas, velocity = 1 - sigmas, -velocity

    def law() -> tuple[Tensor, Tensor]:
        latents = sample.float()
        schedule = {"sigma": sigmas[index], "next_sigma": sigmas[index + 1], "noise_level": head.noise_level}
        if head.kernel == "flow_sde":
            return flow_sde.transition(velocity.float(), latents, **schedule, second_sigma=sigmas[1])
        kernel = {"dance_sde": dance_sde, "cps": cps}[head.kernel]
        return kernel.transition(velocity.float(), latents, **schedule)

    return Transition(law, Forward(velocity, 1 - sigmas[index], sigmas[index], "velocity"))


def ddim_step(scheduler: Any, head: Noise, model_output: Tensor, timestep: Any, sample: Tensor) -> Transition:
    """A variance-preserving diffusion over integer timesteps."""
    now = int(timestep)
    # The schedule's own next timestep: with linspace or trailing spacing it is not a constant stride away.
    later = [step for step in scheduler.timesteps.tolist() if step < now]
    following = max(later) if later else -1
    prediction = _without_variance(model_output, sample)

    def law() -> tuple[Tensor, Tensor]:
        clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        return ddim.transition(
            prediction.float(),
            sample.float(),
            alpha_prod=scheduler.alphas_cumprod[now],
            next_alpha_prod=scheduler.alphas_cumprod[following] if following >= 0 else scheduler.final_alpha_cumprod,
            eta=head.noise_level,
            prediction_type=scheduler.config.prediction_type,
            clip_range=clip,
            limit=scheduler._threshold_sample if scheduler.config.thresholding else None,
        )

    alpha = scheduler.alphas_cumprod[now]
    return Transition(law, Forward(prediction, alpha.sqrt(), (1 - alpha).sqrt(), scheduler.config.prediction_type))


def _without_variance(model_output: Tensor, sample: Tensor) -> Tensor:
    """The prediction alone, where the second half of the channels is a learned variance."""
    return model_output.chunk(2, dim=1)[0] if model_output.shape[1] == 2 * sample.shape[1] else model_output


def continuous_ddim_step(
    scheduler: Any, head: Noise, model_output: Tensor, timestep: Any, sample: Tensor
) -> Transition:
    """Wuerstchen's and Stable Cascade's cosine schedule over continuous time in [0, 1]; at eta 1 DDPM's posterior."""
    now = timestep.flatten()[:1]
    following = scheduler.previous_timestep(now)

    def law() -> tuple[Tensor, Tensor]:
        return ddim.transition(
            model_output.float(),
            sample.float(),
            alpha_prod=scheduler._alpha_cumprod(now, sample.device)[0],
            next_alpha_prod=scheduler._alpha_cumprod(following, sample.device)[0],
            eta=head.noise_level if float(following) > 0 else 0.0,
            prediction_type="epsilon",
        )

    alpha = scheduler._alpha_cumprod(now, sample.device)[0]
    return Transition(law, Forward(model_output, alpha.sqrt(), (1 - alpha).sqrt(), "epsilon"))


def ancestral_step(scheduler: Any, head: Noise, model_output: Tensor, timestep: Any, sample: Tensor) -> Transition:
    """A variance-exploding diffusion (EDM, Euler with continuous timesteps, flow schedulers over such sigmas)."""
    index = _advance(scheduler, timestep)
    sigma, next_sigma = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    clean = _clean(scheduler, model_output.float(), sample.float(), sigma)

    def law() -> tuple[Tensor, Tensor]:
        return ancestral.transition(clean, sample.float(), sigma=sigma, next_sigma=next_sigma, eta=head.noise_level)

    return Transition(law, Forward(clean, torch.ones(()), sigma, "sample"))


def _clean(scheduler: Any, model_output: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """The prediction of the clean sample at noise level `sigma`, in the words of the scheduler's config.

    Raises:
        ValueError: for an unknown prediction type.
    """
    if hasattr(scheduler, "precondition_outputs"):  # the EDM schedulers
        return scheduler.precondition_outputs(latents, model_output, sigma)
    # A flow scheduler is given the ODE's derivative by sigma, which is the noise here.
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return latents - sigma * model_output
    if kind == "v_prediction":
        return latents / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5
    if kind in ("sample", "original_sample"):
        return model_output
    raise ValueError(f"prediction_type {kind!r}; known: epsilon, v_prediction, sample")


def consistency_step(scheduler: Any, head: Noise, model_output: Tensor, timestep: Any, sample: Tensor) -> Transition:
    """A multistep consistency sampler: its denoiser jumps to the clean sample, noise brings it to the next level."""
    index = _advance(scheduler, timestep)
    jump = next(jump for kind, jump in JUMPS.items() if isinstance(scheduler, kind))
    latents = sample.float()
    clean, now, following = jump(scheduler, index, model_output.float(), latents)
    noise = (latents - now.signal.to(latents) * clean) / now.spread.to(latents)

    def law() -> tuple[Tensor, Tensor]:
        return renoise.transition(
            clean, noise, next_signal=following.signal, next_spread=following.spread, noise_level=head.noise_level
        )

    return Transition(law, Forward(clean, now.signal, now.spread, "sample"))


@dataclass(frozen=True, slots=True)
class Level:
    """Where a state lies on its way to noise: x = signal * clean + spread * noise, both 0-d."""

    signal: Tensor
    spread: Tensor


Jump = Callable[[Any, int, Tensor, Tensor], tuple[Tensor, Level, Level]]
"""(scheduler, index, model output, latents) to the clean sample, this level and the next."""


def _lcm_jump(scheduler: Any, index: int, model_output: Tensor, latents: Tensor) -> tuple[Tensor, Level, Level]:
    """Latent consistency models (arXiv 2310.04378): VP, with a boundary condition at t = 0."""
    now = scheduler.timesteps[index]
    alpha = scheduler.alphas_cumprod[now].to(latents)
    level = Level(alpha.sqrt(), (1 - alpha).sqrt())
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        clean = (latents - level.spread * model_output) / level.signal
    elif kind == "v_prediction":
        clean = level.signal * latents - level.spread * model_output
    else:
        clean = model_output
    if scheduler.config.thresholding:
        clean = scheduler._threshold_sample(clean)
    elif scheduler.config.clip_sample:
        clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(now)
    clean = float(out) * clean + float(skip) * latents
    if index == len(scheduler.timesteps) - 1:
        return clean, level, Level(torch.ones(()), torch.zeros(()))
    following = scheduler.alphas_cumprod[scheduler.timesteps[index + 1]]
    return clean, level, Level(following.sqrt(), (1 - following).sqrt())


def _trig_jump(scheduler: Any, index: int, model_output: Tensor, latents: Tensor) -> tuple[Tensor, Level, Level]:
    """TrigFlow (sCM, arXiv 2410.11081): x = cos(t) clean + sin(t) noise, the noise of std sigma_data."""
    now, following = scheduler.timesteps[index].to(latents), scheduler.timesteps[index + 1].double()
    clean = now.cos() * latents - now.sin() * model_output
    scale = scheduler.config.sigma_data
    return clean, Level(now.cos(), now.sin() * scale), Level(following.cos(), following.sin() * scale)


def _cm_jump(scheduler: Any, index: int, model_output: Tensor, latents: Tensor) -> tuple[Tensor, Level, Level]:
    """Consistency models (arXiv 2303.01469): VE, the noise down to sigma_min."""
    sigma = scheduler.sigmas[index].to(latents)
    skip, out = scheduler.get_scalings_for_boundary_condition(sigma)
    clean = out * model_output + skip * latents
    if scheduler.config.clip_denoised:
        clean = clean.clamp(-1, 1)
    floor = scheduler.config.sigma_min
    last = index + 1 >= len(scheduler.timesteps)
    following = torch.as_tensor(floor) if last else scheduler.sigmas[index + 1].clamp(min=floor)
    spread = (following.double() ** 2 - floor**2).clamp(min=0.0).sqrt()
    return clean, Level(torch.ones(()), sigma), Level(torch.ones(()), spread)


JUMPS: Mapping[type, Jump] = {
    LCMScheduler: _lcm_jump,
    SCMScheduler: _trig_jump,
    CMStochasticIterativeScheduler: _cm_jump,
}
STEPS: Mapping[str, Step] = {
    "flow": flow_step,
    "betas": ddim_step,
    "cosine": continuous_ddim_step,
    "exploding": ancestral_step,
    "consistency": consistency_step,
}
"""By family of processes; see `scheduler_head.KERNELS`."""

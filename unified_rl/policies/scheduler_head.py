"""The policy head of a diffusers pipeline: its scheduler, made stochastic, scored and replayable.

A pipeline keeps its own class and its own scheduler's schedule; only `step` is replaced. Each pass through the
pipeline's loop is driven by a `Pass`: `SamplePass` draws and records, `ReplayPass` fast-forwards over recorded states
and scores those that were asked for.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from unified_rl.transitions import ddim, flow_sde, gaussian

MIN_STD = 1e-6
"""A step with less noise than this counts as deterministic: there is nothing to score."""


class UnsupportedPipelineError(ValueError):
    """This pipeline cannot be replayed exactly, so it is refused rather than trained wrongly."""


class LoopLeft(BaseException):
    """Leaves a pipeline's loop once the last asked step is scored. No Exception: pipelines must not catch it."""


class Transition(Protocol):
    """Computes (mean, std) of the current step; std is 0-d, the full standard deviation."""

    def __call__(self) -> tuple[Tensor, Tensor]: ...


class Pass(Protocol):
    """One run through the pipeline's loop."""

    step: int
    """Number of scheduler steps done so far in this pass."""

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        """The next state [B, ...] in the dtype of `latents`."""
        ...


class SamplePass:
    """Draws every step from its row's own generator and records states and log-probs."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.step = 0
        self.states: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.stochastic: list[bool] = []
        # Other streams than the pipeline's own generators, which replay must find untouched by these draws.
        self._generators = [torch.Generator().manual_seed((seed * 2 + 1) % (1 << 63)) for seed in seeds]

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        mean, std = transition()
        stochastic = bool(std >= MIN_STD)
        if stochastic:
            noise = torch.stack([torch.randn(mean.shape[1:], generator=each) for each in self._generators])
            mean_and_noise = mean + std * noise.to(mean.device)
            following = mean_and_noise.to(latents.dtype)
            log_prob = gaussian.log_prob(following.float(), mean, std).mean_over_dims
        else:
            following = mean.to(latents.dtype)
            log_prob = mean.new_zeros(len(mean))
        self.states.append(following)
        self.log_probs.append(log_prob)
        self.stochastic.append(stochastic)
        self.step += 1
        return following


class ReplayPass:
    """Returns recorded states and scores those of the asked steps, with gradients."""

    def __init__(self, states: Tensor, asked: range) -> None:
        self.step = 0
        self.states = states
        """[B, S, ...] the recorded next states."""
        self.asked = asked
        self.log_probs: list[Tensor] = []
        self.means: list[Tensor] = []
        self.stds: list[Tensor] = []

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        following = self.states[:, self.step].to(latents.dtype)
        if self.step in self.asked:
            mean, std = transition()
            if std >= MIN_STD:
                self.log_probs.append(gaussian.log_prob(following.float(), mean, std).mean_over_dims)
            else:
                self.log_probs.append(mean.flatten(1).sum(1) * 0.0)
            self.means.append(mean)
            self.stds.append(std)
        self.step += 1
        if self.step >= self.asked.stop:
            raise LoopLeft
        return following


class SchedulerHead:
    """Stands between a pipeline's scheduler and the current pass. `current` is set for the length of a pass."""

    def __init__(self, noise_level: float) -> None:
        self.noise_level = noise_level
        self.current: Pass | None = None


class _StepOutput(BaseOutput):
    prev_sample: Tensor
    pred_original_sample: Tensor


def _output(following: Tensor, return_dict: bool) -> Any:
    if return_dict:
        return _StepOutput(prev_sample=following, pred_original_sample=following)
    return (following, following)


def _flow_step(scheduler: Any, head: SchedulerHead, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    index = scheduler.step_index

    def transition() -> tuple[Tensor, Tensor]:
        return flow_sde.transition(
            model_output.float(),
            sample.float(),
            sigma=scheduler.sigmas[index],
            next_sigma=scheduler.sigmas[index + 1],
            second_sigma=scheduler.sigmas[1],
            noise_level=head.noise_level,
        )

    assert head.current is not None, "the scheduler is stepped outside of a pass"
    scheduler._step_index += 1
    return head.current.next_latents(transition, sample)


def _ddim_step(scheduler: Any, head: SchedulerHead, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    now = int(timestep)
    following = now - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    if model_output.shape[1] == 2 * sample.shape[1]:  # learned variance: the second half is not the prediction
        model_output = model_output.chunk(2, dim=1)[0]

    def transition() -> tuple[Tensor, Tensor]:
        clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        return ddim.transition(
            model_output.float(),
            sample.float(),
            alpha_prod=scheduler.alphas_cumprod[now],
            next_alpha_prod=scheduler.alphas_cumprod[following] if following >= 0 else scheduler.final_alpha_cumprod,
            eta=head.noise_level,
            prediction_type=scheduler.config.prediction_type,
            clip_range=clip,
        )

    assert head.current is not None, "the scheduler is stepped outside of a pass"
    return head.current.next_latents(transition, sample)


def _subclass(base: type, step: Any, head: SchedulerHead) -> type:
    """A scheduler class that is `base` in all but `step`, whose signature (which pipelines inspect) it keeps."""

    @functools.wraps(base.step)  # type: ignore[attr-defined]
    def stochastic_step(self, model_output, timestep, sample, *args, return_dict: bool = True, **kwargs):
        return _output(step(self, head, model_output, timestep, sample), return_dict)

    return type(f"Stochastic{base.__name__}", (base,), {"step": stochastic_step})


def kernel_for(scheduler: Any) -> str:
    """The transition kernel that a pipeline's scheduler asks for.

    Raises:
        UnsupportedPipelineError: if no kernel fits the scheduler's family.
    """
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow_sde"
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow_sde"
    if "beta_schedule" in config and config.get("prediction_type") in ("epsilon", "v_prediction", "sample"):
        return "ddim"
    raise UnsupportedPipelineError(
        f"{type(scheduler).__name__}: no transition kernel for this scheduler; set pipeline.scheduler to a "
        "FlowMatchEulerDiscreteScheduler or a DDIM/DDPM-family one"
    )


def stochastic_scheduler(scheduler: Any, kernel: str, head: SchedulerHead) -> Any:
    """A stochastic twin of a pipeline's scheduler with the same schedule.

    Raises:
        UnsupportedPipelineError: if the scheduler's family has no kernel, or the asked kernel does not fit it.
    """
    natural = kernel_for(scheduler)
    if kernel not in ("auto", natural):
        raise UnsupportedPipelineError(
            f"policy.sampling.kernel: {kernel} does not fit {type(scheduler).__name__}; use {natural}"
        )
    config = dict(scheduler.config)
    if natural == "flow_sde":
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            if config["stochastic_sampling"]:
                raise UnsupportedPipelineError(
                    f"{type(scheduler).__name__}: stochastic_sampling has no flow_sde density"
                )
            return _subclass(type(scheduler), _flow_step, head).from_config(config)  # type: ignore[attr-defined]
        twin = _subclass(FlowMatchEulerDiscreteScheduler, _flow_step, head)
        return twin(shift=config.get("flow_shift") or 1.0, num_train_timesteps=config["num_train_timesteps"])
    if config.get("thresholding"):
        raise UnsupportedPipelineError(f"{type(scheduler).__name__}: dynamic thresholding is not supported")
    config.setdefault("clip_sample", False)  # PNDM, Euler and DPM configs lack it and never clip
    config.setdefault("set_alpha_to_one", False)
    return _subclass(DDIMScheduler, _ddim_step, head).from_config(config)  # type: ignore[attr-defined]

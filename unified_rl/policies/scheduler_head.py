"""The policy head of a diffusers pipeline: its scheduler, made stochastic, scored and replayable.

A pipeline keeps its own class and its own scheduler's schedule; only `step` is replaced. Each pass through the
pipeline's loop is driven by a `Pass`: `SamplePass` draws and records, `ReplayPass` fast-forwards over recorded states
and scores those that were asked for.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from unified_rl.transitions import cps, dance_sde, ddim, flow_sde, gaussian

KERNELS = {"flow": ("flow_sde", "dance_sde", "cps"), "betas": ("ddim",)}
"""Transition kernels by family of schedulers; the first is the family's own choice."""
MIN_STD = 1e-6
"""A step with less noise than this counts as deterministic: there is nothing to score."""


class UnsupportedPipelineError(ValueError):
    """This pipeline cannot be replayed exactly, so it is refused rather than trained wrongly."""


class LoopLeft(BaseException):
    """Leaves a pipeline's loop once the last asked step is scored. No Exception: pipelines must not catch it."""


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


class Pass(Protocol):
    """One run through the pipeline's loop."""

    step: int
    """Number of scheduler steps done so far in this pass."""

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        """The next state [B, ...] in the dtype of `latents`."""
        ...


class AskedPass(Pass, Protocol):
    """A pass that needs the real denoiser at some steps only."""

    asked: range


class SamplePass:
    """Draws every step from its row's own generator and records states and log-probs."""

    def __init__(self, seeds: Sequence[int], state_dtype: torch.dtype | None = None) -> None:
        """`state_dtype`: what states are rounded to before they are scored; None: the latents' own."""
        self.step = 0
        self._state_dtype = state_dtype
        self.states: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.stochastic: list[bool] = []
        self.levels: list[tuple[float, float]] = []
        """(signal, level) of the forward process at each step."""
        self._generators = sampling_generators(seeds)

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        mean, std = transition()
        mean, copies = without_copies(mean, len(self._generators))
        stochastic = bool(std >= MIN_STD)
        if stochastic:
            noise = torch.stack([torch.randn(mean.shape[1:], generator=each) for each in self._generators])
            following = (mean + std * noise.to(mean.device)).to(self._state_dtype or latents.dtype).to(latents.dtype)
            log_prob = gaussian.log_prob(following.float(), mean, std).mean_over_dims
        else:
            following = mean.to(self._state_dtype or latents.dtype).to(latents.dtype)
            log_prob = mean.new_zeros(len(mean))
        self.states.append(following)
        self.log_probs.append(log_prob)
        self.stochastic.append(stochastic)
        self.levels.append((float(transition.forward.signal), float(transition.forward.level)))
        self.step += 1
        return following.repeat(copies, *[1] * (following.ndim - 1))


def sampling_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """What draws the steps of each row: other streams than the pipeline's own generators, which replay must find
    untouched by these draws."""
    return [torch.Generator().manual_seed((seed * 2 + 1) % (1 << 63)) for seed in seeds]


class ReplayPass:
    """Returns recorded states and scores those of the asked steps, with gradients."""

    def __init__(
        self, states: Sequence[Tensor | Sequence[Tensor]], stored: Sequence[int], asked: range, num_steps: int
    ) -> None:
        """
        Args:
            states: [B][K] the recorded next states of the K `stored` steps; shapes may differ from step to step.
            asked: the steps to score; they and those that they start from must be stored.
            num_steps: of the loop.
        """
        self.step = 0
        self.states = states
        self._slots = {step: slot for slot, step in enumerate(stored)}
        self._num_steps = num_steps
        self.asked = asked
        self.log_probs: list[Tensor] = []
        self.means: list[Tensor] = []
        self.stds: list[Tensor] = []

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        if self.step >= self._num_steps:
            raise UnsupportedPipelineError("the replayed loop steps its scheduler more often than sampling did")
        if self.step not in self._slots:  # no asked step starts from here
            assert self.step not in self.asked, f"step {self.step} was not noisy, so its state was not stored"
            self.step += 1
            return latents
        following = torch.stack([row[self._slots[self.step]] for row in self.states]).to(latents)
        copies = len(latents) // len(following)
        if self.step in self.asked:
            mean, std = transition()
            mean, copies = without_copies(mean, len(self.states))
            if std >= MIN_STD:
                self.log_probs.append(gaussian.log_prob(following.float(), mean, std).mean_over_dims)
            else:
                self.log_probs.append(mean.flatten(1).sum(1) * 0.0)
            self.means.append(mean)
            self.stds.append(std)
        self.step += 1
        if self.step >= self.asked.stop:
            raise LoopLeft
        return following.repeat(copies, *[1] * (following.ndim - 1))


def without_copies(mean: Tensor, num_rows: int) -> tuple[Tensor, int]:
    """The first `num_rows` rows, and how many equal copies of them there are.

    Pipelines that guide on doubled latents step the scheduler with both halves; the draws must then be equal too.

    Raises:
        UnsupportedPipelineError: if the rows are not such copies, so that none of them can be given to a sample.
    """
    copies, rest = divmod(len(mean), num_rows)
    first = mean[:num_rows]
    if rest or copies == 0:
        raise UnsupportedPipelineError(f"the scheduler is stepped with {len(mean)} rows for {num_rows} samples")
    if copies > 1 and not torch.allclose(mean, first.repeat(copies, *[1] * (mean.ndim - 1)), atol=1e-5):
        raise UnsupportedPipelineError(
            f"the scheduler is stepped with {copies} different states of each sample, which have no joint density here"
        )
    return first, copies


class SchedulerHead:
    """Stands between a pipeline's scheduler and the current pass. `current` is set for the length of a pass."""

    def __init__(self) -> None:
        self.kernel = KERNELS["flow"][0]
        """Which of `KERNELS` a flow scheduler steps with."""
        self.current: Pass | None = None
        self._noise_level = 0.0
        self._noisy: Collection[int] | None = None

    def begin(self, tape: Pass, *, noise_level: float, noisy: Collection[int] | None) -> None:
        """Take a pass whose steps `noisy` (None: all) are drawn with `noise_level`, the others without."""
        self.current, self._noise_level, self._noisy = tape, noise_level, noisy

    @property
    def noise_level(self) -> float:
        """Noise of the current step."""
        assert self.current is not None, "the scheduler is stepped outside of a pass"
        is_noisy = self._noisy is None or self.current.step in self._noisy
        return self._noise_level if is_noisy else 0.0


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
        velocity, latents = model_output.float(), sample.float()
        schedule = {"sigma": scheduler.sigmas[index], "next_sigma": scheduler.sigmas[index + 1]}
        if head.kernel == "flow_sde":
            return flow_sde.transition(
                velocity, latents, **schedule, second_sigma=scheduler.sigmas[1], noise_level=head.noise_level
            )
        kernel = {"dance_sde": dance_sde, "cps": cps}[head.kernel]
        return kernel.transition(velocity, latents, **schedule, noise_level=head.noise_level)

    assert head.current is not None, "the scheduler is stepped outside of a pass"
    scheduler._step_index += 1
    sigma = scheduler.sigmas[index]
    return head.current.next_latents(
        Transition(transition, Forward(model_output, 1 - sigma, sigma, "velocity")), sample
    )


def _ddim_step(scheduler: Any, head: SchedulerHead, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    now = int(timestep)
    # The schedule's own next timestep: with linspace or trailing spacing it is not a constant stride away.
    later = [step for step in scheduler.timesteps.tolist() if step < now]
    following = max(later) if later else -1
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
    alpha = scheduler.alphas_cumprod[now]
    forward = Forward(model_output, alpha.sqrt(), (1 - alpha).sqrt(), scheduler.config.prediction_type)
    return head.current.next_latents(Transition(transition, forward), sample)


def _subclass(base: type, step: Any, head: SchedulerHead) -> type:
    """A scheduler class that is `base` in all but `step`, whose signature (which pipelines inspect) it keeps."""

    @functools.wraps(base.step)  # type: ignore[attr-defined]
    def stochastic_step(self, model_output, timestep, sample, *args, return_dict: bool = True, **kwargs):
        return _output(step(self, head, model_output, timestep, sample), return_dict)

    members: dict[str, Any] = {"step": stochastic_step}
    if not hasattr(base, "scale_model_input"):  # called by pipelines that take several families of schedulers
        members |= {"scale_model_input": lambda self, sample, timestep=None: sample, "init_noise_sigma": 1.0}
    return type(f"Stochastic{base.__name__}", (base,), members)


def family_of(scheduler: Any) -> str:
    """The family of a pipeline's scheduler: a key of `KERNELS`.

    Raises:
        UnsupportedPipelineError: if no kernel has the scheduler's process.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if "original_inference_steps" in config:
        raise UnsupportedPipelineError(f"{name}: a consistency sampler, whose denoiser is distilled for its own jumps")
    if config.get("timestep_type") == "continuous":
        raise UnsupportedPipelineError(
            f"{name}: continuous timesteps (log-sigmas) have no place in a DDIM schedule; no kernel for them yet"
        )
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if config["stochastic_sampling"]:
            raise UnsupportedPipelineError(f"{name}: stochastic_sampling has no flow_sde density")
        return "flow"
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    if "beta_schedule" in config and config.get("prediction_type") in ("epsilon", "v_prediction", "sample"):
        if config.get("thresholding"):
            raise UnsupportedPipelineError(f"{name}: dynamic thresholding is not supported")
        return "betas"
    raise UnsupportedPipelineError(
        f"{name}: no transition kernel for this scheduler; set pipeline.scheduler to a "
        "FlowMatchEulerDiscreteScheduler or a DDIM/DDPM-family one"
    )


def stochastic_scheduler(scheduler: Any, kernel: str, head: SchedulerHead) -> Any:
    """A stochastic twin of a pipeline's scheduler with the same schedule; sets the head's kernel.

    Raises:
        UnsupportedPipelineError: if the scheduler's family has no kernel, or the asked kernel does not fit it.
    """
    family = family_of(scheduler)
    if kernel not in ("auto", *KERNELS[family]):
        raise UnsupportedPipelineError(
            f"policy.sampling.kernel: {kernel} does not fit {type(scheduler).__name__}; use {KERNELS[family][0]}"
        )
    head.kernel = KERNELS[family][0] if kernel == "auto" else kernel
    config = dict(scheduler.config)
    twin: Any
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        twin = _subclass(type(scheduler), _flow_step, head).from_config(config)  # type: ignore[attr-defined]
    elif family == "flow":
        flow_class = _subclass(FlowMatchEulerDiscreteScheduler, _flow_step, head)
        twin = flow_class(shift=config.get("flow_shift") or 1.0, num_train_timesteps=config["num_train_timesteps"])
    else:
        config.setdefault("clip_sample", False)  # PNDM, Euler and DPM configs lack it and never clip
        config.setdefault("set_alpha_to_one", False)
        twin = _subclass(DDIMScheduler, _ddim_step, head).from_config(config)  # type: ignore[attr-defined]
        # CogVideoX shifts its signal-to-noise ratio on top of its betas.
        twin.alphas_cumprod = scheduler.alphas_cumprod.clone()
        twin.final_alpha_cumprod = torch.tensor(1.0) if config["set_alpha_to_one"] else twin.alphas_cumprod[0]
    # Pipelines read their scheduler's config (variance_type says what the denoiser's output holds).
    twin.register_to_config(**{key: value for key, value in config.items() if key not in twin.config})
    return twin

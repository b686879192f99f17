"""The policy head of a diffusers pipeline: its scheduler, made stochastic, scored and replayable.

A pipeline keeps its own class and its own scheduler's schedule; only `step` is replaced. Each pass through the
pipeline's loop is driven by a `Pass`: `SamplePass` draws and records, `ReplayPass` fast-forwards over recorded states
and scores those that were asked for.
"""

import copy
import functools
import itertools
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from diffusers import (
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import BaseOutput
from torch import Tensor

from unified_rl.errors import RecipeError
from unified_rl.policies.noise_plan import stored_steps
from unified_rl.policies.scheduler_steps import JUMPS, STEPS, Step, Transition
from unified_rl.transitions import gaussian

KERNELS = {
    "flow": ("flow_sde", "dance_sde", "cps"),
    "betas": ("ddim", "ancestral"),
    "cosine": ("ddim",),
    "exploding": ("ancestral",),
    "consistency": ("renoise",),
}
"""Transition kernels by family of schedulers; the first is the family's own choice."""
EDM = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler, CosineDPMSolverMultistepScheduler)
EULER = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
SPACED = (
    *EULER,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    LMSDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
"""Those that evaluate the denoiser once a step, at times that DDIM would not choose."""
MIN_STD = 1e-6
"""A step with less noise than this counts as deterministic: there is nothing to score."""


class UnsupportedPipelineError(RecipeError):
    """This pipeline cannot be replayed exactly, so it is refused rather than trained wrongly."""


class LoopLeft(BaseException):
    """Leaves a pipeline's loop once the last asked step is scored. No Exception: pipelines must not catch it."""


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
        self.frames = 1
        """Frames of a video that its pipeline folds into the rows before it steps the scheduler."""
        self.input_shape: torch.Size | None = None
        """Shape of the denoiser's latest input."""
        self._generators = sampling_generators(seeds)

    def next_latents(self, transition: Transition, latents: Tensor) -> Tensor:
        mean, std = transition()
        self.frames = _frames_in_rows(mean, len(self._generators), self.input_shape)
        mean, copies = without_copies(_folded(mean, self.frames), len(self._generators))
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
        return _unfolded(following.repeat(copies, *[1] * (following.ndim - 1)), self.frames)


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
        frames = following.shape[1] if following.ndim == latents.ndim + 1 else 1
        copies = len(latents) // (len(following) * frames)
        if self.step in self.asked:
            mean, std = transition()
            mean, copies = without_copies(_folded(mean, frames), len(self.states))
            if std >= MIN_STD:
                self.log_probs.append(gaussian.log_prob(following.float(), mean, std).mean_over_dims)
            else:
                self.log_probs.append(mean.flatten(1).sum(1) * 0.0)
            self.means.append(mean)
            self.stds.append(std)
        self.step += 1
        if self.step >= self.asked.stop:
            raise LoopLeft
        return _unfolded(following.repeat(copies, *[1] * (following.ndim - 1)), frames)


def _frames_in_rows(mean: Tensor, num_rows: int, input_shape: torch.Size | None) -> int:
    """How many frames of each sample lie in the rows: a video's denoiser sees [B, C, F, H, W], but its scheduler is
    stepped with [B x F, C, H, W]. 1 where that is not so."""
    if input_shape is None or len(input_shape) != mean.ndim + 1:
        return 1
    frames = len(mean) // num_rows
    return frames if frames > 1 and frames in input_shape[1:3] and len(mean) == frames * num_rows else 1


def _folded(rows: Tensor, frames: int) -> Tensor:
    return rows.reshape(-1, frames, *rows.shape[1:]) if frames > 1 else rows


def _unfolded(rows: Tensor, frames: int) -> Tensor:
    return rows.flatten(0, 1) if frames > 1 else rows


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
            " (negative prompts that are rows of their own? leave negative_prompt out)"
        )
    return first, copies


def stored_states(tape: SamplePass, dtype: torch.dtype | None) -> tuple[list[Tensor | list[Tensor]], list[int]]:
    """What a replay needs of the sampled states, row by row, on the CPU, and of which steps they are.

    A step does not always start from the one before: all are kept where they differ in shape (joint audio and video),
    or where the noise rises again (a second loop that goes on from the first one's result).
    """
    uniform = len({state.shape for state in tape.states}) == 1
    chain = uniform and all(after[1] <= before[1] for before, after in itertools.pairwise(tape.levels))
    steps = stored_steps(tape.stochastic) if chain else list(range(tape.step))
    kept = [tape.states[step].to(device="cpu", dtype=dtype) for step in steps]
    rows = [list(row) for row in zip(*kept, strict=True)]
    return [torch.stack(row) if uniform else row for row in rows], steps


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


def _subclass(base: type, step: Step, head: SchedulerHead) -> type:
    """A scheduler class that is `base` in all but `step`, whose signature (which pipelines inspect) it keeps."""

    @functools.wraps(base.step)  # type: ignore[attr-defined]
    def stochastic_step(self, model_output, timestep, sample, *args, return_dict: bool = True, **kwargs):
        assert head.current is not None, "the scheduler is stepped outside of a pass"
        if kwargs.get("per_token_timesteps") is not None:
            # diffusers adds sigma - next_sigma times what it is given here, which is clean - noise. Tokens at another
            # time than the step's are put back by their pipelines.
            model_output = -model_output
        transition = step(self, head, model_output, timestep, sample)
        # Z-Image's first latents are in half precision, its predictions and later states are not.
        latents = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        return _output(head.current.next_latents(transition, latents), return_dict)

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
    if isinstance(scheduler, tuple(JUMPS)):
        return "consistency"
    if isinstance(scheduler, DDPMWuerstchenScheduler):
        return "cosine"
    if isinstance(scheduler, EDM) or config.get("timestep_type") == "continuous":
        return "exploding"
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if config["stochastic_sampling"]:
            raise UnsupportedPipelineError(f"{name}: stochastic_sampling has no flow_sde density")
        # Cosmos's pipelines set this limit: their states are clean + sigma * noise, with sigmas that a flow has not.
        return "exploding" if config.get("sigma_max", 1.0) > 1.0 else "flow"
    if config.get("use_flow_sigmas"):
        return "flow"
    known = config.get("prediction_type") in ("epsilon", "v_prediction", "sample")
    if "beta_schedule" in config and known and "original_inference_steps" not in config:
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
    fitting = [
        name for name in KERNELS[family] if name != "ancestral" or family == "exploding" or isinstance(scheduler, EULER)
    ]
    if kernel not in ("auto", *fitting):
        raise UnsupportedPipelineError(
            f"policy.sampling.kernel: {kernel} does not fit {type(scheduler).__name__}; use {fitting[0]}"
        )
    head.kernel = fitting[0] if kernel == "auto" else kernel
    config = dict(scheduler.config)
    step = STEPS["exploding" if head.kernel == "ancestral" else family]
    twin: Any
    if family == "betas" and head.kernel == "ddim":
        twin = _ddim_twin(scheduler, step, head)
    else:
        twin = _subclass(type(scheduler), step, head).from_config(config)  # type: ignore[attr-defined]
    # Pipelines read their scheduler's config (variance_type says what the denoiser's output holds).
    twin.register_to_config(**{key: value for key, value in config.items() if key not in twin.config})
    return twin


def _ddim_twin(scheduler: Any, step: Step, head: SchedulerHead) -> Any:
    """A DDIM scheduler with another one's noise schedule and spacing."""
    config = dict(scheduler.config)
    config.setdefault("clip_sample", False)  # PNDM, Euler and DPM configs lack it and never clip
    config.setdefault("set_alpha_to_one", config.get("final_sigmas_type") == "zero")
    config.setdefault("timestep_spacing", "linspace")  # unCLIP has no other
    if config["beta_schedule"] == "exp":  # Shap-E's, which DDIM does not know by name
        config["trained_betas"] = scheduler.betas.tolist()
    # What a checkpoint left to its own class's defaults must not fall back to DDIM's (Euler's spacing is another).
    config["_use_default_values"] = []
    twin: Any = _subclass(_spaced_as(scheduler), step, head).from_config(config)  # type: ignore[attr-defined]
    # CogVideoX shifts its signal-to-noise ratio on top of its betas.
    twin.alphas_cumprod = scheduler.alphas_cumprod.clone()
    twin.final_alpha_cumprod = torch.tensor(1.0) if config["set_alpha_to_one"] else twin.alphas_cumprod[0]
    return twin


def _spaced_as(scheduler: Any) -> type:
    """A DDIM scheduler class over another one's timesteps, to whole numbers: multistep solvers space theirs in another
    way, and sigmas may be Karras's. Its `set_timesteps` raises UnsupportedPipelineError where two of them are one."""
    if not isinstance(scheduler, SPACED):
        return DDIMScheduler
    own: Any = copy.deepcopy(scheduler)
    base = DDIMScheduler.set_timesteps

    class Spaced(DDIMScheduler):
        @functools.wraps(base)
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            base(self, num_inference_steps, device=device)
            own.set_timesteps(num_inference_steps, device=device)
            self.timesteps = own.timesteps.round().long()
            if _fall(own):
                return
            while not _fall(own):
                num_inference_steps -= 1
                own.set_timesteps(num_inference_steps, device=device)
            raise UnsupportedPipelineError(
                f"num_inference_steps: with {len(self.timesteps)}, times of {type(scheduler).__name__} round to one"
                f" (Karras's and other spaced sigmas crowd at the end); use at most {num_inference_steps}"
            )

    return Spaced


def _fall(scheduler: Any) -> bool:
    return bool((scheduler.timesteps.round().diff() < 0).all())

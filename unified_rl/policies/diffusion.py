"""Any diffusers pipeline as a policy, without code for the model: the pipeline is the policy, its scheduler the head.

Sampling runs the pipeline's own `__call__` with a stochastic scheduler that records every state. Scoring runs the same
code again, fast-forwarded: at steps that are not asked for, the denoiser is bypassed (zeros of the recorded shape) and
the scheduler returns the recorded state; at an asked step the real denoiser runs with gradients and the recorded next
state is scored. Guidance, packing, casts, img2img starts and inpainting blends are therefore exactly those of sampling.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from unified_rl.policies import differentiable, probing, recorded_pictures, savings
from unified_rl.policies.bypass import bypassing, calling, leaving, outputs_by_row, recording
from unified_rl.policies.decoding import watched_decoder
from unified_rl.policies.denoisers import Denoisers
from unified_rl.policies.denoising import PredictPass, first_latents
from unified_rl.policies.encoders import Encoders
from unified_rl.policies.latent_states import StartPass, latent_states
from unified_rl.policies.noise_plan import check_plan, group_seed, noisy_steps, shares_initial_noise
from unified_rl.policies.pipeline_call import call_arguments, generators, rows_of
from unified_rl.policies.pipeline_table import refusal, takes_one_row
from unified_rl.policies.scheduler_head import (
    LoopLeft,
    Pass,
    ReplayPass,
    SamplePass,
    SchedulerHead,
    UnsupportedPipelineError,
    stochastic_scheduler,
    stored_states,
)
from unified_rl.policies.without_videos import processors_of
from unified_rl.protocols import Probe
from unified_rl.recipe.policy import SHARES, DiffusionSampling, PolicyBlock
from unified_rl.types import Completion, Denoised, Prompt, Recorded, Segment, StepStates, StepStats, Trajectory

SEGMENT = "image"
CALL_DEFAULTS = "call_defaults.json"
"""A checkpoint folder may hold default call arguments in this file, beside model_index.json."""


class DiffusionPolicy:
    """A pipeline whose denoiser is trained. See `unified_rl.protocols.Policy`."""

    steps_per_forward: Mapping[str, int | None] = {SEGMENT: 1}
    _momentum = probing.MOMENTUM

    def __init__(
        self,
        pipeline: Any,
        block: PolicyBlock,
        *,
        evaluation: DiffusionSampling | None = None,
        with_reference: bool = False,
        call_defaults: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Take over a pipeline, already on its device and in its dtype.

        Args:
            evaluation: sampling settings of evaluation; None: those of `block.sampling`.
            with_reference: keep what `reference()` needs (full fine-tuning: a frozen copy of the denoiser).
            call_defaults: arguments for the pipeline's call below those of `block.sampling.call`.
            seed: the recipe's, of which noisy steps and common initial noise are drawn.

        Raises:
            UnsupportedPipelineError: if the pipeline's structure or scheduler cannot be replayed exactly.
            RecipeError: if the adapter or train patterns match nothing, or a call argument does not exist.
        """
        self._refuse(type(pipeline).__name__)
        self.version = 0
        self._layout: recorded_pictures.Layout | None = None
        self.rollout = 0
        self.max_steps: Mapping[str, int] = {}
        self._seed = seed
        self._pipeline = pipeline
        self._block = block
        self._settings: dict[bool, Any] = {False: block.sampling, True: evaluation or block.sampling}
        self._call_defaults = dict(call_defaults or {})
        self._head = SchedulerHead()
        if "scheduler" not in pipeline.config:  # `components` leaves out those that `__init__` makes itself
            raise UnsupportedPipelineError(f"{type(pipeline).__name__}: no component named scheduler")
        self._take_scheduler()
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self._denoisers = Denoisers(pipeline, block, with_reference=with_reference)
        self.module: Any = self._denoisers.module
        savings.apply(pipeline, [*self._denoisers.parts.values()], block)
        self._fast_forward = self._guided = True
        self._encoders = Encoders(pipeline, block.memory.text_encoders)
        self._one_row = takes_one_row(type(pipeline).__name__)

    def _take_scheduler(self) -> None:
        """Put the policy head in the place of the pipeline's scheduler."""
        sampling = self._block.sampling
        assert isinstance(sampling, DiffusionSampling)
        self.max_steps = {SEGMENT: sampling.num_noisy}
        self._pipeline.scheduler = stochastic_scheduler(self._pipeline.scheduler, sampling.kernel, self._head)
        for where, settings in (("policy", sampling), ("evaluation", self._settings[True])):
            if self._head.kernel in SHARES and settings.noise_level > 1:
                raise UnsupportedPipelineError(
                    f"{where}.sampling.noise_level: {self._head.kernel} takes a share of the noise, at most 1"
                )

    def _begin(self, tape: Pass, settings: DiffusionSampling, noisy: list[int] | None) -> None:
        """Give the head its pass."""
        self._head.begin(tape, noise_level=settings.noise_level, noisy=noisy)

    def _end(self) -> None:
        self._head.current = None

    @classmethod
    def load(
        cls,
        block: PolicyBlock,
        *,
        evaluation: DiffusionSampling,
        with_reference: bool,
        device: torch.device,
        seed: int = 0,
        without: Sequence[str] = (),
    ) -> "DiffusionPolicy":
        """Load a pipeline from a folder or the hub, but not the components of `without` and those that its index marks
        as absent (diffusers wants those named, for instance text_encoder_3=None)."""
        index = DiffusionPipeline.load_config(block.model, revision=block.revision)
        cls._refuse(str(index["_class_name"]))
        absent = {name: None for name, value in index.items() if value == [None, None] or name in without}
        given = absent | processors_of(block.model, block.revision, index)
        pipeline = DiffusionPipeline.from_pretrained(
            block.model, revision=block.revision, dtype=getattr(torch, block.dtype), **given
        ).to(device)
        defaults = Path(block.model) / CALL_DEFAULTS
        return cls(
            pipeline,
            block,
            evaluation=evaluation,
            with_reference=with_reference,
            seed=seed,
            call_defaults=json.loads(defaults.read_text(encoding="utf-8")) if defaults.is_file() else None,
        )

    @classmethod
    def _refuse(cls, class_name: str) -> None:
        """Raise for a class that is known not to replay."""
        reason = refusal(class_name)
        if reason is not None:
            raise UnsupportedPipelineError(f"{class_name}: {reason}")

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Run the pipeline once, recording each step's state and log-prob (Gaussian, mean over dims)."""
        settings = self._settings[evaluation]
        # An exam is always the same, whatever the rollout; and its samples are those that the model will give.
        noisy = noisy_steps(settings, seed=self._seed, rollout=0 if evaluation else self.rollout)
        dtype = None if evaluation or settings.state_dtype is None else getattr(torch, settings.state_dtype)
        tape = SamplePass([prompt.seed for prompt in prompts], dtype)
        templates: list[list[Any]] = []
        outputs: list[list[Any]] | None = [] if settings.store_outputs and not evaluation else None
        record = recording(tape, templates, len(prompts), outputs)
        with (
            torch.no_grad(),
            self._pass(tape, record, prompts, settings, noisy),
            watched_decoder(self._pipeline, len(prompts)) as spoiled,
        ):
            images = rows_of(self._call(prompts, settings), len(prompts))
        if not tape.states:
            raise UnsupportedPipelineError(
                f"{type(self._pipeline).__name__}: its loop never stepped its own scheduler (a pipeline of pipelines?)"
            )
        check_plan(settings, tape.step, noisy=sum(tape.stochastic))
        if not evaluation:
            # A loop over two schedulers, or over several stretches of a video, has more than one schedule.
            self.max_steps = {SEGMENT: max(self.max_steps[SEGMENT], sum(tape.stochastic))}
        states, stored = stored_states(tape, dtype)
        mask = torch.tensor(tape.stochastic).repeat(len(prompts), 1)
        segment = Segment(
            actions={
                "prompts": list(prompts),
                "states": states,
                "stored": [stored] * len(prompts),
                "templates": [templates] * len(prompts),
                "levels": [tape.levels] * len(prompts),
                **({} if outputs is None else {"outputs": outputs_by_row(outputs, tape.stochastic, len(prompts))}),
            },
            rollout_log_probs=torch.stack(tape.log_probs, dim=1).cpu(),
            loss_mask=mask,
            turn_ids=torch.zeros(mask.shape, dtype=torch.int64),
        )
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments={SEGMENT: segment},
            completions=[
                Completion(text=None, images=row, spoiled=bad) for row, bad in zip(images, spoiled(), strict=True)
            ],
            policy_version=self.version,
        )

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Score recorded steps by fast-forward replay; one real denoiser evaluation per asked step."""
        assert name == SEGMENT, f"a diffusion policy has no segment {name!r}"
        asked = range(*steps.indices(segment.rollout_log_probs.shape[1]))
        assert asked.step == 1 and len(asked), "windows are runs of steps"
        prompts: Sequence[Prompt] = segment.actions["prompts"]  # type: ignore[assignment]
        templates: list[list[Any]] = segment.actions["templates"][0]  # type: ignore[assignment]
        states: Any = segment.actions["states"]
        tape = ReplayPass(states, segment.actions["stored"][0], asked, segment.rollout_log_probs.shape[1])  # type: ignore[arg-type]
        outputs = segment.actions.get("outputs")
        bypass = bypassing(tape, templates, len(prompts), outputs) if self._fast_forward else calling  # type: ignore[arg-type]
        noisy = segment.loss_mask[0].nonzero().flatten().tolist()
        with self._pass(tape, bypass, prompts, self._settings[False], noisy), suppress(LoopLeft):
            self._call(prompts, self._settings[False])
        if len(tape.log_probs) != len(asked):
            raise UnsupportedPipelineError(
                f"{type(self._pipeline).__name__}: the replayed loop took another number of steps than sampling did"
            )
        if torch.is_grad_enabled() and segment.loss_mask[:, asked.start : asked.stop].any():
            self._check_gradient(tape)
        std = torch.stack(tape.stds).reshape(1, len(asked), *[1] * (tape.means[0].ndim - 1))
        return StepStats(
            log_probs=torch.stack(tape.log_probs, dim=1),
            entropy=None,
            mean=torch.stack(tape.means, dim=1),
            std=std,
        )

    def num_levels(self, name: str, segment: Segment) -> int:
        """Steps of the schedule that drew a segment."""
        return len(segment.actions["levels"][0])

    def predict(self, name: str, segment: Segment, step: int, seeds: Sequence[int]) -> Denoised:
        """The pipeline's prediction for finished samples that were noised again, see `denoising`."""
        assert name == SEGMENT, f"a diffusion policy has no segment {name!r}"
        prompts: Sequence[Prompt] = segment.actions["prompts"]  # type: ignore[assignment]
        templates: list[list[Any]] = segment.actions["templates"][0]  # type: ignore[assignment]
        tape = PredictPass(segment, step, seeds, self._device)
        bypass = bypassing(tape, templates, len(prompts))
        start = first_latents(type(self._pipeline), tape)
        with self._pass(tape, bypass, prompts, self._settings[False], None), suppress(LoopLeft):
            self._call(prompts, self._settings[False], **start)
        return tape.denoised(type(self._pipeline).__name__)

    def states(self, name: str, segment: Segment, steps: slice, *, trunk: nn.Module | None = None) -> StepStates:
        """The latents in which each step was drawn, and their noise levels; see `latent_states`."""
        assert name == SEGMENT and trunk is None, "latents are computed by no trunk"
        tape = StartPass()
        prompts: Sequence[Prompt] = segment.actions["prompts"]  # type: ignore[assignment]
        templates: list[list[Any]] = segment.actions["templates"][0]  # type: ignore[assignment]
        bypass = bypassing(tape, templates, len(prompts))
        settings = self._settings[False]
        with torch.no_grad(), self._pass(tape, bypass, prompts, settings, []), suppress(LoopLeft):
            self._call(prompts, settings)
        return latent_states(type(self._pipeline).__name__, tape, segment, steps, self._pipeline.scheduler)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Nothing to watch: `states` needs no forward of the denoiser."""
        yield

    def trunk(self) -> nn.Module:
        """A TypeError, always: latents are what they are."""
        raise TypeError("latents are computed by no trunk")

    def encode_ahead(self, prompts: Iterable[Prompt]) -> None:
        """Encode prompts that will come and, if the recipe says so, free the text encoders' memory then."""
        if self._block.memory.text_encoders != "drop":
            return

        def call(rows: Sequence[Prompt], settings: DiffusionSampling) -> None:
            with torch.no_grad(), self._pass(StartPass(), leaving, rows, settings, []), suppress(LoopLeft):
                self._call(rows, settings)

        each = [*prompts]
        for settings in self._settings.values():
            self._encoders.ahead(each, functools.partial(call, settings=settings), one_row=self._one_row)
        self._encoders.drop()

    @property
    def _device(self) -> torch.device:
        return self._denoisers.device

    def record(self, prompts: Sequence[Prompt], recorded: Sequence[Recorded]) -> Trajectory:
        """Recorded pictures as trajectories, see `recorded_pictures`."""
        caught: list[Tensor] = []
        settings = self._settings[False]

        def run(tape: Pass, denoise: Callable) -> Tensor:
            decoder = recorded_pictures.catching_decoder(self._pipeline, caught)
            with torch.no_grad(), self._pass(tape, denoise, prompts[:1], settings, []), decoder, suppress(LoopLeft):
                self._call(prompts[:1], settings)
            return caught.pop()

        self._layout = self._layout or recorded_pictures.layout_of(run)
        completions = [each.completion for each in recorded]
        segment = self._layout.segment(self._pipeline, prompts, completions)
        groups = torch.tensor([prompt.group_id for prompt in prompts])
        return Trajectory(
            group_ids=groups, segments={SEGMENT: segment}, completions=completions, policy_version=self.version
        )

    def sample_with_grad(self, name: str, segment: Segment, *, kind: str, step: int, seeds: Sequence[int]) -> Tensor:
        """A segment's pictures once more, [B, 3, H, W] in [0, 1], with gradients; see `differentiable`."""
        assert name == SEGMENT, f"a diffusion policy has no segment {name!r}"
        prompts: Sequence[Prompt] = segment.actions["prompts"]  # type: ignore[assignment]
        tape, noisy = differentiable.start(segment, kind, step, seeds, self._device)
        start = {} if isinstance(tape, differentiable.GradientPass) else first_latents(type(self._pipeline), tape)
        settings, decoder = self._settings[False], differentiable.checkpointed_decoder(self._pipeline)
        with self._pass(tape, differentiable.with_gradients(tape, segment), prompts, settings, noisy), decoder:
            output = self._call(prompts, settings, output_type="pt", **start)
            return differentiable.pictures_of(output, len(prompts), type(self._pipeline).__name__)

    def _check_gradient(self, tape: ReplayPass) -> None:
        """Refuse a pipeline that cuts the graph between its denoiser and its scheduler."""
        if not any(log_prob.requires_grad for log_prob in tape.log_probs):
            raise UnsupportedPipelineError(
                f"{type(self._pipeline).__name__}: no gradient flows from the scheduler's step to the denoiser"
            )

    def reference(self) -> AbstractContextManager[None]:
        """The adapters switched off, or the frozen copies in the denoisers' places."""
        return self._denoisers.reference()

    def save(self, directory: Path) -> None:
        """See `Denoisers.save`."""
        self._denoisers.save(directory)

    def restore(self, directory: Path) -> None:
        """Load what `save` wrote."""
        self._denoisers.restore(directory)

    def probes(self) -> list[Probe]:
        """Low precision, guidance, and the denoiser's calls that replay leaves out."""
        parts = [part for part in self._pipeline.components.values() if isinstance(part, nn.Module)]
        dropped = self._block.memory.text_encoders == "drop"  # nothing can be encoded once more
        found = [] if dropped else probing.float32_probes(parts, self._encoders.afresh)
        if probing.without_guidance(type(self._pipeline), {**self._call_defaults, **self._settings[False].call}):
            active = functools.partial(probing.switched_off, self, "_guided")
            found.append(Probe(change=probing.UNGUIDED, remedy=probing.UNGUIDED_REMEDY + self._momentum, active=active))
        active = functools.partial(probing.switched_off, self, "_fast_forward")
        remedy = probing.STATEFUL + self._momentum
        return [*found, Probe(change="with every call of the denoiser made", remedy=remedy, active=active)]

    def _noise_seeds(self, prompts: Sequence[Prompt], settings: DiffusionSampling) -> list[int]:
        """The seeds of what the pipeline draws itself, its first latents above all."""
        if shares_initial_noise(settings):
            return [group_seed(self._seed, prompt.group_id) for prompt in prompts]
        return [prompt.seed for prompt in prompts]

    def _call(self, prompts: Sequence[Prompt], settings: DiffusionSampling, **more: Any) -> Any:
        given = {**self._call_defaults, **settings.call, "num_inference_steps": settings.num_inference_steps, **more}
        if not self._guided:
            given |= probing.without_guidance(type(self._pipeline), given)
        arguments = call_arguments(type(self._pipeline), prompts, given, lone=self._one_row)
        if "generator" in arguments:
            arguments["generator"] = generators(self._encoders.seeds)
        # Without the pipeline's torch.no_grad: sampling brings its own, scoring wants gradients.
        return inspect.unwrap(type(self._pipeline).__call__)(self._pipeline, **arguments)

    @contextmanager
    def _pass(
        self,
        tape: Pass,
        denoise: Callable,
        prompts: Sequence[Prompt],
        settings: DiffusionSampling,
        noisy: list[int] | None,
    ) -> Iterator[None]:
        """Drive the loop by `tape`, the denoiser's forward wrapped by `denoise`."""
        if self._one_row and len(prompts) > 1:
            raise UnsupportedPipelineError(
                f"{type(self._pipeline).__name__} takes one row a call (engine.rollout_batch and micro_batch: 1)"
            )
        self._begin(tape, settings, noisy)
        self._encoders.begin(prompts, settings.call, self._noise_seeds(prompts, settings))
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with self._denoisers.wrapped(denoise), torch.random.fork_rng(devices):
                torch.manual_seed(self._encoders.seeds[0])
                before = torch.get_rng_state()
                yield
                if len(prompts) > 1 and not torch.equal(before, torch.get_rng_state()):
                    raise UnsupportedPipelineError(
                        f"{type(self._pipeline).__name__} draws from the global random generator, so that a row "
                        "depends on its batch; sample one row at a time (engine.rollout_batch and micro_batch: 1)"
                    )
        finally:
            self._end()

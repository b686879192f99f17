"""A masked-diffusion pipeline of diffusers (aMUSEd) as a policy: the scheduler is the policy head once more.

Sampling and replay run the pipeline's own loop, as for other pipelines (see `diffusion`); a step commits tokens
instead of moving latents. With the estimators `random_mask` and `coupled_mask` the scored steps are not those of the
sampler: the finished picture is masked anew and the replayed loop is led through these states, so that guidance and
conditioning are again those of sampling. This is exact because the denoiser knows no timestep, only the state.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unified_rl.policies.bypass import bypassing, calling, recording
from unified_rl.policies.diffusion import SEGMENT, DiffusionPolicy
from unified_rl.policies.frozen_tower import Remembered
from unified_rl.policies.memo import Memo
from unified_rl.policies.pipeline_call import rows_of
from unified_rl.policies.scheduler_head import LoopLeft, UnsupportedPipelineError
from unified_rl.policies.unmask_head import UnmaskHead, UnmaskReplay, UnmaskSample, recorded_scheduler
from unified_rl.recipe.policy import MaskedDiffusionSampling
from unified_rl.transitions import unmask
from unified_rl.types import Completion, Prompt, Segment, StepStats, Trajectory


class MaskedDiffusionPolicy(DiffusionPolicy):
    """A pipeline that fills in tokens. See `unified_rl.protocols.Policy`."""

    # Tokens cannot be noised, nor differentiated: to a protocol's isinstance, a method that is None is not there.
    predict = None  # type: ignore[assignment]
    sample_with_grad = None  # type: ignore[assignment]
    record = None  # type: ignore[assignment]
    _momentum = ""  # its sampling stores no outputs

    def _take_scheduler(self) -> None:
        sampling = self._block.sampling
        assert isinstance(sampling, MaskedDiffusionSampling)
        self.max_steps = {SEGMENT: sampling.num_scored}
        self._unmask_head = UnmaskHead()
        self._mask_id = self._pipeline.scheduler.config.mask_token_id
        self._pipeline.scheduler = recorded_scheduler(self._pipeline.scheduler, self._unmask_head)
        encoder = self._pipeline.components.get("text_encoder")
        if isinstance(encoder, nn.Module):  # these pipelines have no encode_prompt that could be remembered by row
            encoder.forward = Remembered(encoder, "text_encoder", Memo())

    def _begin(self, tape: Any, settings: Any, noisy: Any) -> None:
        self._unmask_head.current = tape

    def _end(self) -> None:
        self._unmask_head.current = None

    def _noise_seeds(self, prompts: Sequence[Prompt], settings: Any) -> list[int]:
        return [prompt.seed for prompt in prompts]

    @classmethod
    def _refuse(cls, class_name: str) -> None:
        """The table is of Gaussian steps; a scheduler whose tokens cannot be scored is refused by its class."""

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Run the pipeline once; a step's log-prob is the sum over the tokens that it commits, or the estimator's mean
        over one mask (not computed for evaluation, where nothing reads it)."""
        settings: Any = self._settings[evaluation]
        tape = UnmaskSample([prompt.seed for prompt in prompts])
        templates: list[list[Any]] = []
        record: Any = recording(tape, templates, len(prompts))  # type: ignore[arg-type]
        with torch.no_grad(), self._pass(tape, record, prompts, settings, None):  # type: ignore[arg-type]
            images = rows_of(self._call(prompts, settings), len(prompts))
        if not tape.states:
            raise UnsupportedPipelineError(f"{type(self._pipeline).__name__}: its loop never stepped its scheduler")
        segment = Segment(
            actions={
                "prompts": list(prompts),
                "states": [torch.stack(row).cpu() for row in zip(*tape.states, strict=True)],
                "samples": list(tape.states[-1].cpu()),
                "templates": [templates] * len(prompts),
            },
            rollout_log_probs=torch.stack(tape.log_probs, dim=1).cpu(),
            loss_mask=torch.stack(tape.commits, dim=1).cpu(),
            turn_ids=torch.zeros(len(prompts), tape.step, dtype=torch.int64),
        )
        if settings.estimator != "trajectory" and not evaluation:
            segment = self._remasked(segment, settings)
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments={SEGMENT: segment},
            completions=[Completion(text=None, images=row) for row in images],
            policy_version=self.version,
        )

    def _remasked(self, segment: Segment, settings: MaskedDiffusionSampling) -> Segment:
        """The segment with masked copies of its finished samples in place of its path, a step each."""
        prompts: Any = segment.actions["prompts"]
        paths = []
        for prompt, sample in zip(prompts, segment.actions["samples"], strict=True):
            make = unmask.coupled_masks if settings.estimator == "coupled_mask" else unmask.random_masks
            low, high = settings.mask_ratio
            own = torch.Generator().manual_seed((prompt.seed * 2 + 2) % (1 << 63))
            masks = make(settings.num_masks, sample.numel(), low=low, high=high, generator=own)
            masked = sample.flatten().masked_fill(masks, self._mask_id).view(-1, *sample.shape)
            paths.append(torch.cat([masked, sample[None]]))
        shape = (segment.num_rows, settings.num_scored)
        segment = Segment(
            actions={**segment.actions, "states": paths},
            rollout_log_probs=torch.zeros(shape),
            loss_mask=torch.ones(shape, dtype=torch.bool),
            turn_ids=torch.zeros(shape, dtype=torch.int64),
        )
        with torch.no_grad():
            log_probs = self.log_prob(SEGMENT, segment, slice(None)).log_probs
        return replace(segment, rollout_log_probs=log_probs.cpu())

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Score recorded steps by fast-forward replay; one real denoiser evaluation per asked step."""
        assert name == SEGMENT, f"a masked-diffusion policy has no segment {name!r}"
        asked = range(*steps.indices(segment.rollout_log_probs.shape[1]))
        assert asked.step == 1 and len(asked), "windows are runs of steps"
        settings: Any = self._settings[False]
        prompts: Any = segment.actions["prompts"]
        templates: Any = segment.actions["templates"][0]
        states: Any = segment.actions["states"]
        samples: Any = None
        if settings.estimator != "trajectory":
            samples = segment.actions["samples"]
            asked = range(asked.start + 1, asked.stop + 1)  # the state of a mask is the one after the loop's step
        tape: Any = UnmaskReplay(states, asked, samples)
        bypass = bypassing(tape, templates, len(prompts)) if self._fast_forward else calling
        with self._pass(tape, bypass, prompts, settings, None), suppress(LoopLeft):
            self._call(prompts, settings)
        if len(tape.log_probs) != len(asked):
            raise UnsupportedPipelineError(
                f"{type(self._pipeline).__name__}: the replayed loop took another number of steps than sampling did"
            )
        if torch.is_grad_enabled():
            self._check_gradient(tape)
        log_probs: Tensor = torch.stack(tape.log_probs, dim=1)
        return StepStats(log_probs=log_probs, entropy=None, mean=None, std=None)

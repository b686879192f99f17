"""Measures the replay contract of one case: one instance of a class pays for every dimension."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.contract.pipelines.build import Case, Kernel, build, call_settings, picture
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.encoders import PICTURES, TEXT
from unified_rl.policies.savings import checkpoint_blocks
from unified_rl.recipe.policy import Adapter, DiffusionSampling, PolicyBlock
from unified_rl.types import Prompt, Segment

TEXTS = ("a red circle", "two blue square on the left")
NUM_STEPS = 3
TAKING_IN = (torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
OTHER = 100
"""Between the random numbers of a row and those of its negative prompt."""


@dataclass(frozen=True)
class Measured:
    """What replaying one rollout of full fine-tuning in float32 showed."""

    kernel: str
    num_steps: int
    gap: float
    """Largest |replayed - reported| log-prob at the rollout's batch shape."""
    row_gap: float
    """The same for one row alone, whose matrix shapes round differently: the first row, of the shorter text, at the
    first noisy step, and the last row at the last one."""
    rounding: float
    """How much a log-prob of a step that one row alone is tried on moves by float32's rounding of its mean:
    eps * |mean| / std, the mean over dims as in the log-prob. EDM schedules end at a std of 0.001."""
    smallest_gradient: float
    """Smallest gradient norm of a stochastic step, over the denoiser."""
    checkpointing_gap: float
    """Largest difference of a parameter's gradient with gradient checkpointing, over the gradient's norm."""
    encoded: frozenset[str]
    """Encoders of texts and pictures that the replays ran at the rollout's batch shape."""
    row_encoded: frozenset[str]
    """The same for one row alone."""


@dataclass(frozen=True)
class MeasuredLora:
    """What replaying one rollout of LoRA in bfloat16 showed."""

    gap: float
    """Largest |replayed - reported| log-prob at the rollout's batch shape."""
    gradient: float
    """Gradient norm over the adapters, at the first step."""
    others: int
    """Parameters with a gradient that are no adapters."""


def policy_of(
    case: Case,
    kernel: Kernel = "auto",
    *,
    lora: bool = False,
    pipeline: Any | None = None,
    noise_level: float = 0.7,
) -> DiffusionPolicy:
    """A policy over a fresh instance of the class, or over a `pipeline` that is used up.

    Args:
        lora: adapters on a bfloat16 pipeline, in place of full fine-tuning in float32.
    """
    kernel = case.kernel if kernel == "auto" else kernel
    sampling = DiffusionSampling(
        num_inference_steps=NUM_STEPS,
        noise_level=noise_level,
        kernel=kernel,
        call=call_settings(case),
        store_outputs=case.store_outputs,
    )
    block = PolicyBlock(
        model=case.name,
        family="diffusion",
        adapter=Adapter(kind="lora" if lora else "none", rank=2, targets=case.lora_targets),
        sampling=sampling,
    )
    pipeline = build(case) if pipeline is None else pipeline
    return DiffusionPolicy(pipeline.to(torch.bfloat16) if lora and case.half else pipeline, block)


def prompts_of(case: Case, dtype: torch.dtype = torch.float32) -> list[Prompt]:
    return [
        Prompt(
            text=case.text.replace("{}", text),
            images=tuple(picture(row + 10 * index, case.size) for index in range(case.images)),
            # What guides away from is another text than what guides.
            columns={
                key: _cast(make(row + OTHER * key.startswith("negative")), dtype) for key, make in case.columns.items()
            },
            group_id=row,
            seed=row,
        )
        for row, text in enumerate(TEXTS)
    ]


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _calls(case: Case, prompts: list[Prompt]) -> list[list[Prompt]]:
    return [prompts[start : start + case.rows] for start in range(0, len(prompts), case.rows)]


def _apart(segment: Segment, log_probs: Tensor, step: int) -> float:
    """Largest distance of replayed log-probs [B] of one step from the reported ones."""
    return float((log_probs.detach() - segment.rollout_log_probs[:, step]).abs().max())


def _gap(policy: DiffusionPolicy, segment: Segment, step: int) -> tuple[float, float]:
    """Distance of a replay without gradients, and what float32's rounding makes of it."""
    with torch.no_grad():
        stats = policy.log_prob("image", segment, slice(step, step + 1))
    rounding = torch.finfo(torch.float32).eps * stats.mean.abs().mean() / stats.std.min()
    return _apart(segment, stats.log_probs[:, 0], step), float(rounding)


def _stochastic(segment: Segment) -> list[int]:
    steps = segment.loss_mask[0].nonzero().flatten().tolist()
    assert steps, "no step is random"
    assert torch.isfinite(segment.rollout_log_probs).all()
    return steps


def _gradients(policy: DiffusionPolicy, segment: Segment, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    policy.module.zero_grad()
    log_probs = policy.log_prob("image", segment, slice(step, step + 1)).log_probs[:, 0]
    log_probs.sum().backward()
    named = policy.module.named_parameters()
    return log_probs.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def _norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.float().norm() for gradient in gradients.values()]).norm())


class Watch:
    """Notes which of a pipeline's frozen encoders run, by the layers that take in tokens and pixels: what stands before
    their forward runs none, and pipelines may call a last layer by itself."""

    def __init__(self, pipeline: Any) -> None:
        self.ran: set[str] = set()
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and (TEXT.fullmatch(name) or PICTURES.fullmatch(name)):
                for layer in (each for each in part.modules() if isinstance(each, TAKING_IN)):
                    layer.register_forward_pre_hook(lambda *_, name=name: self.ran.add(name))

    def taken(self) -> frozenset[str]:
        """Those that ran since it was last asked."""
        ran, self.ran = frozenset(self.ran), set()
        return ran


def measure(case: Case, kernel: Kernel = "auto", *, pipeline: Any | None = None) -> Measured:
    """Sample all rows, replay each step at the batch shape with gradients, and two with one row alone."""
    policy = policy_of(case, kernel, pipeline=pipeline)
    watch, encoded, row_encoded = Watch(policy._pipeline), frozenset[str](), frozenset[str]()
    gaps, row_gaps, norms = [], [(0.0, 0.0)], []
    for call in _calls(case, prompts_of(case)):
        segment = policy.sample(call).segments["image"]
        watch.taken()
        steps = _stochastic(segment)
        for step in steps:
            log_probs, gradients = _gradients(policy, segment, step)
            gaps.append(_apart(segment, log_probs, step))
            norms.append(_norm(gradients))
        encoded |= watch.taken()
        if len(call) > 1:
            for row, at in ((0, steps[0]), (len(call) - 1, steps[-1])):
                row_gaps.append(_gap(policy, segment.rows(slice(row, row + 1)), at))
            row_encoded |= watch.taken()
    for part in policy._denoisers.parts.values():
        checkpoint_blocks(part)
    _, again = _gradients(policy, segment, step)
    assert again.keys() == gradients.keys()
    for module in policy.module.modules():
        vars(module).pop("forward", None)  # the blocks' own again
    return Measured(
        kernel=policy._head.kernel,
        num_steps=segment.rollout_log_probs.shape[1],
        gap=max(gaps),
        row_gap=max(gap for gap, _ in row_gaps),
        rounding=max(rounding for _, rounding in row_gaps),
        smallest_gradient=min(norms),
        checkpointing_gap=max(float((again[name] - gradients[name]).norm()) for name in again) / norms[-1],
        encoded=encoded,
        row_encoded=row_encoded,
    )


def measure_lora(case: Case, *, pipeline: Any | None = None) -> MeasuredLora:
    """Sample all rows in bfloat16 with fresh adapters, replay the first random step at the batch shape without
    gradients and the last one with them."""
    policy = policy_of(case, lora=True, pipeline=pipeline)
    gaps = []
    for call in _calls(case, prompts_of(case, torch.bfloat16 if case.half else torch.float32)):
        segment = policy.sample(call).segments["image"]
        first, last = _stochastic(segment)[0], _stochastic(segment)[-1]
        log_probs, gradients = _gradients(policy, segment, last)
        gaps += [_apart(segment, log_probs, last), _gap(policy, segment, first)[0]]
    return MeasuredLora(gap=max(gaps), gradient=_norm(gradients), others=sum("lora_" not in name for name in gradients))


def measure_both(case: Case) -> tuple[Measured, MeasuredLora]:
    """Both, over the weights of one instance."""
    pipeline = build(case)
    return measure(case, pipeline=copy.copy(pipeline)), measure_lora(case, pipeline=pipeline)

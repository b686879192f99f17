"""Measures the replay contract of one case."""

from dataclasses import dataclass
from typing import Literal

import torch

from tests.contract.pipelines.build import Case, build, call_settings, picture
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.recipe_policy import Adapter, DiffusionSampling, PolicyBlock
from unified_rl.types import Prompt, Segment

TEXTS = ("a red circle", "two blue square on the left")
NUM_STEPS = 3
Kernel = Literal["auto", "flow_sde", "dance_sde", "cps", "ddim"]


@dataclass(frozen=True)
class Measured:
    """What replaying one rollout showed."""

    num_steps: int
    gap: float
    """Largest |replayed - reported| log-prob at the rollout's batch shape."""
    row_gap: float
    """The same for one row alone."""
    smallest_gradient: float
    """Smallest gradient norm of a stochastic step, over the denoiser."""


def policy_of(case: Case, kernel: Kernel = "auto") -> DiffusionPolicy:
    sampling = DiffusionSampling(
        num_inference_steps=NUM_STEPS, noise_level=0.7, kernel=kernel, call=call_settings(case)
    )
    block = PolicyBlock(model=case.name, family="diffusion", adapter=Adapter(), sampling=sampling)
    return DiffusionPolicy(build(case), block)


def prompts_of(case: Case) -> list[Prompt]:
    return [
        Prompt(
            text=text,
            images=tuple(picture(row + 10 * index, case.size) for index in range(case.images)),
            columns={key: make(row) for key, make in case.columns.items()},
            group_id=row,
            seed=row,
        )
        for row, text in enumerate(TEXTS)
    ]


def _gap(policy: DiffusionPolicy, segment: Segment, step: int) -> float:
    with torch.no_grad():
        scored = policy.log_prob("image", segment, slice(step, step + 1)).log_probs[:, 0]
    return float((scored - segment.rollout_log_probs[:, step]).abs().max())


def measure(case: Case, kernel: Kernel = "auto") -> Measured:
    """Sample two rows, replay each step with both rows and with the second alone, and take gradients."""
    policy = policy_of(case, kernel)
    segment = policy.sample(prompts_of(case)).segments["image"]
    num_steps = segment.rollout_log_probs.shape[1]
    stochastic = [step for step in range(num_steps) if segment.loss_mask[0, step]]
    assert stochastic, "no step is random"
    assert torch.isfinite(segment.rollout_log_probs).all()
    gaps, row_gaps, norms = [], [], []
    for step in stochastic:
        policy.module.zero_grad()
        stats = policy.log_prob("image", segment, slice(step, step + 1))
        gaps.append(float((stats.log_probs[:, 0] - segment.rollout_log_probs[:, step]).detach().abs().max()))
        row_gaps.append(_gap(policy, segment.rows(slice(1, 2)), step))
        stats.log_probs.sum().backward()
        norms.append(sum(float(p.grad.norm()) for p in policy.module.parameters() if p.grad is not None))
    return Measured(num_steps=num_steps, gap=max(gaps), row_gap=max(row_gaps), smallest_gradient=min(norms))

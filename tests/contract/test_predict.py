"""Predictions for finished samples that were noised again, through whole pipelines."""

from typing import Any

import pytest
import torch

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import policy_of, prompts_of
from unified_rl.policies.scheduler_head import UnsupportedPipelineError

BY_NAME = {case.name: case for case in CASES if case.refused is None}
NAMES = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
    "QwenImagePipeline", "PixArtSigmaPipeline", "SanaPipeline", "WanPipeline", "StableDiffusionControlNetPipeline",
]  # fmt: skip


@pytest.mark.parametrize("case", [BY_NAME[name] for name in NAMES], ids=lambda case: case.name)
def test_a_pipeline_predicts_at_every_level(case: Case):
    policy = policy_of(case)
    segment = policy.sample(prompts_of(case)).segments["image"]
    clean = torch.stack([row[-1] for row in segment.actions["states"]])
    num_levels = policy.num_levels("image", segment)
    assert num_levels == segment.rollout_log_probs.shape[1]
    levels = []
    for step in range(num_levels):
        policy.module.zero_grad()
        seen = policy.predict("image", segment, step, [5, 5])
        assert seen.output.shape == seen.target.shape == clean.shape
        levels.append(float(seen.level))
        (seen.output - seen.target).square().mean().backward()
        norm = sum(float(p.grad.norm()) for p in policy.module.parameters() if p.grad is not None)
        assert 0 < norm < float("inf")
        with torch.no_grad():
            alone = policy.predict("image", segment.rows(slice(1, 2)), step, [5])
            other = policy.predict("image", segment, step, [5, 6])
        torch.testing.assert_close(alone.output[0], seen.output[1].detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(other.target[0], seen.target[0]) and not torch.equal(other.target[1], seen.target[1])
        assert not torch.allclose(other.output[1], seen.output[1])
    assert levels == sorted(levels, reverse=True) and 0 < levels[-1] < levels[0] <= 1


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "StableDiffusionPipeline"])
def test_a_prediction_is_the_denoisers_own(name: str):
    """The denoiser, called by hand on the noised sample with the pipeline's arguments, gives the same; a perfect output
    is the target, and gives the clean sample."""
    policy = policy_of(BY_NAME[name])
    prompts = prompts_of(BY_NAME[name])
    segment = policy.sample(prompts).segments["image"]
    clean = torch.stack([row[-1] for row in segment.actions["states"]]).float()
    noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(5))] * 2)
    seen_inputs: list[Any] = []
    hook = policy.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen_inputs.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
        with_kwargs=True,
    )
    for step in (0, 2):
        seen_inputs.clear()
        seen = policy.predict("image", segment, step, [5, 5])
        level, flow = float(seen.level), name == "StableDiffusion3Pipeline"
        signal = 1 - level if flow else (1 - level**2) ** 0.5
        noised = signal * clean + level * noise
        torch.testing.assert_close(seen_inputs[-1][:2], noised, rtol=1e-5, atol=1e-5)
        perfect = noise - clean if flow else noise
        torch.testing.assert_close(seen.target, perfect)
        # Any output's clean sample, by the formula of its parametrisation.
        predicted = noised - level * seen.output if flow else (noised - level * seen.output) / signal
        torch.testing.assert_close(
            predicted - clean, seen.clean_scale * (seen.output - seen.target), atol=1e-4, rtol=1e-4
        )
    hook.remove()


def test_a_loop_that_changes_its_latents_is_refused():
    """Inpainting with a plain denoiser paints the kept part over the latents after every step."""
    case = BY_NAME["StableDiffusionInpaintPipeline"]
    policy = policy_of(case)
    segment = policy.sample(prompts_of(case)).segments["image"]
    with pytest.raises(UnsupportedPipelineError, match="changes its latents between two steps"):
        policy.predict("image", segment, 1, [1, 2])

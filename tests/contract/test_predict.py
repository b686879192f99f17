"""Predictions for finished samples that were noised again, and pictures with gradients, through whole pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_replay import diffusion_policy, image_prompts

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import policy_of, prompts_of
from unified_rl.policies.scheduler_head import UnsupportedPipelineError

BY_NAME = {case.name: case for case in CASES if case.refused is None}
NAMES = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
    "QwenImagePipeline", "SanaPipeline", "WanPipeline",
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


def test_a_prediction_of_v_is_what_its_scheduler_means(quickstart: Path):
    """Of the shipped UNet: signal * noise - level * clean; a clean sample is signal * noised - level * output."""
    policy = diffusion_policy(quickstart / "digits_unet")
    segment = policy.sample(image_prompts("a handwritten seven", 2)).segments["image"]
    clean = torch.stack([row[-1] for row in segment.actions["states"]]).float()
    noise = torch.stack(
        [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    )
    for step in (0, policy.num_levels("image", segment) - 1):
        with torch.no_grad():
            seen = policy.predict("image", segment, step, [5, 6])
        level = float(seen.level)
        signal = (1 - level**2) ** 0.5
        torch.testing.assert_close(seen.target, signal * noise - level * clean, atol=1e-5, rtol=1e-5)
        predicted = signal * (signal * clean + level * noise) - level * seen.output
        expected = clean + seen.clean_scale * (seen.output - seen.target)
        torch.testing.assert_close(predicted, expected, atol=1e-4, rtol=1e-4)
        # The trained model knows what it is asked: far nearer to the target than the target is to nothing.
        if step == 0:
            assert (seen.output - seen.target).square().mean() < 0.6 * seen.target.square().mean()


def test_a_loop_that_changes_its_latents_is_refused():
    """Inpainting with a plain denoiser paints the kept part over the latents after every step."""
    case = BY_NAME["StableDiffusionInpaintPipeline"]
    policy = policy_of(case)
    segment = policy.sample(prompts_of(case)).segments["image"]
    with pytest.raises(UnsupportedPipelineError, match="changes its latents between two steps"):
        policy.predict("image", segment, 1, [1, 2])


GRADIENT_NAMES = [
    "StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "SanaPipeline",
]  # fmt: skip


def gradient_norm(policy: Any) -> float:
    norm = sum(float(p.grad.norm()) for p in policy.module.parameters() if p.grad is not None)
    policy.module.zero_grad()
    return norm


@pytest.mark.parametrize("case", [BY_NAME[name] for name in GRADIENT_NAMES], ids=lambda case: case.name)
def test_pictures_with_gradients_are_the_rollouts(case: Case):
    policy = policy_of(case)
    trajectory = policy.sample(prompts_of(case))
    segment = trajectory.segments["image"]
    drawn = torch.stack([to_tensor(completion.images[0]) for completion in trajectory.completions])
    norms = []
    for first in (2, 1, 0):  # of three steps
        pictures = policy.sample_with_grad("image", segment, kind="last_steps", step=first, seeds=[5, 6])
        torch.testing.assert_close(pictures.detach(), drawn, atol=1 / 255, rtol=0.0)
        pictures.square().sum().backward()
        norms.append(gradient_norm(policy))
    assert all(0 < norm < float("inf") for norm in norms) and len({f"{norm:.4g}" for norm in norms}) == 3
    alone = policy.sample_with_grad("image", segment.rows(slice(1, 2)), kind="last_steps", step=1, seeds=[6])
    torch.testing.assert_close(alone[0], pictures[1], atol=1e-3, rtol=0.0)
    renoised = [policy.sample_with_grad("image", segment, kind="renoised", step=2, seeds=[5, seed]) for seed in (6, 7)]
    assert torch.equal(renoised[0][0], renoised[1][0]) and not torch.equal(renoised[0][1], renoised[1][1])
    for kind in ("renoised", "clean_prediction"):
        policy.sample_with_grad("image", segment, kind=kind, step=2, seeds=[5, 6]).square().sum().backward()
        assert 0 < gradient_norm(policy) < float("inf")


def to_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def test_a_clean_prediction_is_decoded_at_once():
    """Of the last step, which ends at the clean sample, it is that sample."""
    policy = policy_of(BY_NAME["StableDiffusion3Pipeline"])
    policy._settings = dict.fromkeys((False, True), policy._settings[False].model_copy(update={"noise_level": 0.0}))
    trajectory = policy.sample(prompts_of(BY_NAME["StableDiffusion3Pipeline"]))
    drawn = torch.stack([to_tensor(completion.images[0]) for completion in trajectory.completions])
    segment = trajectory.segments["image"]
    last, early = (
        policy.sample_with_grad("image", segment, kind="clean_prediction", step=step, seeds=[5, 6]).detach()
        for step in (2, 0)
    )
    torch.testing.assert_close(last, drawn, atol=1 / 255, rtol=0.0)
    assert (early - drawn).abs().max() > 0.01


def test_the_gradient_through_the_picture_is_the_difference_quotient():
    policy = policy_of(BY_NAME["StableDiffusion3Pipeline"])
    segment = policy.sample(prompts_of(BY_NAME["StableDiffusion3Pipeline"])).segments["image"]
    bias = policy.module.proj_out.bias
    weights = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def value(first: int) -> torch.Tensor:
        return (policy.sample_with_grad("image", segment, kind="last_steps", step=first, seeds=[5, 6]) * weights).sum()

    value(0).backward()
    slope, change, values = float(bias.grad.sum()), 2e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            bias += sign * change
        values.append(float(value(0).detach()))
        with torch.no_grad():
            bias -= sign * change
    assert slope == pytest.approx((values[0] - values[1]) / (2 * change), rel=0.03) and abs(slope) > 0.1

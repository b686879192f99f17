"""Recorded pictures as finished latents of any pipeline."""

import pytest
import torch
from PIL import Image

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import policy_of, prompts_of
from unified_rl.policies.latent_map import measure
from unified_rl.policies.scheduler_head import UnsupportedPipelineError
from unified_rl.types import Completion, Recorded

BY_NAME = {case.name: case for case in CASES if case.refused is None}
NAMES = ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline"]


def recorded(image: Image.Image) -> Recorded:
    return Recorded(completion=Completion(text=None, images=(image,)), token_ids=None, log_probs=None)


@pytest.mark.parametrize("case", [BY_NAME[name] for name in NAMES], ids=lambda case: case.name)
def test_latents_are_those_that_would_be_decoded_to_what_the_picture_is_encoded_to(case: Case):
    """The map and its inverse agree, and the recorded samples can be noised, predicted and decoded."""
    policy = policy_of(case)
    prompts = prompts_of(case)
    drawn = policy.sample(prompts)
    pictures = [recorded(completion.images[0]) for completion in drawn.completions]
    segment = policy.record(prompts, pictures).segments["image"]
    states = torch.stack(list(segment.actions["states"]))
    assert states[:, -1].shape == torch.stack([row[-1] for row in drawn.segments["image"].actions["states"]]).shape
    layout = policy._layout
    assert layout is not None
    finished = states[:, -1].flatten(1)
    decoded = (finished[:, layout.map.place] * layout.map.scale + layout.map.shift).reshape(
        2, *layout.map.decoded_shape
    )
    torch.testing.assert_close(layout.map.latents_of(decoded), states[:, -1], rtol=1e-4, atol=1e-4)
    seen: list[torch.Tensor] = []
    decode = policy._pipeline.vae.decode

    def spy(latents: torch.Tensor, *args, **kwargs):
        seen.append(latents)
        return decode(latents, *args, **kwargs)

    policy._pipeline.vae.decode = spy
    policy.sample_with_grad("image", segment, kind="renoised", step=2, seeds=[1, 2])
    assert seen[0].shape == decoded.shape
    outcome = policy.predict("image", segment, 1, [1, 2])
    assert outcome.output.requires_grad and not segment.loss_mask.any()


def test_a_map_by_hand():
    turned = measure(lambda latents: 2.0 * latents.transpose(1, 2).reshape(1, 6) + 0.5, (2, 3))
    latents = torch.arange(12.0).reshape(2, 2, 3)
    torch.testing.assert_close(turned.latents_of(2.0 * latents.transpose(1, 2).reshape(2, 6) + 0.5), latents)
    with pytest.raises(UnsupportedPipelineError, match="mixed before they are decoded"):
        measure(lambda latents: latents.flatten(1) + latents.flatten(1).flip(1), (2, 3))
    with pytest.raises(UnsupportedPipelineError, match="not the same numbers"):
        measure(lambda latents: latents.flatten(1)[:, :3], (2, 3))


def test_pictures_of_another_size_are_refused():
    policy = policy_of(BY_NAME["StableDiffusion3Pipeline"])
    prompts = prompts_of(BY_NAME["StableDiffusion3Pipeline"])
    with pytest.raises(UnsupportedPipelineError, match="a picture of 48 x 32 becomes latents"):
        policy.record(prompts, [recorded(Image.new("RGB", (48, 32)))] * 2)

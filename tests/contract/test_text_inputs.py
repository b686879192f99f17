"""What must never crash a run in its middle: picture tokens in completions, over-long prompts, broken pictures."""

import io

import pytest
import torch
from families.toolkit import LETTERS
from PIL import Image
from test_families import FAMILIES, SEEING, mixture, picture, policy_of, prompts

from unified_rl.errors import RecipeError
from unified_rl.types import Prompt


def asking(image: Image.Image | None) -> list[Prompt]:
    return [Prompt(text="what", images=() if image is None else (image,), columns={}, group_id=0, seed=0)]


@pytest.mark.parametrize("name", SEEING)
def test_a_picture_token_is_never_sampled(name: str):
    """Nearly uniform sampling never draws what stands for pictures in a prompt, so that scoring still counts right."""
    policy = policy_of(name, temperature=1000.0)
    rows = policy._inputs.prepare_all(prompts((1,), 1), policy._settings[False])
    letters = set(policy._tokenizer(LETTERS, add_special_tokens=False)["input_ids"])
    reserved = set(rows[0]["input_ids"].flatten().tolist()) - letters - set(policy._end_ids)
    assert reserved
    segment = policy.sample(prompts(mixture(FAMILIES[name]), group_size=20)).segments["text"]
    drawn = set(torch.cat(segment.actions["tokens"]).tolist())
    assert len(drawn) > 15 and not drawn & reserved
    assert max(drawn) < len(policy._tokenizer), "spare rows of the embedding are no tokens"


def test_an_over_long_prompt_is_refused():
    policy = policy_of("idefics3", max_prompt_tokens=12)
    with pytest.raises(RecipeError, match=r"policy\.sampling\.max_prompt_tokens: a prompt has \d+ tokens"):
        policy.sample(asking(picture(0)))
    policy.sample(asking(None))


def test_a_picture_that_breaks_off_is_refused():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "PNG")
    broken = Image.open(io.BytesIO(buffer.getvalue()[: len(buffer.getvalue()) // 2]))
    with pytest.raises(RecipeError, match="data: a picture cannot be read"):
        policy_of("llava").sample(asking(broken))


def test_a_picture_of_twenty_thousand_pixels_is_refused():
    with pytest.raises(RecipeError, match=r"data: a picture of 20000 x 8 pixels"):
        policy_of("llava").sample(asking(Image.new("RGB", (20_000, 8))))


def test_a_text_only_prompt_for_a_model_that_needs_pictures_is_refused():
    with pytest.raises(RecipeError, match="the processor refuses a prompt with 0 pictures"):
        policy_of("paligemma").sample(asking(None))

"""What must never crash a run in its middle: picture tokens in completions, over-long prompts, broken pictures."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families.toolkit import LETTERS
from PIL import Image
from test_families import FAMILIES, SEEING, mixture, picture, policy_of, prompts
from test_image_tokens import policy_of as drawing_policy
from transformers import AutoConfig

from unified_rl.errors import RecipeError
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.text_inputs import TextInputs
from unified_rl.policies.without_videos import load_processor
from unified_rl.recipe.policy import PolicyBlock, TextSampling, Think
from unified_rl.tiny import language
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


def test_a_processor_whose_video_half_needs_torchvision_does_the_rest(tmp_path: Path):
    _, whole = language.TWINS["Qwen2_5_VLForConditionalGeneration"]()
    whole.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())["video_processor"]
    assert settings["video_processor_type"] == "Qwen2VLVideoProcessor", "where torchvision is, videos work again"
    AutoConfig.for_model("qwen2_5_vl").save_pretrained(tmp_path)
    inputs = TextInputs(load_processor(str(tmp_path), None), pad_id=0)
    prompt = Prompt(text="what", images=(picture(0),), columns={}, group_id=0, seed=0)
    assert "pixel_values" in inputs.prepare(prompt, TextSampling())
    inputs = TextInputs(whole, pad_id=0)
    with pytest.raises(RecipeError, match=r"data: the column video, but Qwen2_5_VLProcessor .* install"):
        inputs.prepare(replace(prompt, columns={"video": [picture(0), picture(1)]}), TextSampling())


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "CLIPModel"])
def test_a_model_that_is_no_generating_decoder_is_refused_before_it_loads(kind: str, tmp_path: Path):
    AutoConfig.for_model({"T": "t5", "C": "clip"}[kind[0]], architectures=[kind]).save_pretrained(tmp_path)
    block = PolicyBlock(model=str(tmp_path), family="causal_lm", sampling=TextSampling())
    settings = {"with_reference": False, "entropy_gradient": False, "device": torch.device("cpu")}
    with pytest.raises(RecipeError, match=f"policy.model: {kind} is no decoder that transformers generates with"):
        CausalLMPolicy.load(block, evaluation=TextSampling(), **settings)


def test_which_prompts_are_refused_is_known_beforehand():
    """By every family of tokens, with the error of sampling."""
    drawing = {"guidance_scale": 1.0, "max_prompt_tokens": 12}
    thinking = {**drawing, "think": Think(max_prompt_tokens=12)}
    for policy in (
        policy_of("llama", max_prompt_tokens=12),
        drawing_policy("janus", **drawing),
        drawing_policy("janus", **thinking),
    ):
        policy.check(asking(None)[0])
        long = replace(asking(None)[0], text="what is it, and where is it")
        with pytest.raises(RecipeError, match=r"policy\.sampling\.max_prompt_tokens: a prompt has \d+ tokens"):
            policy.check(long)
        with pytest.raises(RecipeError, match=r"policy\.sampling\.max_prompt_tokens: a prompt has \d+ tokens"):
            policy.sample([long])

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
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

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
    reserved = set(rows[0]["input_ids"].flatten().tolist()) - letters - set(policy._words.ends)
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


def test_an_encoder_that_is_said_to_generate_is_refused():
    """transformers counts BERT among its causal language models."""
    words = FAMILIES["llama"].build()[1]
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = AutoModelForCausalLM.from_config(config)
    policy = CausalLMPolicy(model, words, PolicyBlock(model="", family="causal_lm", sampling=TextSampling()))
    with pytest.raises(RecipeError, match=r"policy\.model: BertLMHeadModel gave no cache, as encoders do"):
        policy.sample(asking(None))


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


def chat(*contents: str | list, roles: str = "sua") -> list[dict]:
    named = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": named[role], "content": content} for role, content in zip(roles, contents, strict=False)]


LISTS_ONLY = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% if not think %}.{% endif %}{% endif %}"
)
"""As SmolVLM's: it would drop a plain string, a letter at a time."""


def seeing_inputs() -> TextInputs:
    _, processor = FAMILIES["idefics3"].build()
    processor.chat_template = LISTS_ONLY
    return TextInputs(processor, pad_id=0)


@pytest.mark.parametrize(
    ("messages", "num_pictures", "expected"),
    [
        (chat("be brief", "what"), 0, "[system]be brief[user]what[assistant]."),
        (chat("be brief", "what"), 2, "[system]be brief[user]<image><image>what[assistant]."),
        (chat("s", [{"type": "text", "text": "a "}, {"type": "image"}]), 1, "[system]s[user]a <image>[assistant]."),
        (chat("s", "what", "it is"), 1, "[system]s[user]<image>what[assistant]it is"),
        (chat("what", "a dog", "where", roles="uau"), 1, "[user]<image>what[assistant]a dog[user]where[assistant]."),
    ],
)
def test_chats_of_plain_texts_and_of_parts_are_rendered_alike(messages: list, num_pictures: int, expected: str):
    """With a system prompt, several turns, pictures that no part stands for, a reply that is begun."""
    prompt = Prompt(text=messages, images=(picture(0),) * num_pictures, columns={}, group_id=0, seed=0)
    assert seeing_inputs().render(prompt, TextSampling()) == (expected, True)
    assert "pixel_values" in seeing_inputs().prepare(prompt, TextSampling()) or not num_pictures


def test_a_template_is_told_what_the_recipe_says():
    prompt = asking(None)[0]
    assert seeing_inputs().render(prompt, TextSampling(chat_template_arguments={"think": True}))[0].endswith("stant]")
    with pytest.raises(
        RecipeError, match=r"policy\.sampling\.chat_template_arguments\.thnik: the model's template has"
    ):
        seeing_inputs().render(prompt, TextSampling(chat_template_arguments={"thnik": True}))


def test_a_chat_that_a_template_refuses_is_one_line():
    inputs = seeing_inputs()
    inputs.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RecipeError, match="data: the chat template refuses a prompt: roles must alternate"):
        inputs.prepare(asking(None)[0], TextSampling())


def test_pictures_for_a_model_without_eyes_are_refused():
    with pytest.raises(RecipeError, match=r"data: a prompt has pictures, but .* takes texts only"):
        policy_of("llama").sample(asking(picture(0)))


def with_ends(**sampling: list[str]) -> CausalLMPolicy:
    """Draws nearly uniformly; its generation config names one end token, its tokenizer another."""
    model, words = FAMILIES["llama"].build()
    words.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|channel|>"]})
    model.generation_config.eos_token_id = words.convert_tokens_to_ids("a")
    words.eos_token = "b"
    block = PolicyBlock(
        model="", family="causal_lm", sampling=TextSampling(max_new_tokens=40, temperature=1000.0, **sampling)
    )
    return CausalLMPolicy(model, words, block)


def test_a_text_ends_with_any_end_token_and_special_tokens_are_drawn_where_the_recipe_says():
    batch = [replace(asking(None)[0], seed=seed) for seed in range(40)]
    ends, drawn = {}, {}
    for name, keys in {
        "plain": {},
        "more": {"end_tokens": ["<|turn|>"], "special_tokens": ["<|channel|>"]},
    }.items():
        policy = with_ends(**keys)
        trajectory = policy.sample(batch)
        segment, words = trajectory.segments["text"], policy._tokenizer
        rows = [words.convert_ids_to_tokens(row.tolist()) for row in segment.actions["tokens"]]
        ends[name] = {row[-1] for row, each in zip(rows, trajectory.completions, strict=True) if not each.truncated}
        drawn[name] = {token for row in rows for token in row}
        with torch.no_grad():
            gap = policy.log_prob("text", segment, slice(None)).log_probs - segment.rollout_log_probs
        assert gap.abs().max() <= 1e-4
        told = [each.text for each in trajectory.completions]
        assert any("<|channel|>" in text for text in told) == (name == "more")
        assert not any("<|turn|>" in text for text in told)
    assert ends == {"plain": {"a", "b"}, "more": {"a", "b", "<|turn|>"}}
    assert drawn["more"] - drawn["plain"] == {"<|turn|>", "<|channel|>"}


def test_tokens_that_a_recipe_misnames_are_refused():
    with pytest.raises(
        RecipeError, match=r"policy\.sampling\.end_tokens: '<\|trun\|>' is no token.*did you mean '<\|turn"
    ):
        with_ends(end_tokens=["<|trun|>"])
    model, processor = FAMILIES["idefics3"].build()
    block = PolicyBlock(model="", family="causal_lm", sampling=TextSampling(special_tokens=["<image>"]))
    with pytest.raises(RecipeError, match=r"policy\.sampling\.special_tokens: <image> stands for pictures"):
        CausalLMPolicy(model, processor, block)
    with pytest.raises(RecipeError, match=r"evaluation\.sampling\.end_tokens: must be as under policy\.sampling"):
        block = PolicyBlock(model="", family="causal_lm", sampling=TextSampling())
        CausalLMPolicy(model, processor, block, evaluation=TextSampling(end_tokens=["a"]))

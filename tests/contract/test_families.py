"""Architectures of transformers behind one policy: samples, scores, gradients, mixed batches, one prefill a group."""

import copy
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from families import text, vision
from families.toolkit import Family
from PIL import Image
from torch.nn import Conv2d, Conv3d
from transformers import PreTrainedModel

from unified_rl.errors import RecipeError
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.frozen_tower import find_towers
from unified_rl.recipe.policy import Adapter, PolicyBlock, TextSampling
from unified_rl.types import Prompt

FAMILIES: dict[str, Family] = {**text.FAMILIES, **vision.FAMILIES}
SEEING = [name for name, family in FAMILIES.items() if family.pictures]
TOLERANCE = 1e-4
QUESTIONS = ("what is it?", "where", "is it here, or is it there?")
WARPERS = [{"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8, "temperature": 1.3}, {"min_p": 0.6}]


@cache
def built(name: str) -> tuple:
    torch.manual_seed(0)
    model, processor = FAMILIES[name].build()
    # Fresh weights give a flat distribution whatever the input is; larger ones make every input count.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    # Many end tokens, none of them special: completions of ragged lengths.
    words = getattr(processor, "tokenizer", processor)
    special = {token for token, added in words.added_tokens_decoder.items() if added.special}
    model.generation_config.eos_token_id = [3, *(set(range(4, len(words), 7)) - special)]
    return model, processor


def policy_of(name: str, *, adapter: bool = False, train: list[str] | None = None, **sampling: float) -> CausalLMPolicy:
    model, processor = copy.deepcopy(built(name)[0]), built(name)[1]
    block = PolicyBlock(
        model=name,
        family="causal_lm",
        adapter=Adapter(kind="lora" if adapter else "none", rank=2),
        train=train,
        sampling=TextSampling(max_new_tokens=10, **sampling),
    )
    return CausalLMPolicy(model, processor, block)


def picture(number: int) -> Image.Image:
    """Two tones, of a width of its own, so that pictures differ in patches and tiles."""
    image = Image.new("RGB", (56 + 28 * (number % 2), 56), (40 * number % 255, 90, 200 - 30 * number))
    image.paste((250, 250, 10 * number), (0, 0, 9, 12))
    return image


def prompts(counts: tuple[int, ...], group_size: int = 3) -> list[Prompt]:
    """Groups of prompts of different lengths, the first with `counts[0]` pictures, and so on."""
    rows = []
    for group, count in enumerate(counts):
        images = tuple(picture(group + number) for number in range(count))
        rows += [
            Prompt(text=QUESTIONS[group % 3], images=images, columns={}, group_id=group, seed=100 * group + member)
            for member in range(group_size)
        ]
    return rows


def mixture(family: Family) -> tuple[int, ...]:
    """Pictures of each group: one, none and several in one batch where the family can."""
    if not family.pictures:
        return (0, 0, 0)
    return (1, 0 if family.text_rows else 1, family.pictures)


@pytest.mark.parametrize("name", FAMILIES)
def test_scoring_gives_the_log_probs_of_the_rollout(name: str):
    policy = policy_of(name)
    segment = policy.sample(prompts(mixture(FAMILIES[name]))).segments["text"]
    lengths = {len(tokens) for tokens in segment.actions["tokens"]}
    assert len(lengths) > 1, "ragged completions"
    for rows in (slice(0, 9), slice(2, 5), slice(4, 5)):
        part = segment.rows(rows)
        stats = policy.log_prob("text", part, slice(None))
        assert (stats.log_probs - part.rollout_log_probs).abs().max() <= TOLERANCE
        assert (stats.log_probs[~part.loss_mask] == 0).all()


def tower(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that belong to the vision encoder, found by the class of its configuration."""
    if not hasattr(model.config, "vision_config"):
        return set()
    kind = type(model.config.vision_config)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and isinstance(module.config, kind)
    ]
    assert found
    return {name for name, _ in model.named_parameters() if any(name.startswith(f"{top}.") for top in found)}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_everything_but_the_vision_tower(name: str, adapter: bool):
    if adapter and name == "mamba":
        pytest.skip("no attention: the adapter's targets must be named")
    policy = policy_of(name, adapter=adapter)
    segment = policy.sample(prompts(mixture(FAMILIES[name]))).segments["text"]
    policy.module.zero_grad()
    policy.log_prob("text", segment, slice(None)).log_probs.sum().backward()
    frozen = tower(policy.module)
    assert bool(frozen) == bool(FAMILIES[name].pictures)
    reached = set()
    for parameter_name, parameter in policy.module.named_parameters():
        expected = ".lora_" in parameter_name if adapter else parameter_name not in frozen
        assert parameter.requires_grad == expected, parameter_name
        if parameter.grad is not None:
            assert parameter.requires_grad and parameter.grad.isfinite().all()
            if parameter.grad.any():
                reached.add(parameter_name)
    assert len(reached) >= 2, reached  # a fresh adapter's first factor has no gradient yet
    if not adapter and FAMILIES[name].pictures:
        assert any(re.search("project|connector|merger|aligner|adapter|resampler", n) for n in reached - frozen) or (
            "merger" in " ".join(frozen)
        ), "pictures are connected to the language model by trained weights"


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "idefics3", "gemma3"])
def test_low_precision_stays_within_its_rounding(name: str):
    """bfloat16 has 8 bits: logits of size 4 are rounded to 2^-6, and decoding rounds otherwise than teacher forcing."""
    policy = policy_of(name)
    policy.module.to(torch.bfloat16)
    segment = policy.sample(prompts(mixture(FAMILIES[name]))).segments["text"]
    stats = policy.log_prob("text", segment, slice(None))
    gap = (stats.log_probs - segment.rollout_log_probs).abs()[segment.loss_mask]
    assert stats.log_probs.dtype == torch.float32
    assert gap.mean() <= 0.02 and gap.max() <= 0.25, gap.max()


@pytest.mark.parametrize("name", SEEING)
def test_a_picture_may_stand_closer_to_the_end_than_the_completion_is_long(name: str):
    """Token types of a completion are text, also where the prompt's last tokens are a picture's."""
    policy = policy_of(name)
    segment = policy.sample(prompts((1, 1, 1))).segments["text"]
    stats = policy.log_prob("text", segment, slice(None))
    assert (stats.log_probs - segment.rollout_log_probs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_group_shares_its_prefill_and_gets_the_same_samples(name: str):
    family = FAMILIES[name]
    policy = policy_of(name)
    assert policy.shares_prefill == family.shares_prefill
    batch = prompts(mixture(family))
    shared = policy.sample(batch).segments["text"]
    policy.shares_prefill = False
    plain = policy.sample(batch).segments["text"]
    for ours, theirs in zip(shared.actions["tokens"], plain.actions["tokens"], strict=True):
        assert torch.equal(ours, theirs)
    assert (shared.rollout_log_probs - plain.rollout_log_probs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.shares_prefill])
def test_a_group_shares_its_prompt_in_scoring_and_gets_the_same_gradients(name: str):
    """Also where a window holds parts of groups, and completions of one token."""
    policy = policy_of(name)
    segment = policy.sample(prompts(mixture(FAMILIES[name]))).segments["text"]
    coefficients = torch.randn(segment.rollout_log_probs.shape, generator=torch.Generator().manual_seed(1))
    for rows, limit in ((slice(0, 9), None), (slice(2, 6), None), (slice(0, 3), 1)):
        part = segment.rows(rows)
        if limit is not None:
            part = replace(part, actions={**part.actions, "tokens": [row[:limit] for row in part.actions["tokens"]]})
        found = []
        for shares in (True, False):
            policy.shares_prefill = shares
            policy.module.zero_grad()
            log_probs = policy.log_prob("text", part, slice(None)).log_probs
            (log_probs * coefficients[rows]).sum().backward()
            gradients = [parameter.grad for parameter in policy.module.parameters() if parameter.grad is not None]
            found.append((log_probs.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
        (shared, shared_gradient), (plain, plain_gradient) = found
        assert (shared - plain).abs().max() <= TOLERANCE
        assert (shared_gradient - plain_gradient).norm() <= 1e-4 * plain_gradient.norm()


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3", "gemma3"])
def test_scoring_computes_each_prompt_once_and_logits_of_completions_only(name: str):
    policy = policy_of(name)
    segment = policy.sample(prompts((1, 1), group_size=4)).segments["text"]
    embedded: list[int] = []
    scored: list[int] = []
    hook = policy.module.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output.shape[:2].numel())
    )
    policy.module.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: scored.append(output.shape[:2].numel())
    )
    policy.log_prob("text", segment, slice(None))
    policy.shares_prefill = False
    policy.log_prob("text", segment, slice(None))
    hook.remove()
    longest, num_steps = max(len(row["input_ids"][0]) for row in segment.actions["inputs"]), segment.loss_mask.shape[1]
    assert embedded == [2 * longest, 8 * (num_steps - 1), 8 * (longest + num_steps)]
    assert scored == [2, 8 * (num_steps - 1), 8 * (num_steps + 1)]


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3", "mllama"])
def test_a_prefill_sees_each_picture_once_and_finished_rows_leave(name: str):
    policy = policy_of(name)
    batches: list[tuple[int, int]] = []
    head = policy.module.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, inputs, _output: batches.append(inputs[0].shape[:2]))
    segment = policy.sample(prompts((1, 1), group_size=4)).segments["text"]
    hook.remove()
    alive = [8, *segment.loss_mask.sum(0).tolist()[1:]]
    assert batches[0][0] == 2, "two prompts"
    assert [rows for rows, _ in batches[1:]] == alive[1:]
    assert alive[-1] < 8


@pytest.mark.parametrize("name", SEEING)
def test_a_frozen_tower_runs_once_for_all_scoring_forwards(name: str):
    policy = policy_of(name, adapter=True)
    runs = []
    for layer in find_towers(policy.module)[0].modules():
        if not list(layer.children()) and list(layer.parameters()):
            layer.register_forward_hook(lambda *_: runs.append(1))
    segment = policy.sample(prompts(mixture(FAMILIES[name]))).segments["text"]
    once = len(runs)
    with policy.reference():
        first = policy.log_prob("text", segment, slice(None))
        assert first.entropy is None, "nothing uses the reference's entropy"
    again = policy.log_prob("text", segment, slice(None))
    assert once and len(runs) == once, "the rollout's features serve all scoring forwards"
    torch.testing.assert_close(again.log_probs, first.log_probs, rtol=0, atol=1e-6)
    if name in ("idefics3", "gemma3", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"):
        part = policy.log_prob("text", segment.rows(slice(0, 2)), slice(None))
        assert len(runs) == once, "kept picture by picture: other batches of the same pictures find them"
        torch.testing.assert_close(part.log_probs, again.log_probs[:2], rtol=0, atol=TOLERANCE)
    other = policy.sample(prompts((1,) * 5)).segments["text"]
    assert len(runs) > once, "other pictures are looked at"
    stats = policy.log_prob("text", other, slice(None))
    assert (stats.log_probs - other.rollout_log_probs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", SEEING)
def test_pictures_change_what_is_said(name: str):
    """A policy that lost the pictures on its way to the model would pass every test of equality."""
    policy = policy_of(name)
    batch = prompts((1,), group_size=2)
    other = [replace(prompt, images=(picture(5),)) for prompt in batch]
    rows = policy.sample(batch).segments["text"]
    seen = policy._inputs.prepare_all(other, policy._settings[False])
    swapped = replace(rows, actions={**rows.actions, "inputs": seen})
    changed = policy.log_prob("text", swapped, slice(None)).log_probs - rows.rollout_log_probs
    assert changed.abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "gemma3"])
def test_a_trained_tower_runs_once_for_a_group_and_gets_the_same_gradient(name: str):
    """Its features are computed with gradients, once for the rows that share the picture."""
    policy = policy_of(name, train=[".*"])
    segment = policy.sample(prompts((1, 1), group_size=4)).segments["text"]
    coefficients = torch.randn(segment.rollout_log_probs.shape, generator=torch.Generator().manual_seed(1))
    seen: list[int] = []
    layer = next(each for each in find_towers(policy.module)[0].modules() if isinstance(each, (Conv2d, Conv3d)))
    layer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].numel()))
    gradients = []
    for shares in (True, False):
        policy.shares_prefill = shares
        policy.module.zero_grad()
        (policy.log_prob("text", segment, slice(None)).log_probs * coefficients).sum().backward()
        parts = [(key, each.grad) for key, each in policy.module.named_parameters() if each.grad is not None]
        gradients.append(torch.cat([gradient.flatten() for key, gradient in parts if key in tower(policy.module)]))
    assert seen == [seen[0], 4 * seen[0]], "two pictures, not eight"
    assert gradients[0].any() and (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_5_vl", "idefics3", "gemma3"])
def test_the_side_that_a_tokenizer_pads_on_does_not_matter(name: str):
    """Checkpoints ship with either; rows of other lengths stand beside each other."""
    drawn = []
    for side in ("left", "right"):
        policy = policy_of(name)
        processor = copy.deepcopy(policy._processor)
        getattr(processor, "tokenizer", processor).padding_side = side
        model = copy.deepcopy(built(name)[0])
        drawn.append(
            CausalLMPolicy(model, processor, policy._block).sample(prompts(mixture(FAMILIES[name]))).segments["text"]
        )
    assert torch.equal(drawn[0].rollout_log_probs, drawn[1].rollout_log_probs)
    assert len({row["input_ids"].shape[1] for row in drawn[0].actions["inputs"]}) > 1


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos_are_seen_and_shared_like_pictures(name: str):
    """Groups with a video, with a picture, and with neither, in one batch."""
    policy = policy_of(name)
    frames = [picture(number).resize((56, 56)) for number in range(4)]
    batch = prompts((0, 1, 0))
    batch[:3] = [replace(prompt, columns={"video": frames}) for prompt in batch[:3]]
    segment = policy.sample(batch).segments["text"]
    assert "pixel_values_videos" in segment.actions["inputs"][0] and "pixel_values" in segment.actions["inputs"][3]
    stats = policy.log_prob("text", segment, slice(None))
    assert (stats.log_probs - segment.rollout_log_probs).abs().max() <= TOLERANCE
    backwards = [replace(prompt, columns={"video": frames[::-1]}) for prompt in batch[:3]]
    seen = policy._inputs.prepare_all(backwards, policy._settings[False])
    swapped = replace(segment.rows(slice(0, 3)), actions={**segment.rows(slice(0, 3)).actions, "inputs": seen})
    changed = policy.log_prob("text", swapped, slice(None)).log_probs - segment.rollout_log_probs[:3]
    assert changed.abs().max() > 10 * TOLERANCE, "the order of frames counts"


def test_a_video_for_a_model_without_videos_is_refused():
    policy = policy_of("idefics3")
    batch = [replace(prompt, columns={"video": [picture(0)]}) for prompt in prompts((1,))]
    with pytest.raises(RecipeError, match=r"data: the column video, but .* takes no videos"):
        policy.sample(batch)


@pytest.mark.parametrize("sampling", WARPERS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen2_5_vl", "idefics3", "gemma3", "mllama"])
def test_scoring_under_the_sampling_recipe(name: str, sampling: dict):
    policy = policy_of(name, **sampling)
    segment = policy.sample(prompts(mixture(FAMILIES[name]))).segments["text"]
    stats = policy.log_prob("text", segment, slice(None))
    assert (stats.log_probs - segment.rollout_log_probs).abs().max() <= TOLERANCE
    policy._settings[False] = TextSampling(max_new_tokens=10)
    plain = policy.log_prob("text", segment, slice(None)).log_probs
    assert (plain - segment.rollout_log_probs).abs().max() > 10 * TOLERANCE, "the recipe is what was sampled from"

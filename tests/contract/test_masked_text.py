"""Text denoisers: what LLaDA2's and DiffusionGemma's loops draw scores as it was drawn, whatever the batch."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    PreTrainedTokenizerFast,
)

from unified_rl.errors import RecipeError
from unified_rl.policies.masked_text import SEGMENT, MaskedTextPolicy
from unified_rl.policies.scheduler_head import UnsupportedPipelineError
from unified_rl.recipe.policy import Adapter, MaskedTextSampling, PolicyBlock
from unified_rl.types import Prompt

WORDS = ["[PAD]", "[MASK]", "[END]", "[UNK]", *"abcdefghij"]
MASK, END = 1, 2
TOLERANCE = 1e-5
NEW = 7
"""No multiple of the block: the last one reaches beyond the text."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[END]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


@cache
def built(kind: str) -> Any:
    """A tiny random model: a bidirectional one of one sequence, or an encoder with a decoder of canvases."""
    torch.manual_seed(0)
    if kind == "masked":
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32,
        )  # fmt: skip
        model: Any = BertForMaskedLM(config)
    else:
        text = {
            "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "global_head_dim": 8, "num_experts": 2, "top_k_experts": 1, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 64,
        }  # fmt: skip
        vision = {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
        }  # fmt: skip
        tokens = {"boi_token_id": None, "eoi_token_id": None, "image_token_id": None}
        config = DiffusionGemmaConfig(canvas_length=4, text_config=text, vision_config=vision, **tokens)
        model = DiffusionGemmaForBlockDiffusion(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "vision" not in name:
            parameter.data.mul_(8)  # so that the context matters
    return model.eval()


def policy_of(kind: str, *, adapter: bool = False, with_reference: bool = False, **sampling: Any) -> MaskedTextPolicy:
    settings = {"max_new_tokens": NEW, "block_length": 4, "num_inference_steps": 3, "threshold": 0.5, **sampling}
    block = PolicyBlock(
        model=kind,
        family="masked_text",
        adapter=Adapter(kind="lora" if adapter else "none", rank=2),
        sampling=MaskedTextSampling(**settings),
    )
    return MaskedTextPolicy(copy.deepcopy(built(kind)), tokenizer(), block, with_reference=with_reference)


def prompts(num: int = 9) -> list[Prompt]:
    """Of lengths 1, 3 and 2: they end at different places of a block."""
    texts = ["a", "b c d", "a a"]
    return [Prompt(text=texts[row % 3], images=(), columns={}, group_id=row % 3, seed=row) for row in range(num)]


SETTINGS = [
    ("masked", {}),
    ("masked", {"temperature": 0.7, "top_k": 4, "editing_threshold": 0.3}),
    ("masked", {"estimator": "random_mask", "top_p": 0.9}),
    ("masked", {"estimator": "coupled_mask"}),
    ("canvas", {}),
    ("canvas", {"temperature": 0.7, "top_k": 4, "editing_threshold": 0.5}),
    ("canvas", {"estimator": "coupled_mask"}),
]


@pytest.mark.parametrize(("kind", "sampling"), SETTINGS, ids=lambda value: str(value))
def test_replay_gives_the_log_probs_of_the_rollout(kind: str, sampling: dict):
    policy = policy_of(kind, **sampling)
    segment = policy.sample(prompts()).segments[SEGMENT]
    assert segment.rollout_log_probs.shape == (9, policy.max_steps[SEGMENT])
    assert segment.loss_mask[:, 0].all() and (segment.rollout_log_probs[segment.loss_mask] < 0).all()
    exam = policy.sample(prompts(), evaluation=True)
    assert [one.text for one in exam.completions] == [one.text for one in policy.sample(prompts()).completions]
    for rows in ([*range(9)], [5, 0, 7], [4]):
        part = segment.rows(rows)
        together = policy.log_prob(SEGMENT, part, slice(None)).log_probs
        assert (together - part.rollout_log_probs).abs().max() <= TOLERANCE
    for step in (0, 1, policy.max_steps[SEGMENT] - 1):
        policy.module.zero_grad()
        policy.log_prob(SEGMENT, segment, slice(step, step + 1)).log_probs.sum().backward()
        norms = [p.grad.norm() for p in policy.module.parameters() if p.grad is not None]
        assert (float(torch.stack(norms).sum()) > 0) == bool(segment.loss_mask[:, step].any())


@pytest.mark.parametrize(("kind", "sampling"), [SETTINGS[1], SETTINGS[5]], ids=["masked", "canvas"])
def test_a_row_does_not_depend_on_its_batch(kind: str, sampling: dict):
    """Rows end in different steps, and edits go on until no token changes: each row has its own end."""
    policy = policy_of(kind, **sampling)
    together = policy.sample(prompts())
    segment = together.segments[SEGMENT]
    assert len(set(segment.loss_mask.sum(1).tolist())) > 1 and len({one.truncated for one in together.completions}) == 2
    for row, prompt in enumerate(prompts()):
        alone = policy.sample([prompt])
        assert alone.completions[0] == together.completions[row]
        part = alone.segments[SEGMENT]
        assert torch.equal(part.loss_mask[0], segment.loss_mask[row])
        assert torch.allclose(part.rollout_log_probs[0], segment.rollout_log_probs[row], atol=TOLERANCE)


@pytest.mark.parametrize("editing", [None, 0.3])
def test_a_row_is_what_the_pipeline_gives_with_its_random_numbers(editing: float | None):
    policy = policy_of("masked", editing_threshold=editing)
    model = copy.deepcopy(built("masked"))
    with torch.no_grad():  # what the policy never draws
        model.cls.predictions.bias[[0, MASK, 3]] = -1e9
    pipeline = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    for prompt in prompts(6):
        states = policy.sample([prompt]).segments[SEGMENT].actions
        expected = pipeline(
            input_ids=tokenizer()(prompt.text, return_tensors="pt")["input_ids"],
            gen_length=NEW, block_length=4, num_inference_steps=3, threshold=0.5, editing_threshold=editing,
            temperature=1.0, eos_token_id=END, mask_token_id=MASK, output_type="seq",
            generator=torch.Generator().manual_seed(prompt.seed * 2 + 1),
        ).sequences  # fmt: skip
        assert torch.equal(states["sequences"][0][-NEW:], expected[0])


def test_every_token_is_scored_once_in_the_state_in_which_it_was_drawn():
    """By hand, from the model itself: of the whole sequence up to the end of the block."""
    policy = policy_of("masked", threshold=1.1)
    segment = policy.sample(prompts(3)).segments[SEGMENT]
    suppressed = [0, MASK, 3]
    for row, prompt in enumerate(prompts(3)):
        ids = tokenizer()(prompt.text)["input_ids"]
        limit, sequence = len(ids) + NEW, segment.actions["sequences"][row]
        counts = torch.zeros(12)
        for step, state in enumerate(segment.actions["states"][row]):
            known = torch.cat([sequence[: state.start], state.before])
            seen = (torch.arange(len(known)) < limit).long()[None]
            with torch.no_grad():
                logits = policy.module(known[None], attention_mask=seen).logits[0, state.start :]
            logits[:, suppressed] = -torch.inf
            chosen = logits.log_softmax(-1)[torch.arange(4), state.drawn]
            assert torch.allclose(chosen[state.scored].sum(), segment.rollout_log_probs[row, step], atol=1e-5)
            counts[state.start : state.start + 4] += state.scored
        end = len(sequence) if END not in sequence[len(ids) :] else sequence.tolist().index(END, len(ids)) + 1
        assert (counts[len(ids) : end] == 1).all() and not counts[: len(ids)].any() and not counts[limit:].any()


@pytest.mark.parametrize("kind", ["masked", "canvas"])
def test_coupled_masks_score_every_token_once(kind: str):
    policy = policy_of(kind, estimator="coupled_mask", num_masks=1)
    segment = policy.sample(prompts()).segments[SEGMENT]
    for (first, second), limit in zip(segment.actions["states"], segment.actions["limits"], strict=True):
        scored = first.scored.int() + second.scored.int()
        end = first.drawn.tolist().index(END) + 1 if END in first.drawn else limit - first.start
        assert (scored[:end] == 1).all() and not scored[end:].any()
        assert torch.equal(first.before[~first.scored], first.drawn[~first.scored])
        assert kind == "canvas" or (first.before[first.scored] == MASK).all()


def test_the_canvas_is_told_of_its_former_prediction():
    """The first step of a canvas knows nothing; later ones score as drawn only with what was recorded."""
    policy = policy_of("canvas")
    segment = policy.sample(prompts(3)).segments[SEGMENT]
    first, second = segment.actions["states"][0][:2]
    assert not first.signal.any() and second.signal.abs().max() > 0
    with torch.no_grad():
        known = policy.log_prob(SEGMENT, segment, slice(1, 2)).log_probs
        second.signal.zero_()
        unknown = policy.log_prob(SEGMENT, segment, slice(1, 2)).log_probs
    assert (known - unknown)[0].abs() > 1e-3 and torch.equal(known[1:], unknown[1:])


@pytest.mark.parametrize("kind", ["masked", "canvas"])
def test_adapter_reference_and_files(kind: str, tmp_path: Path):
    policy = policy_of(kind, adapter=True)
    segment = policy.sample(prompts(3)).segments[SEGMENT]
    policy.log_prob(SEGMENT, segment, slice(0, 1)).log_probs.sum().backward()
    trained = {name for name, parameter in policy.module.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if name in trained:
                parameter.normal_()
        moved = policy.log_prob(SEGMENT, segment, slice(0, 1)).log_probs
        with policy.reference():
            still = policy.log_prob(SEGMENT, segment, slice(0, 1)).log_probs
    assert (still[:, 0] - segment.rollout_log_probs[:, 0]).abs().max() <= TOLERANCE
    assert (moved - still).abs().max() > 1e-3
    policy.save(tmp_path)
    fresh = policy_of(kind, adapter=True)
    fresh.restore(tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.log_prob(SEGMENT, segment, slice(0, 1)).log_probs, moved)


def test_call_arguments_of_other_keys_are_refused():
    with pytest.raises(RecipeError, match=r"policy\.sampling\.call\.confidence_threshold: is not for this model"):
        policy_of("canvas", call={"confidence_threshold": 0.1})


def test_a_model_that_takes_no_positions_is_refused():
    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            raise AssertionError

    block = PolicyBlock(model="x", family="masked_text", sampling=MaskedTextSampling())
    with pytest.raises(UnsupportedPipelineError, match="takes no position_ids"):
        MaskedTextPolicy(Plain(), tokenizer(), block)

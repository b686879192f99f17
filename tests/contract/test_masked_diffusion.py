"""Masked-diffusion policies: the recorded tokens of aMUSEd score as they were drawn, guided or not."""

import copy
from functools import cache

import pytest
import torch
from diffusers import AmusedPipeline, AmusedScheduler, EntropyBoundScheduler, UVit2DModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from unified_rl.policies.masked_diffusion import MaskedDiffusionPolicy
from unified_rl.policies.scheduler_head import UnsupportedPipelineError
from unified_rl.recipe.policy import Adapter, MaskedDiffusionSampling, PolicyBlock
from unified_rl.types import Prompt

CODES, STEPS = 10, 4
TOLERANCE = 1e-5


@cache
def built() -> AmusedPipeline:
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=8)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipeline = AmusedPipeline(
        vqvae=VQModel(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=CODES, lookup_from_codebook=True,
        ),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModelWithProjection(text),
        transformer=UVit2DModel(
            hidden_size=32, cond_embed_dim=16, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
            encoder_hidden_size=16, vocab_size=CODES + 1, codebook_size=CODES, in_channels=32, block_out_channels=32,
            num_res_blocks=1, block_num_heads=2, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            sample_size=3,
        ),
        scheduler=AmusedScheduler(mask_token_id=CODES),
    )  # fmt: skip
    for parameter in [*pipeline.transformer.parameters(), *pipeline.text_encoder.parameters()]:
        if parameter.ndim > 1:
            parameter.data.mul_(2)  # so that the prompt matters
    return pipeline


def policy_of(*, adapter: bool = False, with_reference: bool = False, **sampling) -> MaskedDiffusionPolicy:
    settings = {"num_inference_steps": STEPS, "call": {"guidance_scale": 2.0}, **sampling}
    block = PolicyBlock(
        model="amused",
        family="masked_diffusion",
        adapter=Adapter(kind="lora" if adapter else "none", rank=2),
        sampling=MaskedDiffusionSampling(**settings),
    )
    return MaskedDiffusionPolicy(copy.deepcopy(built()), block, with_reference=with_reference)


def prompts(num: int = 6) -> list[Prompt]:
    return [Prompt(text="abc"[row % 3], images=(), columns={}, group_id=row % 3, seed=row) for row in range(num)]


ESTIMATORS = ["trajectory", "random_mask", "coupled_mask"]


@pytest.mark.parametrize("call", [{"guidance_scale": 2.0}, {"guidance_scale": 1.0}], ids=["guided", "plain"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_replay_gives_the_log_probs_of_the_rollout(estimator: str, call: dict):
    policy = policy_of(estimator=estimator, num_masks=1, call=call)
    segment = policy.sample(prompts()).segments["image"]
    num_steps = policy.max_steps["image"]
    assert segment.rollout_log_probs.shape == (6, num_steps) and segment.loss_mask.any()
    assert (segment.rollout_log_probs[segment.loss_mask] < 0).all()
    for rows in (slice(0, 6), slice(1, 4), slice(5, 6)):
        part = segment.rows(rows)
        for step in range(num_steps):
            policy.module.zero_grad()
            stats = policy.log_prob("image", part, slice(step, step + 1))
            assert (stats.log_probs[:, 0] - part.rollout_log_probs[:, step]).abs().max() <= TOLERANCE
            stats.log_probs.sum().backward()
            norms = [p.grad.norm() for p in policy.module.parameters() if p.grad is not None]
            assert (float(torch.stack(norms).sum()) > 0) == bool(part.loss_mask[:, step].any())
    together = policy.log_prob("image", segment, slice(None)).log_probs
    assert (together - segment.rollout_log_probs).abs().max() <= TOLERANCE


def test_every_token_is_committed_once_and_scored_as_it_was_drawn():
    """By hand, from the denoiser itself: the sum over the steps is the sum over all nine tokens, each in the state in
    which it was drawn."""
    policy = policy_of(call={"guidance_scale": 1.0})
    segment = policy.sample(prompts(2)).segments["image"]
    pipeline = policy._pipeline
    ids = pipeline.tokenizer(["a", "b"], padding="max_length", max_length=8, return_tensors="pt").input_ids
    text = pipeline.text_encoder(ids, output_hidden_states=True)
    micro = torch.tensor([[6, 6, 0, 0, 6.0]] * 2)
    before = torch.full((2, 3, 3), CODES)
    committed = torch.zeros(2, 3, 3)
    for step in range(STEPS):
        after = torch.stack([states[step] for states in segment.actions["states"]])
        with torch.no_grad():
            logits = policy.module(before, text.hidden_states[-2], text.text_embeds, micro).log_softmax(1)
        now = (before == CODES) & (after != CODES)
        committed += now
        chosen = logits.gather(1, torch.where(now, after, 0)[:, None])[:, 0]
        assert torch.allclose((chosen * now).sum((1, 2)), segment.rollout_log_probs[:, step], atol=1e-5)
        before = after
    assert (committed == 1).all() and (before != CODES).all()


def test_coupled_masks_score_every_token_once():
    policy = policy_of(estimator="coupled_mask", num_masks=1)
    segment = policy.sample(prompts(2)).segments["image"]
    for states, sample in zip(segment.actions["states"], segment.actions["samples"], strict=True):
        assert ((states[:2] == CODES).sum(0) == 1).all() and torch.equal(states[2], sample)
        assert ((states[:2] == CODES) | (states[:2] == sample)).all()


def test_a_row_does_not_depend_on_its_batch():
    policy = policy_of()
    together = policy.sample(prompts()).segments["image"].actions["samples"]
    alone = [policy.sample([prompt]).segments["image"].actions["samples"][0] for prompt in prompts()]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert len({tuple(sample.flatten().tolist()) for sample in together}) > 3


def test_frozen_parts_do_not_run_again_and_the_reference_stays():
    policy = policy_of(with_reference=True)
    segment = policy.sample(prompts()).segments["image"]
    calls = []
    policy._pipeline.text_encoder.text_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.05)
        moved = policy.log_prob("image", segment, slice(None)).log_probs
        with policy.reference():
            still = policy.log_prob("image", segment, slice(None)).log_probs
    assert calls == []
    assert (still - segment.rollout_log_probs).abs().max() <= TOLERANCE
    assert (moved - segment.rollout_log_probs).abs().max() > 1e-3


def test_an_adapter_is_all_that_is_trained():
    policy = policy_of(adapter=True)
    segment = policy.sample(prompts(2)).segments["image"]
    policy.log_prob("image", segment, slice(0, 2)).log_probs.sum().backward()
    assert all((".lora_" in name) == p.requires_grad for name, p in policy.module.named_parameters())
    assert any(p.grad is not None and p.grad.any() for p in policy.module.parameters())


def test_a_scheduler_without_a_discrete_kernel_is_refused():
    pipeline = copy.deepcopy(built())
    pipeline.scheduler = EntropyBoundScheduler()
    pipeline.scheduler.register_to_config(mask_token_id=CODES)
    block = PolicyBlock(model="amused", family="masked_diffusion", sampling=MaskedDiffusionSampling())
    with pytest.raises(UnsupportedPipelineError, match="EntropyBoundScheduler: no discrete kernel"):
        MaskedDiffusionPolicy(pipeline, block)

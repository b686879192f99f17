"""The replay contract: scoring a stored trajectory gives the log-probs that its sampling reported."""

import copy
import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.recipe.policy import Adapter, DiffusionSampling, PolicyBlock, TextSampling, exam_sampling
from unified_rl.types import Prompt, Segment
from unified_rl.worlds import edits, shapes

PIPELINES = {"shapes_sd3": "a red circle", "digits_unet": "a handwritten seven"}
NUM_STEPS = 5


def image_prompts(text: str, num: int) -> list[Prompt]:
    second = text.replace("red", "blue").replace("seven", "three")
    texts = [text if row % 2 else second for row in range(num)]
    return [Prompt(text=t, images=(), columns={}, group_id=row % 2, seed=row) for row, t in enumerate(texts)]


def diffusion_policy(
    folder: Path,
    *,
    dtype: str = "float32",
    lora: bool = False,
    exam: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    **call: float,
) -> DiffusionPolicy:
    torch.manual_seed(0)
    block = PolicyBlock(
        model=str(folder),
        family="diffusion",
        dtype=dtype,
        adapter=Adapter(kind="lora" if lora else "none", rank=4),
        sampling=DiffusionSampling.model_validate(
            {"num_inference_steps": NUM_STEPS, "noise_level": 0.8, "call": call, **(sampling or {})}
        ),
    )
    settings = exam_sampling(block.sampling.model_dump(), {"noise_level": 0.0, **(exam or {})})
    still = DiffusionSampling.model_validate(settings)
    return DiffusionPolicy.load(block, evaluation=still, with_reference=True, device=torch.device("cpu"))


def text_policy(folder: Path, *, lora: bool = False, **sampling: float) -> CausalLMPolicy:
    torch.manual_seed(0)
    block = PolicyBlock(
        model=str(folder),
        family="causal_lm",
        adapter=Adapter(kind="lora" if lora else "none", rank=4),
        sampling=TextSampling(max_new_tokens=8, **sampling),
    )
    return CausalLMPolicy.load(
        block, evaluation=block.sampling, with_reference=True, entropy_gradient=False, device=torch.device("cpu")
    )


def question_prompts(num: int) -> list[Prompt]:
    rows = shapes.heldout_questions(num)
    return [
        Prompt(text=row["prompt"], images=(row["image"],), columns=row, group_id=index, seed=index)
        for index, row in enumerate(rows)
    ]


def gap(policy: DiffusionPolicy, segment: Segment, step: int) -> float:
    with torch.no_grad():
        stats = policy.log_prob("image", segment, slice(step, step + 1))
    return float((stats.log_probs[:, 0] - segment.rollout_log_probs[:, step]).abs().max())


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("lora", [False, True])
def test_a_pipeline_replays_exactly_at_the_shape_of_its_rollout(quickstart: Path, name: str, lora: bool):
    policy = diffusion_policy(quickstart / name, lora=lora)
    segment = policy.sample(image_prompts(PIPELINES[name], 4)).segments["image"]
    assert segment.rollout_log_probs.shape == (4, NUM_STEPS)
    assert segment.loss_mask.all(), "every step of these schedules is stochastic"
    for step in range(NUM_STEPS):
        assert gap(policy, segment, step) == 0.0
        assert gap(policy, segment.rows(slice(1, 3)), step) <= 1e-5
        stats = policy.log_prob("image", segment, slice(step, step + 1))
        policy.module.zero_grad()
        stats.log_probs.sum().backward()
        norms = [p.grad.norm() for p in policy.module.parameters() if p.grad is not None]
        assert 0 < torch.stack(norms).sum() < float("inf")
        assert all((".lora_" in n) == p.requires_grad for n, p in policy.module.named_parameters()) or not lora


@pytest.mark.parametrize("name", PIPELINES)
def test_bfloat16_replays_exactly_at_the_shape_of_its_rollout(quickstart: Path, name: str):
    policy = diffusion_policy(quickstart / name, dtype="bfloat16")
    segment = policy.sample(image_prompts(PIPELINES[name], 4)).segments["image"]
    assert segment.actions["states"][0].dtype == torch.bfloat16
    assert [gap(policy, segment, step) for step in range(NUM_STEPS)] == [0.0] * NUM_STEPS


@pytest.mark.parametrize("name", PIPELINES)
def test_guidance_is_part_of_the_policy(quickstart: Path, name: str):
    guided = diffusion_policy(quickstart / name, guidance_scale=4.0)
    plain = diffusion_policy(quickstart / name)
    segment = guided.sample(image_prompts(PIPELINES[name], 2)).segments["image"]
    assert max(gap(guided, segment, step) for step in range(NUM_STEPS)) == 0.0
    # The plain policy's recording has one denoiser row a sample, the guided one's two: score an asked first step only.
    assert gap(plain, segment, 0) > 1e-5


def test_steps_after_the_noisy_ones_follow_the_ode(quickstart: Path):
    policy = diffusion_policy(quickstart / "shapes_sd3", sampling={"noise_steps": 2})
    segment = policy.sample(image_prompts("a red circle", 2)).segments["image"]
    assert segment.loss_mask.tolist() == [[True, True] + [False] * (NUM_STEPS - 2)] * 2
    assert (segment.rollout_log_probs[:, 2:] == 0).all()
    assert max(gap(policy, segment, step) for step in range(2)) == 0.0
    every = diffusion_policy(quickstart / "shapes_sd3").sample(image_prompts("a red circle", 2)).segments["image"]
    assert torch.equal(every.actions["states"][0][1], segment.actions["states"][0][1]), "the same draws so far"


PLANS = {
    "middle": ({"noise_steps": 2, "noise_range": (1, 4)}, [1, 2], [0, 1, 2, 4]),
    "window": ({"noise_steps": 2, "noise_place": "window", "noise_shift": {"every": 1}}, [2, 3], [1, 2, 3, 4]),
    "random": ({"noise_steps": 2, "noise_place": "random"}, [2, 4], [1, 2, 3, 4]),
    "branch": ({"noise_steps": 1, "noise_place": "branch", "noise_range": (1, 4)}, [1], [0, 1, 4]),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", PIPELINES)
def test_noise_anywhere_replays_exactly_from_the_states_that_it_needs(quickstart: Path, name: str, kind: str):
    keys, steps, stored = PLANS[kind]
    policy = diffusion_policy(quickstart / name, sampling=keys, guidance_scale=2.0)
    policy.rollout = 2
    segment = policy.sample(image_prompts(PIPELINES[name], 4)).segments["image"]
    noisy = segment.loss_mask[0].nonzero().flatten().tolist()
    assert (noisy, segment.actions["stored"][0]) == (steps, stored)
    assert len(segment.actions["states"][0]) == len(stored)
    policy.rollout = 7  # a later rollout's plan: a replay goes by what was sampled
    for step in noisy:
        assert gap(policy, segment, step) == 0.0
        stats = policy.log_prob("image", segment, slice(step, step + 1))
        (slope,) = torch.autograd.grad(stats.log_probs.sum(), next(iter(policy.module.parameters())))
        assert slope.isfinite().all()
    with pytest.raises(AssertionError, match="was not noisy"):
        still = next(step for step in range(NUM_STEPS) if step not in segment.actions["stored"][0])
        policy.log_prob("image", segment, slice(still, still + 1))


def test_a_group_that_branches_is_one_trajectory_until_then(quickstart: Path):
    keys = {"noise_steps": 1, "noise_place": "branch", "noise_range": (2, 3)}
    policy = diffusion_policy(quickstart / "shapes_sd3", sampling=keys)
    prompts = [replace(prompt, text="a red circle") for prompt in image_prompts("a red circle", 4)]  # groups 0, 1, 0, 1
    segment = policy.sample(prompts).segments["image"]
    assert segment.actions["stored"][0] == [1, 2, 4]
    states = torch.stack(segment.actions["states"])
    for one, other in ((0, 2), (1, 3)):
        assert torch.equal(states[one, 0], states[other, 0]), "the same until the branch"
        assert not torch.equal(states[one, 1], states[other, 1]), "and not from there on"
    assert not torch.equal(states[0, 0], states[1, 0]), "another group starts elsewhere"


@pytest.mark.parametrize("name", PIPELINES)
def test_a_group_may_share_its_initial_noise(quickstart: Path, name: str):
    prompts = [replace(prompt, text=PIPELINES[name]) for prompt in image_prompts(PIPELINES[name], 4)]
    drawn = {}
    for kind in ("own", "group"):
        keys = {"initial_noise": kind, "noise_range": (2, 5)}
        segment = diffusion_policy(quickstart / name, sampling=keys).sample(prompts).segments["image"]
        drawn[kind] = torch.stack(segment.actions["states"])
    assert torch.equal(drawn["group"][0, 0], drawn["group"][2, 0])
    assert not torch.equal(drawn["group"][0, 0], drawn["group"][1, 0])
    assert not torch.equal(drawn["own"][0, 0], drawn["own"][2, 0])


@pytest.mark.parametrize("name", PIPELINES)
def test_states_in_half_precision_are_half_as_large_and_replay_exactly(quickstart: Path, name: str):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        policy = diffusion_policy(quickstart / name, sampling={"state_dtype": dtype})
        segment = policy.sample(image_prompts(PIPELINES[name], 2)).segments["image"]
        assert max(gap(policy, segment, step) for step in range(NUM_STEPS)) == 0.0
        sizes[dtype] = sum(row.nbytes for row in segment.actions["states"])
    assert sizes["bfloat16"] * 2 == sizes["float32"]
    still = policy.sample(image_prompts(PIPELINES[name], 2), evaluation=True).segments["image"]
    assert still.actions["states"][0].dtype == torch.float32, "an exam is not rounded"


def test_training_may_be_smaller_and_shorter_than_the_exam(quickstart: Path):
    exam = {"num_inference_steps": 8, "call": {"height": 32, "width": 32}}
    small = {"height": 16, "width": 16, "guidance_scale": 2.0}
    policy = diffusion_policy(quickstart / "shapes_sd3", exam=exam, **small)
    prompts = image_prompts("a red circle", 2)
    trained, examined = policy.sample(prompts), policy.sample(prompts, evaluation=True)
    assert [image.size for (image,) in (row.images for row in trained.completions)] == [(16, 16)] * 2
    assert [image.size for (image,) in (row.images for row in examined.completions)] == [(32, 32)] * 2
    segment, still = trained.segments["image"], examined.segments["image"]
    assert segment.rollout_log_probs.shape[1] == NUM_STEPS and still.rollout_log_probs.shape[1] == 8
    assert policy._settings[True].call == {"height": 32, "width": 32, "guidance_scale": 2.0}
    assert max(gap(policy, segment, step) for step in range(NUM_STEPS)) == 0.0


def test_steps_scored_together_equal_steps_scored_alone(quickstart: Path):
    policy = diffusion_policy(quickstart / "shapes_sd3")
    segment = policy.sample(image_prompts("a red circle", 2)).segments["image"]
    with torch.no_grad():
        together = policy.log_prob("image", segment, slice(1, 4)).log_probs
        alone = [policy.log_prob("image", segment, slice(step, step + 1)).log_probs for step in (1, 2, 3)]
    assert torch.equal(together, torch.cat(alone, dim=1))


def test_a_sample_depends_on_its_seed_alone(quickstart: Path):
    policy = diffusion_policy(quickstart / "shapes_sd3")
    prompts = image_prompts("a red circle", 4)
    four = policy.sample(prompts).segments["image"].actions["states"]
    two = policy.sample(prompts[2:]).segments["image"].actions["states"]
    torch.testing.assert_close(torch.stack(four[2:]), torch.stack(two), rtol=0, atol=1e-4)
    assert not torch.equal(four[0], four[2]), "same prompt, other seed"


@pytest.mark.parametrize("name", ["shapes_sd3", "shapes_inpaint"])
def test_replay_runs_one_denoiser_call_and_no_encoder(quickstart: Path, name: str):
    """Neither text encoders nor the VAE, of which inpainting takes both halves. Hooks on every layer."""
    policy = diffusion_policy(quickstart / name)
    calls: Counter[str] = Counter()

    def count(module: torch.nn.Module, arguments: Any, *, part: str) -> None:
        calls[part] += 1

    for part, component in policy._pipeline.components.items():
        for layer in component.modules() if isinstance(component, torch.nn.Module) else ():
            if component is not policy.module or layer is component.pos_embed:
                layer.register_forward_pre_hook(functools.partial(count, part=part))
    rows = edits.edits("train", 2)
    prompts = [
        Prompt(text=row["prompt"], images=(), columns=row if name == "shapes_inpaint" else {}, group_id=0, seed=seed)
        for seed, row in enumerate(rows * 2)
    ]
    segment = policy.sample(prompts).segments["image"]
    assert calls.keys() >= {"text_encoder", "transformer", "vae"}, "the hooks see what sampling runs"
    calls.clear()
    policy.log_prob("image", segment, slice(3, 4))
    policy.log_prob("image", segment.rows(slice(0, 1)), slice(0, 1))
    assert calls == {"transformer": 2}


def test_evaluation_sampling_is_the_deterministic_pipeline(quickstart: Path):
    """With no noise the stochastic scheduler is the pipeline's own: same pictures as plain diffusers."""
    from diffusers import DiffusionPipeline

    policy = diffusion_policy(quickstart / "digits_unet")
    prompts = image_prompts("a handwritten seven", 2)
    trajectory = policy.sample(prompts, evaluation=True)
    assert not trajectory.segments["image"].loss_mask.any()
    plain = DiffusionPipeline.from_pretrained(quickstart / "digits_unet")
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        [prompt.text for prompt in prompts],
        num_inference_steps=NUM_STEPS,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(prompt.seed) for prompt in prompts],
    ).images
    for completion, image in zip(trajectory.completions, expected, strict=True):
        assert completion.images[0].tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8, "temperature": 1.3}, {"min_p": 0.1}]
)
@pytest.mark.parametrize("lora", [False, True])
def test_a_language_model_replays_under_its_sampling_recipe(quickstart: Path, sampling: dict, lora: bool):
    policy = text_policy(quickstart / "shapes_vlm", lora=lora, **sampling)
    trajectory = policy.sample(question_prompts(8))
    segment = trajectory.segments["text"]
    assert len({len(tokens) for tokens in segment.actions["tokens"]}) > 1, "ragged completions"
    for rows in (slice(0, 8), slice(2, 5), slice(7, 8)):
        part = segment.rows(rows)
        stats = policy.log_prob("text", part, slice(None))
        assert (stats.log_probs - part.rollout_log_probs).abs().max() <= 1e-4
        assert (part.rollout_log_probs[~part.loss_mask] == 0).all()
    stats.log_probs.sum().backward()
    trained = {name for name, parameter in policy.module.named_parameters() if parameter.grad is not None}
    assert trained and not any("vision_model" in name for name in trained), "the vision tower is frozen"


def test_processed_distribution_differs_from_the_raw_one(quickstart: Path):
    """The log-probs are the behaviour policy's: with top_k 1 every decision is certain."""
    policy = text_policy(quickstart / "shapes_vlm", top_k=1)
    segment = policy.sample(question_prompts(4)).segments["text"]
    assert (segment.rollout_log_probs == 0).all()


def test_special_tokens_are_never_sampled(quickstart: Path):
    policy = text_policy(quickstart / "shapes_vlm", temperature=50.0)  # nearly uniform over the vocabulary
    segment = policy.sample(question_prompts(64)).segments["text"]
    tokens = torch.cat(segment.actions["tokens"])
    assert len(tokens.unique()) > 30
    assert policy.module.config.image_token_id not in tokens
    end = policy._words.ends[0]
    assert set(tokens.tolist()) & set(policy._tokenizer.all_special_ids) <= {end}


def test_generation_settings_of_the_checkpoint_do_not_leak_in(quickstart: Path):
    """A repetition penalty in the model's generation config would change the distribution behind the recipe's back."""
    plain = text_policy(quickstart / "shapes_vlm")
    expected = plain.sample(question_prompts(4)).segments["text"].rollout_log_probs
    model = copy.deepcopy(plain.module)
    model.generation_config.repetition_penalty = 3.0
    policy = CausalLMPolicy(model, plain._processor, plain._block)
    assert torch.equal(policy.sample(question_prompts(4)).segments["text"].rollout_log_probs, expected)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["diffusion", "text"])
def test_the_reference_is_the_model_before_training(quickstart: Path, family: str, lora: bool, tmp_path: Path):
    policy = (
        diffusion_policy(quickstart / "shapes_sd3", lora=lora)
        if family == "diffusion"
        else text_policy(quickstart / "shapes_vlm", lora=lora)
    )
    prompts = image_prompts("a red circle", 2) if family == "diffusion" else question_prompts(2)
    (name, segment), *_ = policy.sample(prompts).segments.items()
    steps = slice(0, 1) if family == "diffusion" else slice(None)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        trained = policy.log_prob(name, segment, steps).log_probs
        with policy.reference():
            reference = policy.log_prob(name, segment, steps).log_probs
        policy.save(tmp_path)
        fresh = (
            diffusion_policy(quickstart / "shapes_sd3", lora=lora)
            if family == "diffusion"
            else text_policy(quickstart / "shapes_vlm", lora=lora)
        )
        fresh.restore(tmp_path)
        restored = fresh.log_prob(name, segment, steps).log_probs
    expected = segment.rollout_log_probs[:, steps]
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-5)
    assert (trained - expected).abs().max() > 1e-3
    torch.testing.assert_close(restored, trained, rtol=0, atol=1e-5)

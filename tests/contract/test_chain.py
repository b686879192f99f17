"""A writer and a pipeline as one policy: both segments replay exactly, each model is trained or frozen on its own."""

import copy
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from unified_rl import cli
from unified_rl.errors import RecipeError
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.chain import ChainPolicy
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.recipe.file import RECIPES, load_recipe
from unified_rl.recipe.policy import Adapter, DiffusionSampling, PolicyBlock, TextSampling, Writer
from unified_rl.tiny import language, models
from unified_rl.types import Prompt

CALL = {"height": 32, "width": 32, "max_sequence_length": 32, "guidance_scale": 2.0}
BOTH = ("text", "image")


@cache
def parts() -> tuple:
    torch.manual_seed(0)
    return (
        *language.TWINS["Qwen2ForCausalLM"](),
        diffusers.StableDiffusion3Pipeline(**models.TWINS["StableDiffusion3Pipeline"]()),
    )


def policy_of(*, trained: tuple[str, ...] = BOTH, lora: bool = False) -> ChainPolicy:
    model, tokenizer, pipeline = copy.deepcopy(parts())
    adapter = Adapter(kind="lora" if lora else "none", rank=2)
    settings = Writer(model="w", draw="{prompt}, {text}", adapter=adapter, sampling=TextSampling(max_new_tokens=6))
    sampling = DiffusionSampling(num_inference_steps=3, noise_steps=2, call=CALL)
    block = PolicyBlock(model="d", family="diffusion", adapter=adapter, sampling=sampling, writer=settings)
    writer = CausalLMPolicy(model, tokenizer, settings.block, with_reference="text" in trained)
    drawer = DiffusionPolicy(pipeline, block, with_reference="image" in trained)
    return ChainPolicy(writer, drawer, settings, trained=trained, referenced=trained)


def prompts() -> list[Prompt]:
    return [
        Prompt(text=text, images=(), columns={}, group_id=group, seed=10 * group + member)
        for group, text in enumerate(("a cat", "two dogs"))
        for member in range(2)
    ]


def test_both_segments_replay_exactly_and_pictures_are_drawn_from_the_texts():
    policy = policy_of()
    trajectory = policy.sample(prompts())
    assert list(trajectory.segments) == [*BOTH] and set(policy.max_steps) == set(policy.steps_per_forward) == {*BOTH}
    for name, segment in trajectory.segments.items():
        part = segment.rows(slice(1, 4))
        for steps in (slice(0, 1), slice(1, 2)) if name == "image" else (slice(None),):
            with torch.no_grad():
                gap = policy.log_prob(name, part, steps).log_probs - part.rollout_log_probs[:, steps]
            assert gap[part.loss_mask[:, steps]].abs().max() <= 1e-5
    asked = trajectory.segments["image"].actions["prompts"]
    texts = [completion.text for completion in trajectory.completions]
    assert [row.text for row in asked] == [f"{one.text}, {text}" for one, text in zip(prompts(), texts, strict=True)]
    assert len(set(texts)) > 2 and all(completion.images for completion in trajectory.completions)
    assert [completion.text for completion in policy.sample(prompts()).completions] == texts, "seeds decide"


@pytest.mark.parametrize("trained", [BOTH, ("text",), ("image",)], ids="+".join)
def test_gradients_reach_the_trained_models_only(trained: tuple[str, ...]):
    policy = policy_of(trained=trained)
    trajectory = policy.sample(prompts())
    for name in trained:
        policy.log_prob(name, trajectory.segments[name], slice(0, 1)).log_probs.sum().backward()
    reached = {key.partition(".")[0] for key, each in policy.module.named_parameters() if each.grad is not None}
    assert reached == {{"text": "writer", "image": "drawer"}[name] for name in trained}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reference_saving_and_restoring(lora: bool, tmp_path: Path):
    policy, other = policy_of(lora=lora), policy_of(lora=lora)
    trajectory = policy.sample(prompts())
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    policy.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawer", "writer"]
    other.restore(tmp_path)
    for name, segment in trajectory.segments.items():
        with torch.no_grad():
            moved, restored = (each.log_prob(name, segment, slice(0, 1)).log_probs for each in (policy, other))
            with policy.reference():
                anchored = policy.log_prob(name, segment, slice(0, 1)).log_probs
        assert torch.equal(moved, restored)
        start = segment.rollout_log_probs[:, :1]
        assert (anchored - start).abs().max() <= 1e-5 < (moved - start).abs().max()


def test_a_resumed_run_ends_where_an_unbroken_one_does_and_is_exported(tmp_path: Path):
    words = [
        "--tiny",
        "num_steps=2",
        "checkpoint.every=1",
        "data.evaluation=null",
        "objective.image={preset: flow_grpo}",
    ]
    words += ["policy.sampling.noise_level=0.7", "engine.threads=1"]
    whole, parted = tmp_path / "whole", tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert cli.main(["train", "sd35m_prompt_writer", *words, "--output", str(whole)]) == 0
        first = str(whole / "checkpoints/step_000001")
        assert cli.main(["train", "sd35m_prompt_writer", *words, "--output", str(parted), "--resume", first]) == 0
    assert cli.main(["export", str(whole), "--format", "peft", str(tmp_path / "out")]) == 0
    files = sorted((whole / "checkpoints/step_000002/policy").rglob("*.safetensors"))
    assert len(files) == 2 and {path.parent.name for path in files} == {"writer", "drawer"}
    for path in files:
        ends, other = load_file(path), load_file(parted / path.relative_to(whole))
        assert ends.keys() == other.keys() and all(torch.equal(ends[name], other[name]) for name in ends)
        assert (tmp_path / "out" / path.parent.name / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.zero_stage=3", "engine.zero_stage: 3 is not supported with a writer"),
        ("policy.memory={text_encoders: drop}", "text_encoders: drop needs to know all prompts"),
        ("record_rollouts=true", "record_rollouts: recorded samples hold no texts"),
        ("objective.text={preset: ppo}", "objective.text.advantage: gae has no critic for a policy.writer"),
        ("policy.writer.modl=x", "policy.writer.modl: unknown key"),
        ("objective.text={preset: flow_grpo}", "objective.text.kl: gaussian needs Gaussian steps"),
    ],
)
def test_what_a_chain_cannot_do_is_said(override: str, message: str):
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(RECIPES / "models/sd35m_prompt_writer.yaml"), [override])

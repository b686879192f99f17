"""A writer and a pipeline as one policy: both segments replay exactly, each model is trained or frozen on its own."""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from families.drawing import GLM_SIZE, glm_image, janus
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from transformers import GlmImageForConditionalGeneration, GlmImageProcessor

from tests.contract.pipelines.build import Case, build
from tests.contract.pipelines.components import image_vae
from unified_rl import cli
from unified_rl.errors import RecipeError
from unified_rl.policies import build_policy
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.chain import ChainPolicy
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.image_tokens import TokenWriter
from unified_rl.recipe.explain import plan
from unified_rl.recipe.file import RECIPES, load_recipe
from unified_rl.recipe.policy import SAMPLING, Adapter, DiffusionSampling, PolicyBlock, Writer
from unified_rl.tiny import language, models
from unified_rl.types import Prompt

CALL = {
    "text": {"height": 32, "width": 32, "max_sequence_length": 32, "guidance_scale": 2.0},
    "tokens": {"height": 64, "width": 96, "max_sequence_length": 32, "guidance_scale": 2.0},
}
TRAINED = [(kind, trained) for kind in CALL for trained in ((kind, "image"), (kind,), ("image",))]
SIZED = {"text": {"max_new_tokens": 6}, "tokens": {"guidance_scale": 1.0, "processor": GLM_SIZE}}


def glm_pipeline() -> diffusers.GlmImagePipeline:
    """Its language model aside: a token is 16 pixels wide here, and 32 there."""
    vae = image_vae(4, blocks=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    given = {"vae": lambda: vae, "vision_language_encoder": None, "processor": None}
    return build(Case("GlmImagePipeline", given))


@cache
def parts(kind: str) -> tuple:
    """Writer, its processor, and the pipeline."""
    torch.manual_seed(0)
    if kind == "tokens":
        return (*glm_image(), glm_pipeline())
    return (
        *language.TWINS["Qwen2ForCausalLM"](),
        diffusers.StableDiffusion3Pipeline(**models.TWINS["StableDiffusion3Pipeline"]()),
    )


def policy_of(kind: str, *, trained: tuple[str, ...] | None = None, lora: bool = False) -> ChainPolicy:
    model, tokenizer, pipeline = copy.deepcopy(parts(kind))
    adapter = Adapter(kind="lora" if lora else "none", rank=2)
    family = "causal_lm" if kind == "text" else "image_tokens"
    draw = "{prompt}, {text}" if kind == "text" else None
    written = SAMPLING[family].model_validate(SIZED[kind])
    settings = Writer(model="w", family=family, draw=draw, adapter=adapter, sampling=written)
    sampling = DiffusionSampling(num_inference_steps=3, noise_steps=2, call=CALL[kind])
    block = PolicyBlock(model="d", family="diffusion", adapter=adapter, sampling=sampling, writer=settings)
    trained = trained or block.segments
    writer = (CausalLMPolicy if kind == "text" else TokenWriter)(
        model, tokenizer, settings.block, with_reference=kind in trained
    )
    drawer = DiffusionPolicy(pipeline, block, with_reference="image" in trained)
    return ChainPolicy(writer, drawer, settings, trained=trained, referenced=trained)


def prompts() -> list[Prompt]:
    return [
        Prompt(text=text, images=(), columns={}, group_id=group, seed=10 * group + member)
        for group, text in enumerate(("a cat", "two dogs"))
        for member in range(2)
    ]


@pytest.mark.parametrize("kind", CALL)
def test_both_segments_replay_exactly_and_pictures_are_drawn_from_what_was_written(kind: str):
    policy = policy_of(kind)
    trajectory = policy.sample(prompts())
    assert list(trajectory.segments) == [kind, "image"] == list(policy.max_steps) == list(policy.steps_per_forward)
    for name, segment in trajectory.segments.items():
        part = segment.rows(slice(1, 4))
        for steps in (slice(0, 1), slice(1, 2)) if name == "image" else (slice(None),):
            with torch.no_grad():
                gap = policy.log_prob(name, part, steps).log_probs - part.rollout_log_probs[:, steps]
            assert gap[part.loss_mask[:, steps]].abs().max() <= 1e-5
    asked = trajectory.segments["image"].actions["prompts"]
    texts = [completion.text for completion in trajectory.completions]
    if kind == "text":
        assert [row.text for row in asked] == [
            f"{one.text}, {text}" for one, text in zip(prompts(), texts, strict=True)
        ]
        assert len(set(texts)) > 2
    else:
        codes = trajectory.segments["tokens"].actions["codes"]
        finer = interpolate(codes[:, None, 2:].view(4, 1, 2, 3).double(), scale_factor=2).flatten(1).long()
        assert torch.equal(torch.stack([row.columns["prior_token_ids"] for row in asked]), finer)
        assert [row.text for row in asked] == [one.text for one in prompts()] and len(codes.unique(dim=0)) > 2
    again = policy.sample(prompts()).completions
    for one, other in zip(trajectory.completions, again, strict=True):
        assert one.text == other.text and one.images[0].tobytes() == other.images[0].tobytes(), "seeds decide"


def test_a_picture_follows_its_tokens():
    """The same noise and prompt, other tokens: another picture; so the tokens' reward is about them."""
    policy = policy_of("tokens")
    row = prompts()[0]
    drawn = [
        policy._drawer.sample([replace(row, columns={"prior_token_ids": torch.full((24,), k)})]) for k in (1, 1, 2)
    ]
    first, same, other = (each.completions[0].images[0].tobytes() for each in drawn)
    assert first == same != other


@pytest.mark.parametrize(
    ("kind", "trained"), TRAINED, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_gradients_reach_the_trained_models_only(kind: str, trained: tuple[str, ...]):
    policy = policy_of(kind, trained=trained)
    trajectory = policy.sample(prompts())
    for name in trained:
        policy.log_prob(name, trajectory.segments[name], slice(0, 1)).log_probs.sum().backward()
    reached = {key.partition(".")[0] for key, each in policy.module.named_parameters() if each.grad is not None}
    assert reached == {"drawer" if name == "image" else "writer" for name in trained}


@pytest.mark.parametrize(("kind", "lora"), [("text", False), ("text", True), ("tokens", True)])
def test_reference_saving_and_restoring(kind: str, lora: bool, tmp_path: Path):
    policy, other = policy_of(kind, lora=lora), policy_of(kind, lora=lora)
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


def glm_recipe(folder: Path) -> Path:
    """A whole GLM-Image in a folder, and a recipe that trains both of its halves."""
    model, small = copy.deepcopy(parts("tokens")[:2])
    pipeline = copy.deepcopy(parts("tokens")[2])
    processor = GlmImageProcessor(small.image_processor, small.tokenizer)
    pipeline.register_modules(vision_language_encoder=model, processor=processor)
    pipeline.save_pretrained(folder / "glm")
    raw = {
        "num_steps": 1,
        "group_size": 2,
        "prompts_per_step": 2,
        "policy": {
            "model": "glm",
            "sampling": {"num_inference_steps": 2, "call": {"height": 32, "width": 64, "max_sequence_length": 16}},
            "adapter": {"kind": "lora", "rank": 2},
            "writer": {
                "model": "glm/vision_language_encoder",
                "adapter": {"kind": "lora", "rank": 2},
                "sampling": {"guidance_scale": 1, "processor": {"target_h": 32, "target_w": 64}},
            },
        },
        "data": {"prompts": "unified_rl.worlds.shapes:train_drawing"},
        "rewards": [{"name": "incompressibility"}],
        "objective": {"tokens": {"preset": "grpo"}, "image": {"preset": "flow_grpo"}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


def test_glm_image_is_trained_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both halves in one run; the language model, a component of the pipeline, is loaded once."""
    recipe, loaded = glm_recipe(tmp_path), []
    original = GlmImageForConditionalGeneration.from_pretrained.__func__
    counted = classmethod(lambda kind, *args, **more: loaded.append(1) or original(kind, *args, **more))
    monkeypatch.setattr(GlmImageForConditionalGeneration, "from_pretrained", counted)
    run = tmp_path / "run"
    assert cli.main(["train", str(recipe), "--output", str(run), "engine.threads=1"]) == 0
    assert len(loaded) == 1
    row = json.loads((run / "metrics.jsonl").read_text())
    assert row["replay_gap"] <= 1e-4 and row["grad_norm"] > 0
    assert plan(load_recipe(str(recipe))).steps_trained == 2 + 11 * 22 + 2, "large and small grid, denoising steps"
    assert cli.main(["export", str(run), "--format", "peft", str(tmp_path / "out")]) == 0
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("*.safetensors")) == ["drawer", "writer"]


def test_tokens_for_another_size_or_pipeline_are_refused(tmp_path: Path):
    recipe = glm_recipe(tmp_path)
    parts("text")[2].save_pretrained(tmp_path / "sd3")
    cases = {
        "policy.sampling.call={height: 64, width: 64}": r"policy\.sampling\.call: .* for height: 32, width: 64",
        "policy.model=sd3": "StableDiffusion3Pipeline takes no prior_token_ids",
    }
    for override, message in cases.items():
        words = [override, "policy.writer.model=glm/vision_language_encoder"]
        with pytest.raises(RecipeError, match=message):
            build_policy(load_recipe(str(recipe), words), torch.device("cpu"))
    model, processor = janus()
    settings = Writer(model="w", family="image_tokens", sampling=SAMPLING["image_tokens"]())
    with pytest.raises(
        RecipeError, match=r"policy\.writer: janus makes its pictures itself; train it as policy\.model"
    ):
        TokenWriter(model, processor, settings.block)


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

"""The scripts for further tiny pipelines: one recipe body trains each family, and the inpainting model starts as its
source. Weights are random or as shipped here; nothing is pre-trained in a test."""

import json
import random
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTextModel, CLIPTokenizer

from recipes.families import make_tiny
from recipes.quickstart import make_shapes_inpaint, make_shapes_planner, make_shapes_sd3, plans, script
from unified_rl import cli
from unified_rl.recipe.file import RECIPES
from unified_rl.worlds import shapes

COUNTS = ["num_steps=1", "epochs=1", "group_size=2", "prompts_per_step=2", "engine.micro_batch=4", "engine.threads=1"]
COUNTS += ["evaluation.num_prompts=2", "rewards=[{name: 'unified_rl.tiny.twin:brightness'}]"]


def trained(recipe: str, model: Path, folder: Path, *overrides: str) -> dict:
    command = ["train", str(RECIPES / recipe), f"policy.model={model}", *COUNTS, *overrides]
    assert cli.main([*command, "--output", str(folder)]) == 0
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("name", make_tiny.FAMILIES)
def test_one_recipe_body_trains_every_family(name: str, tmp_path: Path):
    torch.manual_seed(0)
    family = make_tiny.FAMILIES[name]
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=make_tiny.LATENT_CHANNELS,
    )
    tokenizer = CLIPTokenizer.from_pretrained(make_tiny.SD3 / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(make_tiny.SD3 / "text_encoder")
    pipeline = family.build(vae, text_encoder, tokenizer)
    text = family.encode(pipeline, ["a red circle", "two blue squares"])
    noisy = torch.randn(2, make_tiny.LATENT_CHANNELS, make_tiny.LATENT_SIZE, make_tiny.LATENT_SIZE)
    predicted = family.predict(make_tiny.denoiser_of(pipeline), noisy, torch.tensor([0.5, 0.9]), *text)
    assert predicted.shape == noisy.shape
    make_tiny.save(pipeline, tmp_path / "model", {**make_tiny.CALL_DEFAULTS, **family.call})
    row = trained("families/drawing.yaml", tmp_path / "model", tmp_path / "run")
    assert row["replay_gap"] <= 1e-5 and row["grad_norm"] > 0


def test_flux_latents_are_the_inverse_of_flux_tokens():
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(make_tiny.flux_latents(make_tiny.flux_tokens(latents)), latents)


def test_the_inpainting_model_starts_as_its_source_and_trains(tmp_path: Path):
    small = make_shapes_sd3.load(make_shapes_inpaint.SOURCE)
    wide = make_shapes_inpaint.widen(small)
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = wide.vae.encode(pictures).latents
    assert torch.equal(latents[:, :3], small.vae.encode(pictures).latents) and not latents[:, 3:].any()
    latents[:, 3:] = torch.randn(1, 13, 32, 32)  # what the empty channels hold is not seen
    assert torch.equal(wide.vae.decode(latents).sample, small.vae.decode(latents[:, :3]).sample)
    wide.save_pretrained(tmp_path / "model")
    call = {**make_shapes_sd3.CALL_DEFAULTS, "strength": 1.0}
    (tmp_path / "model/call_defaults.json").write_text(json.dumps(call))
    row = trained("quickstart_edit.yaml", tmp_path / "model", tmp_path / "run")
    assert row["replay_gap"] <= 1e-5 and row["grad_norm"] > 0


def test_a_plan_is_read_as_it_was_written_and_checked_as_a_scene():
    rows, rng = plans.heldout()[:50], random.Random(0)
    things = [shapes.scene_for(row["spec"], rng) for row in rows]
    texts = [plans.plan_of(scene) for scene in things]
    assert [sorted(map(str, plans.read_plan(text))) for text in texts] == [sorted(map(str, each)) for each in things]
    asked = [row["spec"] for row in rows]
    assert plans.strict([], texts, spec=asked) == plans.graded([], texts, spec=asked) == [1.0] * 50
    assert plans.strict([], ["", "b2 red", "z9 red circle"], spec=asked[:3]) == [0.0] * 3


def test_the_text_denoiser_is_made_and_trained(tmp_path: Path):
    tokenizer = make_shapes_planner.build_tokenizer()
    batches = make_shapes_planner.Batches(tokenizer, 0.0, seed=0)
    texts, seen, known, weights = batches.batch()
    hidden = seen == tokenizer.mask_token_id
    assert torch.equal(texts[~hidden], seen[~hidden]) and torch.equal(weights > 0, hidden) and known[hidden].all()
    assert float(weights.sum(1).mean()) == pytest.approx(make_shapes_planner.LENGTH, rel=0.1), "unbiased: 1 / t of t"
    torch.manual_seed(0)
    script.write_model(tmp_path / "model", make_shapes_planner.build_model(tokenizer), tokenizer)
    letters = ["policy.sampling.estimator=coupled_mask", "rewards=[{name: 'unified_rl.tiny.twin:letters'}]"]
    row = trained("quickstart/plans_masked_text.yaml", tmp_path / "model", tmp_path / "run", *letters)
    assert row["grad_norm"] > 0 and row["replay_gap"] <= 1e-5

"""Conditions of a dataset: pictures by column name, and what a pipeline's call takes and needs."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
from PIL import Image

from unified_rl.data.prompts import PromptSampler
from unified_rl.data.sources import load_rows
from unified_rl.errors import RecipeError
from unified_rl.policies.conditions import check_batches, check_call, check_columns
from unified_rl.policies.pipeline_call import call_arguments
from unified_rl.recipe.policy import DiffusionSampling, PolicyBlock
from unified_rl.recipe.schema import EngineBlock


def dataset(folder: Path, *rows: dict) -> str:
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def check(name: str, *rows: dict, **settings) -> None:
    check_columns(getattr(diffusers, name), rows, settings=settings, where="data.prompts")


def test_pictures_of_any_column_reach_the_call_by_name(tmp_path: Path):
    row = {"prompt": "p", "image": "red.png", "mask_image": "blue.png", "strength": 0.5, "target": "x"}
    rows = load_rows(dataset(tmp_path, row), "data.prompts")
    prompts = PromptSampler(rows, seed=0, group_size=2, prompts_per_step=1).rollout(0, rank=0, world_size=1)
    given = call_arguments(diffusers.StableDiffusion3InpaintPipeline, prompts, {"height": 8})
    assert [picture.getpixel((0, 0)) for picture in given["image"]] == [(255, 0, 0)] * 2
    assert [picture.getpixel((0, 0)) for picture in given["mask_image"]] == [(0, 0, 255)] * 2
    assert given["strength"] == 0.5 and given["height"] == 8 and "target" not in given
    assert prompts[0].columns["target"] == "x"


def test_a_video_is_a_list_of_frames(tmp_path: Path):
    row = {"prompt": "p", "video": ["red.png", "blue.png"]}
    rows = load_rows(dataset(tmp_path, row), "data.prompts")
    prompts = PromptSampler(rows, seed=0, group_size=2, prompts_per_step=1).rollout(0, rank=0, world_size=1)
    videos = call_arguments(diffusers.WanVideoToVideoPipeline, prompts, {})["video"]
    assert [[frame.getpixel((0, 0)) for frame in video] for video in videos] == [[(255, 0, 0), (0, 0, 255)]] * 2
    with pytest.raises(RecipeError, match=r"rows.jsonl:1: video must be a list of its frames"):
        load_rows(dataset(tmp_path, {"prompt": "p", "video": "red.png"}), "data.prompts")
    with pytest.raises(RecipeError, match="no image file"):
        load_rows(dataset(tmp_path, {"prompt": "p", "mask_image": "green.png"}), "data.prompts")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("FluxPipeline", {"image": 0}, "FluxPipeline takes no 'image'"),
        ("FluxPipeline", {"mask_image": 0}, "FluxPipeline takes no 'mask_image'"),
        ("FluxPipeline", {"negative_prompt_3": ""}, "did you mean 'negative_prompt"),
        ("WanPipeline", {"video": 0}, "WanPipeline takes no 'video'"),
        ("WanPipeline", {"images": 0}, "WanPipeline takes no 'images'"),
        ("StableDiffusion3InpaintPipeline", {"image": 0}, "needs a column 'mask_image', which row 0 lacks"),
        ("StableDiffusion3Img2ImgPipeline", {}, "needs a column 'image'"),
        ("QwenImageEditPipeline", {}, "needs a column 'image'"),
        ("WanImageToVideoPipeline", {}, "needs a column 'image'"),
        ("StableDiffusionInstructPix2PixPipeline", {}, "needs a column 'image'"),
        ("DiTPipeline", {}, "needs a column 'class_labels'"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(name: str, row: dict, message: str):
    with pytest.raises(RecipeError, match="^data.prompts: .*" + message):
        check(name, {"prompt": "p", **row})


def test_a_later_row_that_lacks_its_picture_is_named():
    with pytest.raises(RecipeError, match="needs a column 'image', which row 1 lacks"):
        check("WanImageToVideoPipeline", {"prompt": "p", "images": [0]}, {"prompt": "p"})


def test_conditions_that_fit_pass():
    check("FluxPipeline", {"prompt": "p", "negative_prompt": "", "height": 32, "answer": "for a reward"})
    check("FluxKontextPipeline", {"prompt": "p"}, {"prompt": "q", "image": 0})
    check("WanImageToVideoPipeline", {"prompt": "p", "images": [0], "last_image": 0})
    check("DiTPipeline", {"prompt": "p"}, class_labels=[1])


@pytest.mark.parametrize(
    ("call", "exam", "message"),
    [
        (
            {"guidance_scal": 3.0},
            {},
            "policy.sampling.call: FluxPipeline takes no argument 'guidance_scal'; did you mean",
        ),
        ({}, {"call": {"image": 1}}, "evaluation.sampling.call: FluxPipeline takes no argument 'image'"),
        ({"guidance_scale": 3.0}, {"call": {"height": 8}}, None),
    ],
)
def test_settings_that_a_call_does_not_have_are_refused_before_it_loads(
    tmp_path: Path, call: dict, exam: dict, message: str | None
):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    block = PolicyBlock(model=str(tmp_path), family="diffusion", sampling=DiffusionSampling(call=call))
    with pytest.raises(RecipeError, match=message) if message else nullcontext():
        check_call(block, exam)


def test_one_negative_prompt_of_the_recipe_is_that_of_every_row(tmp_path: Path):
    """Many calls want as many as prompts; a row's own wins."""
    rows = load_rows(dataset(tmp_path, {"prompt": "p"}), "data.prompts")
    prompts = PromptSampler(rows, seed=0, group_size=2, prompts_per_step=1).rollout(0, rank=0, world_size=1)
    settings = {"negative_prompt": "blurry", "output_type": "pt"}
    given = call_arguments(diffusers.StableDiffusionPipeline, prompts, settings)
    assert given["negative_prompt"] == ["blurry"] * 2 and given["output_type"] == "pt"
    own = [replace(prompt, columns={"negative_prompt": "dark"}) for prompt in prompts]
    assert call_arguments(diffusers.StableDiffusionPipeline, own, settings)["negative_prompt"] == ["dark"] * 2


@pytest.mark.parametrize(
    ("name", "engine", "message"),
    [
        ("BriaFiboEditPipeline", {}, "engine.micro_batch: BriaFiboEditPipeline takes one row a call, not 16"),
        ("BriaFiboEditPipeline", {"micro_batch": 1, "rollout_batch": 2}, "engine.rollout_batch: .*, not 2; say 1"),
        ("BriaFiboEditPipeline", {"micro_batch": 1}, None),
        ("BriaFiboPipeline", {}, None),
    ],
)
def test_batches_for_a_class_of_one_row_a_call_are_refused_before_it_loads(
    tmp_path: Path, name: str, engine: dict, message: str | None
):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    block = PolicyBlock(model=str(tmp_path), family="diffusion", sampling=DiffusionSampling())
    with pytest.raises(RecipeError, match=message) if message else nullcontext():
        check_batches(block, EngineBlock(**engine))

"""`--tiny`: a whole recipe on a laptop, before GPUs are paid for.

The model is swapped for a tiny random twin of the same classes, pictures, texts and counts are shrunk, and `brightness`
(`letters` of texts), which a random model can move, is rewarded beside what the recipe rewards or in the place of what
needs models of its own. Everything else (preset, kernel, noise, adapter, prompts) stays as the recipe says. What was
changed is reported.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unified_rl.data.sources import ImageCell, load_rows, media_columns
from unified_rl.errors import RecipeError, nearest
from unified_rl.recipe.file import RECIPES, apply_override, find_recipe, locate, parse_recipe, read_recipe
from unified_rl.recipe.schema import Recipe

HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "stabilityai/stable-diffusion-3.5-medium": "StableDiffusion3Pipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
    "black-forest-labs/FLUX.1-Kontext-dev": "FluxKontextPipeline",
    "Qwen/Qwen-Image": "QwenImagePipeline",
    "Qwen/Qwen-Image-Edit": "QwenImageEditPipeline",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "WanPipeline",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "WanPipeline-2.2",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "WanImageToVideoPipeline",
    "Qwen/Qwen2.5-1.5B": "Qwen2ForCausalLM",
    "Qwen/Qwen2.5-1.5B-Instruct": "Qwen2ForCausalLM",
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen2_5_VLForConditionalGeneration",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2_5_VLForConditionalGeneration",
    "HuggingFaceTB/SmolVLM-Instruct": "Idefics3ForConditionalGeneration",
    "deepseek-community/Janus-Pro-7B": "JanusForConditionalGeneration",
    "inclusionAI/LLaDA2.1-mini": "EuroBertForMaskedLM",
}
"""Hub name -> class of the pipeline or model. Of one in a folder, the class is read from its index or config.
Versions of a class whose components differ have twins of their own (a key of `models.TWINS`)."""
OWN_CODE = ("inclusionAI/LLaDA2.1-mini",)
"""Models whose class is code of their repository: their twin is of another class that is sampled and scored alike."""
SIZE = 32
TEXT_TOKENS = {"max_sequence_length": 32}
CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusion3Pipeline": TEXT_TOKENS,
    "FluxPipeline": TEXT_TOKENS,
    "FluxKontextPipeline": {**TEXT_TOKENS, "max_area": SIZE * SIZE, "_auto_resize": False},
    "QwenImagePipeline": TEXT_TOKENS,
    "QwenImageEditPipeline": TEXT_TOKENS,
    "WanPipeline": {**TEXT_TOKENS, "num_frames": 5},
    "WanPipeline-2.2": {**TEXT_TOKENS, "num_frames": 5},
    "WanImageToVideoPipeline": {**TEXT_TOKENS, "num_frames": 5},
}
"""Call arguments of a twin beside height and width."""
LIGHT = (
    *("compressibility", "incompressibility", "shapes_strict", "shapes_graded", "edit_strict", "edit_graded"),
    *("answer", "answer_format", "think_format", "box_iou", "point_in_box", "numeric_answer", "multiple_choice"),
)
"""Rewards that run anywhere; those named by reference (file.py:name) are kept too."""
BUILDERS = ("models", "language")
"""Modules that twins are made by."""
STAND_INS = {name: f"unified_rl.tiny.twin:{name}" for name in ("brightness", "letters")}
NEW_TOKENS = 8
TRACE_TOKENS = 256
"""Where recorded texts are trained on, which must fit."""
NUM_STEPS = 4
NUM_ROWS = 8
BATCH = 4
RANK = 4


def brightness(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
    """Reward that stands in for others: how bright a picture, or a video's mean frame, is, 0 to 1."""
    return [float(np.mean([np.asarray(frame) for frame in _frames(one)])) / 255 for one in completions]


def brightness_with_gradient(prompts: Sequence, completions: Any, **columns: Any) -> Any:
    """The same of pictures [B, 3, H, W] in [0, 1], differentiable."""
    return completions.mean((1, 2, 3))


brightness.with_gradient = brightness_with_gradient  # type: ignore[attr-defined]


def letters(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
    """Reward that stands in for others: the share of a text's characters that are letters, 0 to 1."""
    return [sum(character.isalpha() for character in text) / max(1, len(text)) for text in completions]


def _frames(completion: Any) -> list:
    return completion if isinstance(completion, list) else [completion]


def tiny_recipe(name: str, overrides: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe shrunk to a laptop, with its twin written, and what was changed; overrides win over the shrinking.

    Raises:
        RecipeError: as `load_recipe`; if there is no twin of the model's class, or a library for it is missing.
    """
    path = find_recipe(name)
    raw, notes = shrink(read_recipe(path), path.parent)
    for override in overrides:
        apply_override(raw, override)
    return parse_recipe(raw, path.parent), notes


def shrink(raw: dict, folder: Path) -> tuple[dict, list[str]]:
    """A recipe's dictionary with everything made small; `folder` is where its relative paths are looked up."""
    raw = json.loads(json.dumps(raw))
    notes = _shrink_model(raw.setdefault("policy", {}), raw.get("data", {}), folder)
    if notes:  # what ships with the project is tiny throughout
        notes += _shrink_pictures(raw.get("data", {}), folder) + _shrink_rewards(raw)
    alone = raw.get("group_size") == 1
    counts = {"num_steps": 2, "group_size": 1 if alone else 4, "prompts_per_step": 8 if alone else 2}
    raw.update(counts)
    for key in ("epochs", "minibatches"):
        raw[key] = min(raw.get(key, 1), 2)
    engine = raw.get("engine", {})
    batch = min(engine.get("micro_batch", BATCH), BATCH)
    raw["engine"] = {**engine, "zero_stage": 0, "micro_batch": batch, "rollout_batch": batch}
    raw["evaluation"] = {**raw.get("evaluation", {}), "every": 2, "num_prompts": 4, "num_saved": 4}
    drawn = raw["evaluation"].get("sampling", {})
    if notes and "num_inference_steps" in drawn:
        drawn["num_inference_steps"] = min(drawn["num_inference_steps"], NUM_STEPS)
    raw["checkpoint"] = {**raw.get("checkpoint", {}), "every": 2}
    for block, key, most in (("optimizer", "warmup_steps", 1), ("objective", "train_steps", 2)):
        if isinstance(raw.get(block), dict) and isinstance(raw[block].get(key), int):
            raw[block][key] = min(raw[block][key], most)
    notes.append(f"counts: {', '.join(f'{key} {value}' for key, value in counts.items())}, ZeRO stage 0")
    return raw, notes


def _shrink_model(policy: dict, data: dict, folder: Path) -> list[str]:
    local = next((base / policy["model"] for base in (folder, Path.cwd()) if (base / policy["model"]).exists()), None)
    if local is not None and local.resolve().is_relative_to(RECIPES.resolve()):
        return []  # ships with the project and is tiny
    name, model = _class_of(policy["model"], local), policy["model"]
    policy.update(model=str(_twin(name)), revision=None)
    policy.pop("trust_remote_code", None)
    written = _shrink_model(policy["writer"], data, folder) if policy.get("writer") else []
    sampling, adapter = policy.setdefault("sampling", {}), policy.get("adapter", {})
    if name in _pipeline_twins():
        policy["family"] = "diffusion"
        _shrink_denoising(sampling, name)
    else:
        _shrink_texts(sampling, TRACE_TOKENS if data.get("rollouts") else NEW_TOKENS)
    if adapter.get("kind") == "lora" and adapter.get("rank", 0) > RANK:
        policy["adapter"] = {**adapter, "rank": RANK, "alpha": adapter.get("alpha", 64.0) * RANK / adapter["rank"]}
    size = f", {SIZE} x {SIZE} px" if name in _pipeline_twins() else ""
    classes = "another class, since its own is code of its repository" if model in OWN_CODE else "the same classes"
    notes = [f"policy.model: {model} is stood in for by a random {name} of {classes}{size}"]
    if adapter.get("kind", "none") == "none" and policy.get("dtype", "float32") != "float32":
        policy["dtype"] = "float32"
        notes.append("policy.dtype: float32, because full fine-tuning in less wants ZeRO")
    return notes + [note.replace("policy.", "policy.writer.", 1) for note in written]


def _shrink_denoising(sampling: dict, name: str) -> None:
    sampling["num_inference_steps"] = steps = min(sampling.get("num_inference_steps", NUM_STEPS), NUM_STEPS)
    if sampling.get("noise_steps"):
        sampling["noise_steps"] = min(sampling["noise_steps"], 2)
    if sampling.get("noise_range"):
        first, stop = sampling["noise_range"]
        first = min(first, 1)
        sampling["noise_range"] = [first, max(first + 2, min(stop, steps))]
    call = {"height": SIZE, "width": SIZE, **CALLS.get(name, {})}
    sampling["call"] = {**sampling.get("call", {}), **call}


def _shrink_texts(sampling: dict, most: int) -> None:
    """Short texts, and no limit to prompts, which have more tokens where these are characters."""
    sampling.pop("max_prompt_tokens", None)
    for key, limit in (("max_new_tokens", most), ("block_length", NEW_TOKENS), ("num_inference_steps", NUM_STEPS)):
        if key in sampling:
            sampling[key] = min(sampling[key], limit)
    if isinstance(sampling.get("think"), dict):
        _shrink_texts(sampling["think"], most)


def _pipeline_twins() -> Sequence[str]:
    from unified_rl.tiny.models import TWINS

    return list(TWINS)


def _class_of(model: str, local: Path | None) -> str:
    from unified_rl.tiny import language

    if local is not None and (local / "model_index.json").is_file():
        name = json.loads((local / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    elif local is not None and (local / "config.json").is_file():
        name = json.loads((local / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    elif model in HUB:
        name = HUB[model]
    else:
        raise RecipeError(f"--tiny: no twin of {model} is known{nearest(model, list(HUB))}; known: {', '.join(HUB)}")
    known = [*_pipeline_twins(), *language.TWINS]
    if name not in known:
        raise RecipeError(f"--tiny: no twin of {name}; there are twins of {', '.join(known)}")
    return name


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unified_rl"


def _twin(name: str) -> Path:
    """The folder of a class's twin, written if it is not there yet."""
    from unified_rl.tiny import models as tiny_models

    code = b"".join(path.read_bytes() for path in (Path(__file__).with_name(f"{file}.py") for file in BUILDERS))
    version = hashlib.sha256(code).hexdigest()[:8]
    folder = _cache() / f"twins-{version}" / name
    try:
        tiny_models.write_twin(name, folder)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"--tiny: {name} cannot be built here: {' '.join(str(error).split())[:200]}") from error
    return folder


def _shrink_pictures(data: dict, folder: Path) -> list[str]:
    """Replace datasets with pictures by files of their first rows, the pictures shrunk to SIZE."""
    notes = []
    for key in ("prompts", "evaluation"):
        if not data.get(key):
            continue
        rows = load_rows(locate(data[key], folder), f"data.{key}")[:NUM_ROWS]
        if any(row.get("images") or media_columns(row) for row in rows):
            version = hashlib.sha256(data[key].encode()).hexdigest()[:8]
            small = _cache() / f"data-{version}"
            small.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(_small_row(row), default=str) + "\n" for row in rows]
            (small / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
            notes.append(f"data.{key}: the first {len(rows)} rows of {data[key]}, pictures {SIZE} x {SIZE} px")
            data[key] = str(small / "rows.jsonl")
    return notes


def _small_row(row: dict) -> dict:
    small = dict(row)
    for name in ("images", *media_columns(row)):
        if name in row:
            cells = row[name]
            small[name] = [_small(cell) for cell in cells] if isinstance(cells, list) else _small(cells)
    return small


def _small(cell: ImageCell) -> str:
    """A picture, SIZE x SIZE, as a data-URI."""
    buffer = io.BytesIO()
    cell.open().resize((SIZE, SIZE)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _shrink_rewards(raw: dict) -> list[str]:
    """Replace the rewards that need models of their own, and add what a random model can learn."""
    rewards = raw.get("rewards") or []
    by = "letters" if raw["policy"].get("family") in ("causal_lm", "masked_text") else "brightness"
    heavy = [block for block in rewards if block["name"] not in LIGHT and ":" not in block["name"]]
    weight = sum(block.get("weight", 1.0) for block in heavy) or 1.0
    raw["rewards"] = [*(block for block in rewards if block not in heavy), {"name": STAND_INS[by], "weight": weight}]
    if not heavy:
        return [f"rewards: {by} beside the recipe's own"]
    return [f"rewards: {', '.join(block['name'] for block in heavy)} stood in for by {by}"]

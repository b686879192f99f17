"""`unified-rl export`: a run's weights as a folder that diffusers, transformers or peft load by themselves.

    peft          the adapter in peft's format: PeftModel.from_pretrained(denoiser or model, OUT)
    diffusers     LoRA: pipeline.load_lora_weights(OUT); else DiffusionPipeline.from_pretrained(OUT)
                  (a LoRA of two denoisers, in either format: OUT/transformer and OUT/transformer_2, of which diffusers
                  loads the second one with load_into_transformer_2=True)
    transformers  AutoModel...from_pretrained(OUT); of a LoRA run the adapter, which transformers puts on its base model
    merged        the whole model, an adapter merged into it: DiffusionPipeline or AutoModel...from_pretrained(OUT)

What a checkpoint holds says what it is of; no policy is built.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unified_rl.errors import RecipeError
from unified_rl.planning.weights import DENOISERS
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.policy import PolicyBlock
from unified_rl.run_folder.checkpoint import CheckpointError, list_checkpoints, verify

Format = Literal["peft", "diffusers", "transformers", "merged"]
PIPELINE_LORA = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
CALL_DEFAULTS = "call_defaults.json"
CRITIC = "critic.safetensors"
"""Of no use outside training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is exported."""

    block: PolicyBlock
    folder: Path
    """What the policy's `save` wrote."""

    @property
    def is_pipeline(self) -> bool:
        return not any((self.folder / name).is_file() for name in (PEFT_CONFIG, "config.json"))

    @property
    def is_lora(self) -> bool:
        return (self.folder / PEFT_CONFIG).is_file() or bool(self.adapters)

    @property
    def adapters(self) -> dict[str, Path]:
        """Of a pipeline's LoRA: by denoiser the folder of its adapter. Several denoisers have a folder each."""
        if (self.folder / PIPELINE_LORA).is_file():
            return {"": self.folder}
        return {path.parent.name: path.parent for path in sorted(self.folder.glob(f"*/{PIPELINE_LORA}"))}


def export(
    run: Path, out: Path, *, form: Format, weights: Literal["trained", "ema"] = "trained", checkpoint: str = "newest"
) -> Path:
    """Write the weights of a run into the new folder `out`; returns the checkpoint that they are of.

    Args:
        checkpoint: "newest", "best" (by guard.judge, else the exam's reward) or a step.

    Raises:
        RecipeError: if the run, the checkpoint or such weights are not there, the format does not fit them, or `out`
            holds something.
    """
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{run}: no run's folder, which holds recipe.yaml and checkpoints/")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: is there already; name a new folder")
    recipe = load_recipe(str(run / "recipe.yaml"))
    chosen = choose(run, checkpoint, recipe.guard.judge)
    folder = chosen / ("policy" if weights == "trained" else weights)
    if not folder.is_dir():
        raise RecipeError(f"{chosen.name}: holds no {weights} weights; a run keeps them with the block ema")
    try:
        verify(chosen)
    except CheckpointError as error:
        raise RecipeError(str(error)) from error
    sources = {out: Source(block=recipe.policy, folder=folder)}
    if recipe.policy.writer is not None:  # two models, each in a folder of its own if it was trained
        blocks = {"writer": recipe.policy.writer.block, "drawer": recipe.policy}
        parts = {name: block for name, block in blocks.items() if (folder / name).is_dir()}
        sources = {out / name: Source(block=block, folder=folder / name) for name, block in parts.items()}
    writers = [(_writer(source, form), source, place) for place, source in sources.items()]
    for writer, source, place in writers:
        place.mkdir(parents=True, exist_ok=True)
        writer(source, place)
    return chosen


def choose(run: Path, checkpoint: str, judge: str | None = None) -> Path:
    """The folder of a run's checkpoint: "newest", "best" (by the reward `judge`; None: by the trained one) or a step.

    Raises:
        RecipeError: if it is not there.
    """
    found = {int(path.name.removeprefix("step_")): path for path in list_checkpoints(run)}
    steps = ", ".join(map(str, found)) or "none"
    if not found:
        raise RecipeError(f"{run}: has no complete checkpoint yet")
    if checkpoint == "newest":
        return found[max(found)]
    if checkpoint == "best":
        exams = run / "eval.jsonl"
        rows = [json.loads(line) for line in exams.read_text().splitlines()] if exams.is_file() else []
        key = "reward" if judge is None else f"rewards/{judge}/mean"
        rewards = {row["step"]: row[key] for row in rows if row["step"] in found and row[key] is not None}
        if not rewards:
            raise RecipeError(f"--checkpoint best: no checkpoint of {run} (steps {steps}) was examined; name a step")
        return found[max(rewards, key=lambda step: (rewards[step], step))]
    if not checkpoint.isdecimal() or int(checkpoint) not in found:
        raise RecipeError(f"--checkpoint {checkpoint}: there are {steps}; or newest, best")
    return found[int(checkpoint)]


def _writer(source: Source, form: Format) -> Callable[[Source, Path], None]:
    """
    Raises:
        RecipeError: if the format is not one for such weights.
    """
    what = f"{'a LoRA' if source.is_lora else 'a full fine-tuning'} of {source.block.model}"
    if form == "peft" and not source.is_lora:
        raise RecipeError(f"--format peft: the run is {what}, which has no adapter; use merged")
    if form == "diffusers" and not source.is_pipeline:
        raise RecipeError(f"--format diffusers: the run is {what}, which is no pipeline; use transformers or merged")
    if form == "transformers" and source.is_pipeline:
        raise RecipeError(f"--format transformers: the run is {what}, a pipeline; use diffusers or merged")
    if source.is_pipeline:
        lora = {"peft": _pipeline_peft, "diffusers": _pipeline_lora}
        return lora.get(form, _whole_pipeline) if source.is_lora else _whole_pipeline
    return _merged_model if source.is_lora and form == "merged" else _copy_model


def _pipeline_peft(source: Source, out: Path) -> None:
    """peft's files from those of diffusers: the same tensors under peft's names, the same configuration."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    for name, folder in source.adapters.items():
        state, config = _read_lora(folder)
        (out / name).mkdir(exist_ok=True)
        save_file({f"{PEFT_PREFIX}{key}": tensor for key, tensor in state.items()}, out / name / PEFT_WEIGHTS)
        LoraConfig(**config, base_model_name_or_path=source.block.model).save_pretrained(str(out / name))


def _pipeline_lora(source: Source, out: Path) -> None:
    """The file that the pipeline's own `load_lora_weights` reads.

    Raises:
        RecipeError: if diffusers has no such method for this pipeline.
    """
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(source.block.model, revision=source.block.revision)
    kind: Any = getattr(diffusers, index["_class_name"])
    part = next(name for name in DENOISERS if name in index)
    if not hasattr(kind, "save_lora_weights") or part not in kind._lora_loadable_modules:
        raise RecipeError(f"--format diffusers: {kind.__name__} loads no LoRA of its {part}; use peft or merged")
    for name, folder in source.adapters.items():
        state, config = _read_lora(folder)
        kind.save_lora_weights(out / name, **{f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config})


def _whole_pipeline(source: Source, out: Path) -> None:
    """The pipeline with what was trained of it, adapters merged."""
    import torch
    from diffusers import DiffusionPipeline

    block = source.block
    index = DiffusionPipeline.load_config(block.model, revision=block.revision)
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipeline: Any = DiffusionPipeline.from_pretrained(
        block.model, revision=block.revision, dtype=getattr(torch, block.dtype), **absent
    )
    if source.is_lora:
        first = next(name for name in DENOISERS if name in index)
        for name, folder in source.adapters.items():
            denoiser = getattr(pipeline, name or first)
            denoiser.load_lora_adapter(folder, prefix=None, weight_name=PIPELINE_LORA)
            denoiser.fuse_lora()
            denoiser.unload_lora()
    else:
        for saved in (path.parent for path in source.folder.glob("*/config.json")):
            trained = type(getattr(pipeline, saved.name)).from_pretrained(saved, dtype=getattr(torch, block.dtype))
            setattr(pipeline, saved.name, trained)
    pipeline.save_pretrained(out)
    defaults = Path(block.model) / CALL_DEFAULTS
    if defaults.is_file():
        shutil.copy(defaults, out)


def _read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and peft configuration of what a denoiser's `save_lora_adapter` wrote."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(folder / PIPELINE_LORA, "pt") as file:
        config = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    config = {key: value for key, value in config.items() if key not in ("peft_type", "base_model_name_or_path")}
    return load_file(folder / PIPELINE_LORA), config


def _copy_model(source: Source, out: Path) -> None:
    """A transformers model or its adapter as it was saved; an adapter names its base model."""
    for path in source.folder.iterdir():
        if path.name != CRITIC:
            shutil.copy(path, out) if path.is_file() else shutil.copytree(path, out / path.name)
    config = out / PEFT_CONFIG
    if config.is_file():
        named = {**json.loads(config.read_text()), "base_model_name_or_path": source.block.model}
        config.write_text(json.dumps(named, indent=2))


def _merged_model(source: Source, out: Path) -> None:
    """A transformers model with its adapter merged, and what its processor needs."""
    import torch
    import transformers
    from peft import PeftModel

    block = source.block
    config = transformers.AutoConfig.from_pretrained(block.model, revision=block.revision)
    kind: Any = getattr(transformers, config.architectures[0])
    base = kind.from_pretrained(block.model, revision=block.revision, dtype=getattr(torch, block.dtype))
    PeftModel.from_pretrained(base, str(source.folder)).merge_and_unload().save_pretrained(out)
    for path in source.folder.iterdir():
        if path.is_file() and path.name not in (PEFT_CONFIG, PEFT_WEIGHTS, CRITIC, "README.md"):
            shutil.copy(path, out)

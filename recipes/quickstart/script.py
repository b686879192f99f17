"""What the scripts that make checkpoints share: their arguments, and how a checkpoint gets into its folder."""

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that every script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, required=True, help="checkpoint folder to write; replaced if it exists")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=1)
    return made


def begin(with_arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, after threads and seeds are set as it says."""
    args = with_arguments.parse_args()
    if not is_free(args.output):
        with_arguments.error(f"{args.output} exists and is no checkpoint; only a checkpoint is replaced")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    return args


def autocast() -> torch.autocast:
    """bfloat16 where this CPU has instructions for it; in other CPUs its products take some 20 times float32's time."""
    able = torch.cpu.get_capabilities()
    fast = any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast)


def is_free(folder: Path) -> bool:
    """Whether a checkpoint may be written there: nothing, an empty folder, or an older checkpoint."""
    if any((folder / name).is_file() for name in ("model_index.json", "config.json")) or not folder.exists():
        return True
    return folder.is_dir() and not any(folder.iterdir())


@contextmanager
def in_place_of(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which replaces `folder` in the end, so that nobody meets half a checkpoint."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    for left_over in (fresh, old):
        shutil.rmtree(left_over, ignore_errors=True)
    fresh.mkdir()
    yield fresh
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_pipeline(pipeline: Any, folder: Path, *, denoiser: str, call_defaults: dict[str, Any]) -> None:
    """Write a diffusers pipeline, its denoiser in 16 bits, with the call arguments that it wants."""
    stored = deepcopy(pipeline)
    getattr(
        stored, denoiser
    ).half()  # the small parts stay in fp32, which transformers would otherwise not load them in
    stored.save_pretrained(folder)
    for file in folder.rglob("*.json"):  # diffusers writes down the folder that a model came from
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not line.startswith('  "_name_or_path"')))
    (folder / "call_defaults.json").write_text(json.dumps(call_defaults, indent=2) + "\n")


def write_model(folder: Path, model: Any, processor: Any, card: str = "") -> None:
    """Write a transformers model with its processor and its card in place of what is in `folder`."""
    with in_place_of(folder) as fresh:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        if card:
            (fresh / "README.md").write_text(card)

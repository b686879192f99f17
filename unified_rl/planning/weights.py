"""Sizes of a model's weights from the headers of its safetensors files: no torch, no weights read."""

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unified_rl.errors import RecipeError
from unified_rl.recipe.policy import PIPELINES, VISION, PolicyBlock

DENOISERS = ("transformer", "unet", "prior")
"""Folders of a diffusers pipeline that hold what is trained; the first one that exists, and those that take its place
at some steps (transformer_2)."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_MAX_HEADER = 100_000_000  # the format's own limit
# says what policies/lora.py does, which cannot be imported without torch
_ATTENTION = re.compile(
    r"(?:^|[._])(?:to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj|[qkvo]_proj|out_proj|qkv_proj|qkv|query|key|value|c_attn)$"
)
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a model needs at least; activations are not counted."""

    components: dict[str, int]
    """Parameters of each component folder ("model" for a transformers model)."""
    trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """Adam's two moments in float32."""
    reference_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.reference_bytes


def measure(policy: PolicyBlock, *, with_reference: bool) -> Sizes | None:
    """The sizes of a policy, or None if its weights are not here as safetensors."""
    folders = _component_folders(Path(policy.model), policy.family)
    return sizes_of(policy, {name: read_shapes(path) for name, path in folders.items()}, with_reference=with_reference)


def sizes_of(policy: PolicyBlock, components: dict[str, Shapes], *, with_reference: bool) -> Sizes | None:
    """The sizes of a policy, or None if what is trained is not among the components.

    Args:
        components: shapes of the parameters of each component folder ("model" for a transformers model).
        with_reference: counts the frozen copy that a KL term needs; an adapter needs none, it is switched off instead.
    """
    components = {name: shapes for name, shapes in components.items() if shapes}
    names = trained_components(components)
    if not names:
        return None
    # policies/denoisers.py names parameters of several denoisers by their component
    prefix = (lambda name: f"{name}.") if len(names) > 1 else (lambda name: "")
    trainable = {f"{prefix(name)}{key}": shape for name in names for key, shape in components[name].items()}
    counts = {name: sum(map(math.prod, shapes.values())) for name, shapes in components.items()}
    full = policy.adapter.kind == "none"
    trained = _count_trained(policy, trainable)
    weights = sum(counts.values()) * BYTES[policy.dtype] + (0 if full else 4 * trained)
    return Sizes(
        components=counts,
        trained=trained,
        weight_bytes=weights,
        gradient_bytes=4 * trained,
        optimizer_bytes=8 * trained,
        reference_bytes=sum(map(math.prod, trainable.values())) * BYTES[policy.dtype] if full and with_reference else 0,
    )


def trained_components(components: Iterable[str]) -> list[str]:
    """The components that are trained: the denoisers of a pipeline, or the model."""
    found = [*components]
    first = next((name for name in (*DENOISERS, "model") if name in found), None)
    return [name for name in found if name == first or (first != "model" and name.startswith(f"{first}_"))]


def read_shapes(folder: Path) -> Shapes:
    """Name -> shape of every tensor of a component's folder; empty if it has no safetensors."""
    shapes: Shapes = {}
    for file in _weight_files(folder):
        shapes |= _read_header(file)
    return shapes


def _component_folders(folder: Path, family: str) -> dict[str, Path]:
    if family not in PIPELINES:
        return {"model": folder}
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}


def _weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` would read: variants (fp16) beside the default ones are not counted twice."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        listed = json.loads(min(indices, key=lambda path: len(path.name)).read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(listed.values()))]
    default = [folder / f"{name}.safetensors" for name in ("model", "diffusion_pytorch_model")]
    return [path for path in default if path.is_file()] or sorted(folder.glob("*.safetensors"))[:1]


def _read_header(file: Path) -> Shapes:
    """The format: 8 bytes of little-endian length, then that many bytes of JSON.

    Raises:
        RecipeError: if the file is missing, cut off, or no safetensors file (a Git LFS pointer, for instance).
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, _MAX_HEADER)))
    except (OSError, struct.error, ValueError) as error:
        raise RecipeError(f"policy.model: {file} is no safetensors file ({error}); download it again") from error
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _count_trained(policy: PolicyBlock, shapes: Shapes) -> int:
    adapter, patterns = policy.adapter, policy.train
    if policy.family not in PIPELINES and (patterns is None or adapter.kind == "lora"):
        shapes = {name: shape for name, shape in shapes.items() if not VISION.search(name)}
    if adapter.kind == "lora":
        adapted = [shape for name, shape in shapes.items() if len(shape) == 2 and _is_target(name, adapter.targets)]
        return sum(adapter.rank * (rows + columns) for rows, columns in adapted)
    if patterns is not None:
        shapes = {name: shape for name, shape in shapes.items() if any(re.search(one, name) for one in patterns)}
    return sum(map(math.prod, shapes.values()))


def _is_target(name: str, targets: list[str] | str) -> bool:
    layer = name.removesuffix(".weight")
    if isinstance(targets, str):
        return _ATTENTION.search(layer) is not None
    return any(layer == target or layer.endswith(f".{target}") for target in targets)

"""Numbers that public implementations gave on random inputs; `tests/oracles/*.json` name the sources."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "oracles"


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of an oracle file (its `cases` among it), and its arrays."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), tensors


def of_case(tensors: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Tensor]:
    """The arrays of one case, by field."""
    prefix = case["name"] + "_"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

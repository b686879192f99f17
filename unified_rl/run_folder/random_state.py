"""The state of a process's global random generators, as JSON.

The trainer itself draws from numbers (seed, rollout, row); these generators belong to what it calls: rewards, data
functions, a model's own layers.
"""

import base64
import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, rank: int) -> None:
    """Seed the generators of Python, numpy and torch, each process with numbers of its own."""
    own = random.Random(f"{seed}/{rank}")
    random.seed(own.getrandbits(64))
    np.random.seed(own.getrandbits(32))
    torch.manual_seed(own.getrandbits(63))


def capture() -> dict[str, Any]:
    """The generators of Python, numpy and torch (and of this process's GPU) as they are now."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, _encode(np.array(words, dtype=np.uint64)), gauss],
        "numpy": [kind, _encode(np.asarray(keys, dtype=np.uint32)), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state().numpy()),
        "cuda": _encode(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_available() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Go on from what `capture` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(_decode(words, np.uint64).tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, _decode(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.from_numpy(_decode(state["torch"], np.uint8)))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_decode(state["cuda"], np.uint8)))


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _decode(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()

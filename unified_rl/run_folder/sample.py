"""A sample as a run keeps and shows it."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from PIL import Image


class Sample(TypedDict):
    """One generated sample, as it is saved and shown."""

    prompt: str | Sequence[Mapping[str, Any]]
    """Text or chat messages."""
    text: str | None
    images: Sequence[Image.Image]
    rewards: Mapping[str, float]
    """Unweighted, by the reward's name; NaN where it abstained."""
    seed: int
    condition_images: Sequence[Image.Image]
    arrays: NotRequired[Sequence[np.ndarray]]
    """What is no picture: a waveform, or latents that were not decoded."""

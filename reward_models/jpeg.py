"""Rewards from the size of a picture's JPEG file, the first two tasks of DDPO.

Kevin Black, Michael Janner, Yilun Du, Ilya Kostrikov and Sergey Levine, "Training Diffusion Models with Reinforcement
Learning", arXiv:2305.13301 (2023): a picture is written as a JPEG of quality 95 and its size, in kB of 1000 bytes,
is the reward (incompressibility) or the reward's negative (compressibility). There are no labels and no network, so
these two are the usual first test of an RL loop for image models.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

BYTES_PER_KB = 1000.0


def jpeg_kilobytes(image: Image.Image, quality: int = 95) -> float:
    """The size of `image` written as an RGB JPEG, in kB (1000 bytes); always above 0.

    The file's header (about 0.6 kB) counts, so that very small pictures do not go below it.
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return len(buffer.getvalue()) / BYTES_PER_KB


def compressibility(
    prompts: Sequence[Any], completions: Sequence[Image.Image], quality: int = 95, **columns: Any
) -> list[float]:
    """Minus the JPEG size in kB: below 0, higher for smoother pictures (Black et al., arXiv:2305.13301).

    Args:
        prompts: one per picture; not looked at.
        completions: the PIL pictures.
        quality: JPEG quality, 1 to 95 (95 in the paper).
        **columns: the data set's other columns; not looked at.
    """
    return [-jpeg_kilobytes(image, quality) for image in completions]


def incompressibility(
    prompts: Sequence[Any], completions: Sequence[Image.Image], quality: int = 95, **columns: Any
) -> list[float]:
    """The JPEG size in kB: above 0, higher for busier pictures (Black et al., arXiv:2305.13301).

    Args:
        prompts: one per picture; not looked at.
        completions: the PIL pictures.
        quality: JPEG quality, 1 to 95 (95 in the paper).
        **columns: the data set's other columns; not looked at.
    """
    return [jpeg_kilobytes(image, quality) for image in completions]

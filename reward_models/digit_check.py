"""A label-free reward: does the picture show the digit that the prompt names?

The judge is a small scikit-learn classifier fitted, at first use (about a second), on `load_digits`: 1797 real
handwritten 8x8 digits that come inside the scikit-learn wheel, so nothing is downloaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8
FAINTEST_CONTRAST = 0.2
_DIGIT = re.compile(r"\b(?:(" + "|".join(DIGIT_WORDS) + r")|([0-9]))\b", re.IGNORECASE)


def named_digit(prompt: Any) -> int:
    """The first digit that `prompt` names, as a word ("a handwritten seven") or a lone numeral ("the digit 7").

    Raises:
        ValueError: the prompt names none.
    """
    found = _DIGIT.search(str(prompt))
    if found is None:
        raise ValueError(f"digit_check needs a digit (zero to nine) in the prompt, and found none in {prompt!r}")
    return DIGIT_WORDS.index(found[1].lower()) if found[1] else int(found[2])


def strokes(grey: np.ndarray) -> np.ndarray:
    """How far each pixel is from the paper, in [0, 1]: pictures (n, 8, 8) in [0, 1] to features (n, 64).

    The paper's level is the median of the left and right columns, so dark on light and light on dark count alike.
    Each picture is scaled by its strongest stroke, but a contrast under 0.2 is left faint, lest blank paper become
    a digit by its grain alone.
    """
    paper = np.median(grey[:, :, [0, -1]], axis=(1, 2), keepdims=True)
    contrast = np.abs(grey - paper)
    peak = contrast.max(axis=(1, 2), keepdims=True)
    return (contrast / np.maximum(peak, FAINTEST_CONTRAST)).reshape(len(grey), -1)


@functools.cache
def _classifier() -> Any:
    """The fitted classifier: `predict_proba` of features (n, 64) gives (n, 10), rows that sum to 1."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    images, labels = load_digits(return_X_y=True)
    grey = 1.0 - images.reshape(-1, SIDE, SIDE) / 16.0
    grain = np.random.default_rng(0).normal(0.0, 0.06, grey.shape)
    features = np.concatenate([strokes(grey), strokes(grey + grain)])
    judge = CalibratedClassifierCV(SVC(gamma=0.1, C=4.0), ensemble=False, cv=3)
    return judge.fit(features, np.concatenate([labels, labels]))


def digit_check(prompts: Sequence[Any], completions: Sequence[Image.Image], **columns: Any) -> list[float]:
    """The probability, in [0, 1], that each picture shows the digit named in its prompt; about 0.1 by chance.

    Args:
        prompts: one per picture, each naming a digit: "a handwritten seven", "the digit 7".
        completions: PIL pictures of any size and mode; compared at 8x8 pixels, in grey.
        **columns: the data set's other columns; not looked at.
    """
    if not completions:
        return []
    small = [image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for image in completions]
    grey = np.stack([np.asarray(image, dtype=np.float64) for image in small]) / 255.0
    probabilities = _classifier().predict_proba(strokes(grey))
    wanted = [named_digit(prompt) for prompt in prompts]
    return [float(row[digit]) for row, digit in zip(probabilities, wanted, strict=True)]

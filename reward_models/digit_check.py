"""A label-free reward: does the picture show the digit that the prompt names?

The judge is a small scikit-learn classifier fitted, at first use (a few seconds), on `load_digits`: 1797 real
handwritten 8x8 digits that come inside the scikit-learn wheel, so nothing is downloaded. It knows an eleventh class
besides the digits, "no digit", so that blank paper and noise earn nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from reward_models.text_rules import asked_for

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8
FAINTEST_CONTRAST = 0.2
_DIGIT = re.compile(r"\b(?:(" + "|".join(DIGIT_WORDS) + r")|([0-9]))\b", re.IGNORECASE)


def named_digit(prompt: Any) -> int:
    """The first digit that `prompt` names, as a word ("a handwritten seven") or a lone numeral ("the digit 7").

    Raises:
        ValueError: the prompt names none.
    """
    found = _DIGIT.search(asked_for(prompt))
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


def _not_digits(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Examples of no digit: blank paper, paper with grain, plain noise, and digits with their pixels shuffled."""
    count = len(features) // 3
    grain = rng.normal(0.0, 1.0, (count, SIDE, SIDE)) * rng.uniform(0.0, 0.4, (count, 1, 1))
    noise = rng.uniform(0.0, 1.0, (count, SIDE, SIDE))
    blank = np.zeros((count // 10, SIDE, SIDE))
    shuffled = rng.permuted(features[rng.permutation(len(features))[:count]], axis=1)
    return np.concatenate([strokes(blank), strokes(0.5 + grain), strokes(noise), shuffled])


@functools.cache
def _classifier() -> Any:
    """The fitted classifier: `predict_proba` of features (n, 64) gives (n, 11), the digits and last "no digit"."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    grey = 1.0 - images.reshape(-1, SIDE, SIDE) / 16.0
    digits = np.concatenate([strokes(grey), strokes(grey + rng.normal(0.0, 0.06, grey.shape))])
    others = _not_digits(digits, rng)
    # Without a number of its own it would take one from numpy's global generator, in the middle of somebody's run.
    judge = CalibratedClassifierCV(SVC(gamma=0.1, C=4.0, random_state=0), ensemble=False, cv=3)
    return judge.fit(np.concatenate([digits, others]), np.concatenate([labels, labels, np.full(len(others), 10)]))


def digit_check(prompts: Sequence[Any], completions: Sequence[Image.Image], **columns: Any) -> list[float]:
    """The probability, in [0, 1], that each picture shows the digit named in its prompt.

    Real digits score about 0.97 under the right prompt, and 0.00 under a wrong one; blank paper and noise score 0.

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

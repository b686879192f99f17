"""Grounding: boxes and points that a reply names, against the truth."""

import re
from collections.abc import Sequence
from typing import Any

from reward_models.text_rules import reply

Box = Sequence[float]
"""x0, y0, x1, y1."""
_NUMBERS = re.compile(r"-?\d+(?:\.\d+)?")
_BRACKETS = re.compile(r"[\[(]([^\[\]()]*)[\])]")


def numbers_of(text: str, count: int) -> list[float] | None:
    """The last bracket with exactly `count` numbers."""
    for inside in reversed(_BRACKETS.findall(text)):
        found = [float(number) for number in _NUMBERS.findall(inside)]
        if len(found) == count:
            return found
    return None


def intersection_over_union(first: Box, second: Box) -> float:
    """Of two boxes; 0 for boxes without area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - shared
    return shared / union if union > 0.0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def box_iou(
    prompts: Sequence[Any], completions: Sequence[Any], *, box: Sequence[Box], at_least: float = 0.0, **_: Any
) -> list[float]:
    """Intersection over union of the reply's last box [x0, y0, x1, y1] with the column `box`, 0 to 1.

    Args:
        at_least: lower values count as 0; with 0.5, for instance, the usual threshold of detection.
    """
    scores = []
    for completion, truth in zip(completions, box, strict=True):
        found = numbers_of(reply(completion), 4)
        value = intersection_over_union(found, truth) if found else 0.0
        scores.append(value if value >= at_least else 0.0)
    return scores


def point_in_box(prompts: Sequence[Any], completions: Sequence[Any], *, box: Sequence[Box], **_: Any) -> list[float]:
    """1.0 where the reply's last point (x, y) lies in the column `box`, else 0.0."""
    scores = []
    for completion, (left, top, right, bottom) in zip(completions, box, strict=True):
        found = numbers_of(reply(completion), 2)
        scores.append(float(found is not None and left <= found[0] <= right and top <= found[1] <= bottom))
    return scores

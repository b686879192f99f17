"""GenEval's question: are the asked objects there, as many, in the asked colours and places?

Ghosh et al., "GenEval", arXiv:2310.11513, as its `evaluate_images.py` asks it; its prompts' metadata (`include`,
`exclude`, `tag`) are the columns. Any detector serves: a function from a PIL picture to a list of `{"class", "score",
"box": [x0, y0, x1, y1], "color"}`, of which "color" is only needed where colours are asked for. The licence is the
detector's.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

Found = Mapping[str, Any]
NEAR = 0.1
"""Objects whose centres differ by less than this share of their summed sizes are not beside each other."""


class ObjectCheck:
    """The share of conditions that a picture meets, 0 to 1; `strict`: 1.0 if all, else 0.0."""

    def __init__(
        self, detector: str, threshold: float = 0.3, counting_threshold: float = 0.9, strict: bool = False
    ) -> None:
        """Args:
        detector: `package.module:name` of the function.
        threshold: detections count if their score is higher.
        counting_threshold: the same where the column `tag` says "counting".
        """
        module, _, name = detector.partition(":")
        self.detect = getattr(importlib.import_module(module), name)
        self.threshold, self.counting_threshold, self.strict = threshold, counting_threshold, strict

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Image.Image],
        *,
        include: Sequence[Sequence[Mapping[str, Any]]],
        exclude: Sequence[Any] | None = None,
        tag: Sequence[str | None] | None = None,
        **_: Any,
    ) -> list[float]:
        scores = []
        for row, picture in enumerate(completions):
            threshold = self.counting_threshold if tag and tag[row] == "counting" else self.threshold
            seen = [found for found in self.detect(picture) if found["score"] > threshold]
            met = conditions(seen, include[row], (exclude[row] if exclude else None) or [])
            scores.append(float(all(met)) if self.strict else sum(met) / len(met))
        return scores


def conditions(
    seen: Sequence[Found], include: Sequence[Mapping[str, Any]], exclude: Sequence[Mapping[str, Any]]
) -> list[bool]:
    """Each condition of a row: enough objects of a class (and colour), their place, and not too many of another.

    Colours and places are those of as many objects as are asked for, the surest ones.
    """
    met: list[bool] = []
    groups: list[list[Found]] = []
    surest = sorted(seen, key=lambda found: found["score"], reverse=True)
    for asked in include:
        fit = [found for found in surest if found["class"] == asked["class"]][: asked["count"]]
        right = len(fit) == asked["count"]
        if "color" in asked:
            right = right and all(found["color"] == asked["color"] for found in fit)
        met.append(right)
        if "position" in asked:
            relation, other = asked["position"]
            pairs = [(first, second) for first in fit for second in groups[other]] if right else []
            right = bool(pairs) and all(relation in relations(one["box"], two["box"]) for one, two in pairs)
            met.append(right)
        groups.append(fit if right else [])
    for asked in exclude:
        met.append(sum(found["class"] == asked["class"] for found in seen) < asked["count"])
    return met


def relations(first: Sequence[float], second: Sequence[float]) -> set[str]:
    """Where the first box lies, seen from the second: left of, right of, above, below."""
    offset, apart = [], []
    for low in (0, 1):
        high = low + 2
        difference = (first[low] + first[high] - second[low] - second[high]) / 2
        slack = NEAR * (first[high] - first[low] + second[high] - second[low])
        offset.append(difference)
        apart.append((1 if difference > 0 else -1) * max(abs(difference) - slack, 0.0))
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if length == 0.0:
        return set()
    right, down = apart[0] / length, apart[1] / length
    names = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, share in names.items() if share > 0.5}

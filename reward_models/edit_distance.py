"""How well a text that was read agrees with a text that was asked for."""

import re
from typing import Any

from reward_models.text_rules import asked_for

_QUOTED = re.compile(r'"([^"]*)"')


def levenshtein(first: str, second: str) -> int:
    """The least number of insertions, deletions and replacements of single characters between two strings."""
    row = list(range(len(second) + 1))
    for index, left in enumerate(first, 1):
        diagonal, row[0] = row[0], index
        for column, right in enumerate(second, 1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (left != right)),
            )
    return row[-1]


def plain(text: str) -> str:
    """What is compared: without white space, in lower case."""
    return "".join(text.split()).lower()


def wanted_text(prompt: Any) -> str:
    """The text that a prompt asks for: what its first pair of double quotes holds, as in Flow-GRPO's data.

    Raises:
        ValueError: if it has none.
    """
    found = _QUOTED.search(asked_for(prompt))
    if found is None or not plain(found[1]):
        raise ValueError(
            f"an OCR reward needs the wanted text in double quotes in the prompt; there is none in {prompt!r}"
        )
    return found[1]


def text_score(read: str, wanted: str, *, anywhere: bool = True) -> float:
    """1 - min(distance, length) / length, in [0, 1] (Liu et al., "Flow-GRPO", arXiv:2505.05470, section 4).

    Args:
        read: what OCR found.
        wanted: what should be there; case and white space do not count.
        anywhere: 1 also if `wanted` is a part of `read`, as in Flow-GRPO. False also punishes what is too much.
    """
    found, target = plain(read), plain(wanted)
    if anywhere and target in found:
        return 1.0
    return 1.0 - min(levenshtein(found, target), len(target)) / len(target)

"""What goes into a reward and what comes out, and how its answer is checked.

No torch is imported, because the processes of rewards start with this.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from unified_rl.errors import RecipeError


class RewardError(RecipeError):
    """A reward cannot be used with these data."""


class RewardFailedError(Exception):
    """A reward failed too often: its code is wrong, or what it needs is gone. Standard error has its own traceback."""


class WrongAnswerError(Exception):
    """A reward returned something that is no list of scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBatch:
    """B completions to judge, with all that a reward may see; everything is a list over the batch."""

    prompts: Sequence[Any]
    """Texts, or chat messages."""
    texts: Sequence[str | None]
    """Generated texts; None for pictures."""
    pictures: Sequence[Sequence[Any]]
    """Generated PIL pictures; several for a video, none for text."""
    columns: Mapping[str, Sequence[Any]]
    """The data's other columns, and `images` if the prompts have condition pictures."""
    group_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Sequence[int]) -> "RewardBatch":
        """The batch of some of the rows."""
        return RewardBatch(
            prompts=[self.prompts[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            pictures=[self.pictures[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            group_ids=[self.group_ids[row] for row in rows],
        )

    def completions(self) -> list[Any]:
        """As TRL hands them over: the picture, a list of several, or the text (as a message if the prompt is chat)."""
        return [
            _completion(prompt, text, pictures)
            for prompt, text, pictures in zip(self.prompts, self.texts, self.pictures, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A reward's answer about B completions."""

    values: list[float]
    """NaN excludes."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What else it told, as means over the batch."""
    failures: dict[int, str] = field(default_factory=dict)
    """Rows that it could not judge, with the reason."""


def numbers(scores: Any, num: int) -> list[float]:
    """What a reward returned, as `num` floats; NaN for None and for infinite numbers.

    Raises:
        WrongAnswerError: if it is not one number or None per completion.
    """
    advice = "return one (a number, or None to exclude it) per completion"
    if isinstance(scores, str | bytes | Mapping) or not _is_sequence(scores):
        raise WrongAnswerError(f"returned a {type(scores).__name__}, not a list of scores; {advice}")
    if len(scores) != num:
        raise WrongAnswerError(f"returned {len(scores)} scores for {num} completions; {advice}")
    return [_number(value, f"for completion {index}; {advice}") for index, value in enumerate(scores)]


def number(value: Any) -> float:
    """One score as a float; NaN for None and for infinite numbers.

    Raises:
        WrongAnswerError: if it is no number.
    """
    return _number(value, "for a completion; return a number, or None to exclude it")


def _completion(prompt: Any, text: str | None, pictures: Sequence[Any]) -> Any:
    if pictures:
        return pictures[0] if len(pictures) == 1 else list(pictures)
    assert text is not None, "a completion has a text or pictures"
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def is_tensor(value: Any) -> bool:
    """Whether a value is a torch tensor; if torch was never imported, nothing is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_sequence(scores: Any) -> bool:
    if is_tensor(scores) or isinstance(scores, np.ndarray):
        return scores.ndim > 0
    return isinstance(scores, Sequence)


def _number(value: Any, where: str) -> float:
    if (is_tensor(value) or isinstance(value, np.ndarray | np.generic)) and value.ndim == 0:
        value = value.item()
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        raise WrongAnswerError(f"returned {value!r} {where}")
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if math.isfinite(found) and abs(found) < 3e38 else math.nan  # scores are kept in float32

"""Verifiable rewards for replies that give their answer in a tag: `<answer> red </answer>`."""

import re
from collections.abc import Sequence
from typing import Any

_REPLY = re.compile(r"\s*(?:<think>.*?</think>\s*)?<answer>(?P<answer>[^<>]*)</answer>\s*", re.DOTALL)


def _text(completion: Any) -> str:
    """The reply of a completion: text, or TRL's conversational form."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def answer(prompts: Sequence, completions: Sequence[Any], *, answer: Sequence[str], **_) -> list[float]:
    """1.0 where the reply is well formed and its tagged answer equals the column `answer` (case and outer spaces do not
    count), else 0.0."""
    matches = [_REPLY.fullmatch(_text(each)) for each in completions]
    return [
        float(match is not None and match["answer"].strip().lower() == right.strip().lower())
        for match, right in zip(matches, answer, strict=True)
    ]


def answer_format(prompts: Sequence, completions: Sequence[Any], **_) -> list[float]:
    """1.0 where the reply is one non-empty `<answer>` tag (after an optional `<think>` tag) and nothing else."""
    matches = [_REPLY.fullmatch(_text(each)) for each in completions]
    return [float(match is not None and bool(match["answer"].strip())) for match in matches]

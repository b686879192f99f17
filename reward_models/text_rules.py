"""Rewards of texts that a rule can check: choices, numbers, formats, length, repetition. All cost nothing."""

import json
import re
from collections.abc import Sequence
from typing import Any

_THINK = re.compile(r"\s*<think>.+?</think>\s*\S.*", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.)])-?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")
_STATED = re.compile(r"(?:\b[Aa]nswer\b(?:\s+is)?\s*:?|\\boxed\s*\{|<answer>)[\s*(]*([A-HJ-Z])\b")
_CHOICE = re.compile(r"\b([A-HJ-Z])\b(?!')")
_ARTICLE = re.compile(r"\bA(?= [a-z])")
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


def reply(completion: Any) -> str:
    """The text of a completion: text, or TRL's conversational form."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def asked_for(prompt: Any) -> str:
    """The text of a prompt; of chat messages, that of all of them."""
    if isinstance(prompt, str):
        return prompt
    parts = [part for message in prompt for part in _texts_of(message["content"])]
    return "\n".join(parts)


def _texts_of(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part.get("type") == "text"]


def numeric_answer(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[Any], tolerance: float = 1e-6, **_: Any
) -> list[float]:
    """1.0 where the last number of the reply equals the column `answer` up to the relative `tolerance`, else 0.0."""
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        found = _NUMBER.findall(reply(completion))
        truth = float(str(right).replace(",", ""))
        close = found and abs(float(found[-1].replace(",", "")) - truth) <= tolerance * max(1.0, abs(truth))
        scores.append(float(bool(close)))
    return scores


def multiple_choice(
    prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str], **_: Any
) -> list[float]:
    """1.0 where the letter that the reply chooses is that of the column `answer`, else 0.0.

    Chosen is the last letter after "answer", "answer is", `\\boxed{` or `<answer>`; without one of them the last lone
    capital letter that is neither "I" nor an article.
    """
    found = [_chosen(reply(completion)) for completion in completions]
    return [float(letter == str(right).strip().strip("().")) for letter, right in zip(found, answer, strict=True)]


def _chosen(text: str) -> str | None:
    letters = _STATED.findall(text) or _CHOICE.findall(_ARTICLE.sub("", text)) or _CHOICE.findall(text)
    return letters[-1] if letters else None


def think_format(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the reply is one non-empty <think> block and then an answer, else 0.0."""
    texts = [reply(completion) for completion in completions]
    return [float(_THINK.fullmatch(text) is not None and text.count("<think>") == 1) for text in texts]


def json_format(
    prompts: Sequence[Any], completions: Sequence[Any], *, keys: Sequence[str] = (), **_: Any
) -> list[float]:
    """1.0 where the reply is JSON (a code fence around it is allowed) with at least these keys, else 0.0."""
    return [float(_is_json(reply(completion), keys)) for completion in completions]


def _is_json(text: str, keys: Sequence[str]) -> bool:
    fenced = _FENCE.fullmatch(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(found, dict) and all(key in found for key in keys))


def soft_length(
    prompts: Sequence[Any], completions: Sequence[Any], *, longest: int, margin: int, **_: Any
) -> list[float]:
    """0 up to `longest - margin` words, then falling linearly to -1 at `longest` words (DAPO's soft overlong
    punishment, arXiv:2503.14476, eq. 13, in words)."""
    counts = [len(reply(completion).split()) for completion in completions]
    return [-min(1.0, max(0.0, (count - (longest - margin)) / margin)) for count in counts]


def repetition(prompts: Sequence[Any], completions: Sequence[Any], *, size: int = 3, **_: Any) -> list[float]:
    """Minus the share of n-grams of words that occurred before in the same reply, -1 to 0 (Yeo et al.,
    arXiv:2502.03373, section 3.4)."""
    scores = []
    for completion in completions:
        words = reply(completion).lower().split()
        grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
        scores.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
    return scores

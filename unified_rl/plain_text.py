"""Text that leaves the program: secrets masked, terminal tricks taken out, prompts as one string."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SECRET_KEY = r"[\w-]*(?:api[_-]?key|secret|password|passwd|authorization|credential|(?<!\w)token|[_-]token)"
_SECRETS = (
    (re.compile(rf"""(?i)(["']?\b{_SECRET_KEY}["']?\s*[:=]\s*)(?!null\b)\S[^\n,}}]*"""), r"\1***"),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), r"\1***"),
    (re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@"), r"\1***@"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})"), "***"),
)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIALS?)$")
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def redact(text: str) -> str:
    """The text with what looks like a secret, or is the value of a variable named like one, masked."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def clean(text: str) -> str:
    """The text without terminal sequences, control characters and direction overrides; tabs and newlines stay."""
    return _CONTROL.sub("", _ANSI.sub("", text))


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as one text: chat messages become `role: text` lines, pictures are left out."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_message_text(message['content'])}" for message in prompt)


def _message_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")

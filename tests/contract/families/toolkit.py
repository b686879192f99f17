"""What the tiny families share: a character tokenizer, a chat template and the record that a builder returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz ?.,"
SPARE = 6
"""Rows of the embedding beyond the tokenizer's vocabulary, as padded checkpoints have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of transformers with random weights of a few ten thousand parameters."""

    build: Callable[[], tuple[Any, Any]]
    """Returns the model and its processor (a tokenizer for text-only models)."""
    pictures: int = 0
    """Pictures that one prompt may hold at most; 0: text only."""
    text_rows: bool = True
    """Whether a prompt without pictures is possible."""
    shares_prefill: bool = True
    """Whether a group's prompt is prefilled once."""


def tokenizer(
    named: Mapping[str, str] | None = None, specials: tuple[str, ...] = (), first: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a character, and the special tokens that a processor asks for.

    Args:
        named: special tokens that the processor reads as attributes of the tokenizer, for instance `image_token`.
        specials: further special tokens.
        first: tokens that come before all others.
    """
    named = dict(named or {})
    extra = tuple(dict.fromkeys([*named.values(), *specials]))
    words = [*first, "<pad>", "<unk>", "<bos>", "<eos>", "\n", *LETTERS]
    engine = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=engine,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=named,
    )
    fast.add_special_tokens({"extra_special_tokens": list(extra)}, replace_extra_special_tokens=False)
    return fast


def template(picture: str, video: str = "") -> str:
    """A chat template that writes `picture` where a message holds a picture, and `video` where it holds a video."""
    return (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + picture
        + "{% elif part['type'] == 'video' %}"
        + video
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}.{% endif %}"
    )


def vocabulary(words: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding for this tokenizer."""
    return len(words) + SPARE

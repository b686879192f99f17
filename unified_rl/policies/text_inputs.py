"""Prompts as a transformers model wants them: rendered, processed a prompt at a time, and joined into batches."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unified_rl.data.sources import MAX_SIDE
from unified_rl.errors import RecipeError
from unified_rl.imports import one_line
from unified_rl.policies.without_videos import WithoutVideos
from unified_rl.recipe.policy import TokenSampling
from unified_rl.types import Completion, Messages, Prompt, Recorded, Segment

Inputs = dict[str, Tensor]
"""One prompt as its processor returns it: every tensor has the leading dimension that it has for a batch of one."""


class TextInputs:
    """Renders prompts and runs the processor."""

    def __init__(self, processor: Any, pad_id: int) -> None:
        """
        Args:
            processor: a processor, or the tokenizer of a text-only model.
        """
        self.processor = processor
        is_tokenizer = isinstance(processor, PreTrainedTokenizerBase)
        self.tokenizer: PreTrainedTokenizerBase = processor if is_tokenizer else processor.tokenizer
        self.pad_id = pad_id

    def prepare_all(self, prompts: Sequence[Prompt], settings: TokenSampling) -> list[Inputs]:
        """Processed inputs per row; rows of the same prompt share one object.

        Raises:
            RecipeError: see `prepare`.
        """
        seen: dict[tuple, Inputs] = {}
        rows = []
        for prompt in prompts:
            key = (prompt.group_id, str(prompt.text), tuple(id(image) for image in prompt.images))
            if key not in seen:
                seen[key] = self.prepare(prompt, settings)
            rows.append(seen[key])
        return rows

    def prepare(self, prompt: Prompt, settings: TokenSampling) -> Inputs:
        """Process one prompt.

        Raises:
            RecipeError: if the prompt is too long, a picture is unreadable or too large, or the model's processor
                refuses the combination of text and pictures.
        """
        if prompt.images and self.processor is self.tokenizer:
            raise RecipeError(f"data: a prompt has pictures, but {type(self.processor).__name__} takes texts only")
        text, templated = self.render(prompt, settings)
        media: dict[str, Any] = {"images": [[_loaded(image) for image in prompt.images]]} if prompt.images else {}
        videos = _videos(prompt)
        if videos:
            if self.processor is self.tokenizer or "video_processor" not in self.processor.get_attributes():
                why = " without torchvision; install it" if isinstance(self.processor, WithoutVideos) else ""
                raise RecipeError(f"data: the column video, but {type(self.processor).__name__} takes no videos{why}")
            media["videos"] = [[[_loaded(frame) for frame in video] for video in videos]]
        try:
            inputs = self.processor(text=[text], **media, return_tensors="pt", add_special_tokens=not templated)
        except (ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"data: the processor refuses a prompt with {len(prompt.images)} pictures and {len(videos)} videos "
                f"({text[:60]!r}...): {reason}"
            ) from error
        length = inputs["input_ids"].shape[1]
        if settings.max_prompt_tokens is not None and length > settings.max_prompt_tokens:
            raise RecipeError(
                f"policy.sampling.max_prompt_tokens: a prompt has {length} tokens ({text[:60]!r}...); raise the limit "
                "or drop the row (prompts are never cut)"
            )
        # Some processors add labels for supervised training.
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}

    def render(self, prompt: Prompt, settings: TokenSampling) -> tuple[str, bool]:
        """The prompt as one string, and whether a chat template (which brings its special tokens) made it.

        Raises:
            RecipeError: if there is no template for chat messages, it refuses them, or it does not know an argument.
        """
        template, arguments = self.processor.chat_template, settings.chat_template_arguments
        if not settings.chat_template or not template:
            if not isinstance(prompt.text, str) or arguments:
                key = "chat_template_arguments" if arguments else "chat_template"
                raise RecipeError(f"policy.sampling.{key}: chat messages need a model with a chat template")
            return prompt.text, False
        for name in arguments:
            if name not in str(template):
                raise RecipeError(f"policy.sampling.chat_template_arguments.{name}: the model's template has no {name}")
        messages = self._messages(prompt)
        goes_on = messages[-1]["role"] == "assistant"
        try:
            text = self.processor.apply_chat_template(
                messages,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                tokenize=False,
                **arguments,
            )
        except (TemplateError, ValueError) as error:  # of templates, and of transformers about them
            raise RecipeError(f"data: the chat template refuses a prompt: {one_line(error)}") from error
        return text, True

    def _messages(self, prompt: Prompt) -> Messages:
        """The prompt as a chat. For a processor every content is a list of parts, which all templates of models with
        pictures take (some drop a plain string); pictures that no part stands for come first of the first question."""
        messages = prompt.text if isinstance(prompt.text, list) else [{"role": "user", "content": prompt.text}]
        if self.processor is self.tokenizer:
            return messages
        parts = [{**message, "content": _parts(message["content"])} for message in messages]
        shown = [part for message in parts for part in message["content"] if part["type"] in ("image", "video")]
        media = [*({"type": "image"} for _ in prompt.images), *({"type": "video"} for _ in _videos(prompt))]
        if media and not shown:
            asking = next((message for message in parts if message["role"] == "user"), parts[0])
            asking["content"] = [*media, *asking["content"]]
        return parts

    def collate(self, rows: Sequence[Inputs], device: torch.device) -> Inputs:
        """Join rows of one kind: token columns are padded on the left, everything else is joined along dimension 0."""
        longest = max(row["input_ids"].shape[1] for row in rows)
        batch = {}
        for name in rows[0]:
            parts = [row[name] for row in rows]
            if is_token_column(rows, name):
                fill = self.pad_id if name == "input_ids" else 0
                parts = [_left_padded(part, longest, fill) for part in parts]
            batch[name] = torch.cat(_padded(parts)).to(device)
        return batch


def rewritten(prompt: Prompt, template: str, key: str, **texts: str | None) -> Prompt:
    """The prompt with its text put into a template.

    Args:
        key: of the recipe, which errors begin with.

    Raises:
        RecipeError: if it is a chat, which has no single text.
    """
    if not isinstance(prompt.text, str):
        raise RecipeError(f"{key}: prompts must be plain texts, not chat messages")
    return replace(prompt, text=template.format(prompt=prompt.text, **texts))


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else [*content]


def _videos(prompt: Prompt) -> list[list[Any]]:
    """The videos that a prompt shows, each a list of its frames (PIL): the dataset's column `video`."""
    return [prompt.columns["video"]] if prompt.columns.get("video") else []


def kinds(rows: Sequence[Inputs]) -> list[list[int]]:
    """Row numbers by kind, in an order of kinds that is the same everywhere: rows with the same inputs (with pictures,
    without) can share a batch.

    A model may compute a row without pictures in another way when its batch holds some (cross-attention layers are
    skipped, or attend to padding), so kinds are never mixed: a row's log-prob depends on no other row.
    """
    found: dict[frozenset[str], list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(frozenset(row), []).append(number)
    return [found[kind] for kind in sorted(found, key=sorted)]


def distinct(rows: Sequence[Inputs]) -> tuple[list[Inputs], list[int]]:
    """The different prompts among rows, and for each row the number of its prompt."""
    numbers: dict[int, int] = {}
    owner = [numbers.setdefault(id(row), len(numbers)) for row in rows]
    first = [owner.index(number) for number in range(len(numbers))]
    return [rows[row] for row in first], owner


def is_token_column(rows: Sequence[Inputs], name: str) -> bool:
    """Whether an input has one entry a token, as attention masks do."""
    return all(row[name].shape[:2] == row["input_ids"].shape for row in rows)


def _left_padded(part: Tensor, length: int, fill: int) -> Tensor:
    """[1, l, ...] to [1, length, ...]."""
    return pad(part, (*(0, 0) * (part.ndim - 2), length - part.shape[1], 0), value=fill)


def _padded(parts: list[Tensor]) -> list[Tensor]:
    """Zero-pad dimensions after the first to the largest size (pictures that a processor marks as padding by zeros)."""
    target = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if all(list(part.shape[1:]) == target for part in parts):
        return parts
    grown = []
    for part in parts:
        widths = [(0, want - size) for want, size in zip(target, part.shape[1:], strict=True)]
        grown.append(pad(part, functools.reduce(lambda right, left: (*left, *right), widths, ())))
    return grown


def _loaded(image: Any) -> Any:
    """A picture whose file was read to its end.

    Raises:
        RecipeError: if it cannot be read or is too large.
    """
    if max(image.size) > MAX_SIDE:
        width, height = image.size
        raise RecipeError(f"data: a picture of {width} x {height} pixels; sides are limited to {MAX_SIDE}")
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # what Pillow raises for truncated and broken files
        raise RecipeError(f"data: a picture cannot be read: {error}") from error
    return image


def recorded_tokens(recorded: Recorded, tokenizer: Any, end_id: int) -> Tensor:
    """[L] the tokens of a recorded text, as they were drawn, or its own and an end."""
    if recorded.token_ids is not None:
        return torch.tensor(recorded.token_ids)
    own = tokenizer(recorded.completion.text, add_special_tokens=False)["input_ids"]
    return torch.tensor([*own, end_id])


def told_tokens(segment: Segment, completions: Sequence[Completion]) -> list[Recorded]:
    """Drawn tokens and their log-probs, row by row."""
    return [
        Recorded(completion=completion, token_ids=tokens.tolist(), log_probs=known[: len(tokens)].tolist())
        for completion, tokens, known in zip(
            completions, segment.actions["tokens"], segment.rollout_log_probs, strict=True
        )
    ]

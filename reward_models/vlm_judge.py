"""Vision-language models as judges: in this process (transformers), or behind an OpenAI-compatible server.

`YesProbability` is VQAScore (Lin et al., arXiv:2404.01291) with any model: the probability that it answers "yes" to the
paper's question about the prompt. `ChatJudge` asks a server (vLLM, SGLang, a hosted model) and reads yes/no
probabilities or a number from its answer, which is how UnifiedReward and other generative reward models are used.
Ranges: 0 to 1 for probabilities, else whatever the question asks for. The licence is that of the model.
"""

import base64
import io
import json
import math
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from reward_models.loading import from_pretrained, pinned
from reward_models.text_rules import asked_for, reply

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
YES, NO = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")
_NUMBER = re.compile(r"(?<![\d/.])-?\d+(?:\.\d+)?")
"""Not what follows a slash: of 8/10 the 8."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
_jitter = random.Random()


def asked(question: str, **words: str) -> str:
    """A question with its {prompt} (and {completion}) put in; other braces, as of JSON, stay."""
    for name, word in words.items():
        question = question.replace(f"{{{name}}}", word)
    return question


class YesProbability:
    """P(yes) / (P(yes) + P(no)) of the first token of the answer, or P(yes)."""

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        *,
        question: str = QUESTION,
        among_all: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 8,
        trust_remote_code: bool = False,
    ) -> None:
        """Args:
        model: folder or hub name of an image-text-to-text model with a chat template.
        question: with {prompt} where the prompt goes.
        among_all: P(yes) among all tokens, as in the paper; False: among yes and no, which does not fall where the
            model would rather begin its answer with another word.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = from_pretrained(
            AutoModelForImageTextToText,
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        self.processor = AutoProcessor.from_pretrained(
            model, revision=pinned(model, revision), trust_remote_code=trust_remote_code
        )
        self.processor.tokenizer.padding_side = "left"
        self.question, self.among_all, self.device, self.batch_size = question, among_all, device, batch_size
        self.yes, self.no = self._first_tokens(YES), self._first_tokens(NO)

    def _first_tokens(self, words: Sequence[str]) -> list[int]:
        """The tokens that single words are, in any spelling that is one token."""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        found = sorted({tokens[0] for tokens in ids if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id})
        if not found:
            raise ValueError(f"{words[0]!r} is no single token of this model, so its probability cannot be read")
        return found

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Image.Image], **_: Any) -> list[float]:
        import torch

        scores: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            texts = [self._text(asked_for(prompt)) for prompt in prompts[part]]
            pictures = [[picture.convert("RGB")] for picture in completions[part]]
            inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            with torch.no_grad():
                logits = self.model(**inputs).logits[:, -1].float()
            yes, no = logits[:, self.yes].logsumexp(-1), logits[:, self.no].logsumexp(-1)
            share = (yes - logits.logsumexp(-1)).exp() if self.among_all else (yes - no).sigmoid()
            scores += share.tolist()
        return scores

    def _text(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": asked(self.question, prompt=prompt)}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )


class ChatJudge:
    """A judge behind `/v1/chat/completions`."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        question: str = QUESTION,
        read: str = "yes",
        pattern: str | None = None,
        token_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        parallel: int = 8,
        retries: int = 3,
        max_tokens: int = 512,
        with_conditions: bool = False,
    ) -> None:
        """Args:
        url: of the server, up to and without /v1.
        question: with {prompt}, and {completion} for texts.
        read: "yes": the probability of yes from the first token's log-probs; "number": the last number of the answer
            (of 8/10, 8). An answer that is cut at `max_tokens`, or holds none, excludes the sample.
        pattern: regular expression whose first group is the number.
        token_env: environment variable with the bearer token; not needed if it is unset.
        timeout: seconds of one request.
        parallel: requests at a time.
        retries: of a request that was refused for the moment (429, 5xx, no connection).
        with_conditions: show the prompt's own pictures before the completion's, for edits.
        """
        if read not in ("yes", "number"):
            raise ValueError(f"read is 'yes' or 'number', not {read!r}")
        self.url, self.model, self.question = f"{url.rstrip('/')}/v1/chat/completions", model, question
        self.read, self.pattern = read, re.compile(pattern) if pattern else None
        self.token_env, self.timeout, self.parallel, self.max_tokens = token_env, timeout, parallel, max_tokens
        self.retries, self.with_conditions = retries, with_conditions

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        images: Sequence[Sequence[Image.Image]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        conditions = images if self.with_conditions and images is not None else [()] * len(prompts)
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._ask, prompts, completions, conditions))

    def _ask(self, prompt: Any, completion: Any, conditions: Sequence[Image.Image]) -> float | None:
        """One judgement; None where the answer has no score in it."""
        answer = json.loads(self._post(self._body(prompt, completion, conditions)))["choices"][0]
        if self.read == "yes":
            return yes_share(answer["logprobs"]["content"][0]["top_logprobs"])
        if answer.get("finish_reason") == "length":
            return None
        text = answer["message"]["content"] or ""
        found = self.pattern.findall(text) if self.pattern else _NUMBER.findall(text)
        return float(found[-1]) if found else None

    def _body(self, prompt: Any, completion: Any, conditions: Sequence[Image.Image]) -> dict[str, Any]:
        made = pictures_of(completion)
        text = asked(self.question, prompt=asked_for(prompt), completion="" if made else reply(completion))
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in [*conditions, *made]
        ]
        content.append({"type": "text", "text": text})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": 1 if self.read == "yes" else self.max_tokens,
        }
        return {**body, "logprobs": True, "top_logprobs": 20} if self.read == "yes" else body

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(self.token_env):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url, data=json.dumps(body).encode(), headers=headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except OSError as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code != 429 and error.code < 500
                if refused or attempt == self.retries:
                    raise
                time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * _jitter.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")


def pictures_of(completion: Any) -> list[Image.Image]:
    """The picture of a completion, or those of a video; none of a text."""
    if isinstance(completion, Image.Image):
        return [completion]
    return list(completion) if isinstance(completion, list) and isinstance(completion[0], Image.Image) else []


def yes_share(top: Sequence[dict[str, Any]]) -> float | None:
    """P(yes) / (P(yes) + P(no)) of a server's most probable first tokens; None if neither is among them."""
    mass = {"yes": 0.0, "no": 0.0}
    for each in top:
        word = each["token"].strip().lower()
        if word in mass:
            mass[word] += math.exp(each["logprob"])
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total > 0.0 else None


def data_uri(picture: Image.Image) -> str:
    """A picture as PNG inside an address."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

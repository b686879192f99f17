"""Vision-language models as judges: in this process (transformers), or behind an OpenAI-compatible server.

`YesProbability` is VQAScore (Lin et al., arXiv:2404.01291): the probability that the model answers "yes" to a question
made of the prompt. `ChatJudge` asks a server (vLLM, SGLang, a hosted model) and reads yes/no probabilities or a number
from its answer, which is how UnifiedReward and other generative reward models are used. Ranges: 0 to 1 for
probabilities, else whatever the question asks for. The licence is that of the model.
"""

import base64
import io
import json
import math
import os
import re
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from reward_models.loading import from_pretrained, pinned

QUESTION = 'Does this picture show "{prompt}"? Answer yes or no.'
YES, NO = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class YesProbability:
    """P(yes) / (P(yes) + P(no)) of the first token of the answer."""

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        *,
        question: str = QUESTION,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 8,
        trust_remote_code: bool = False,
    ) -> None:
        """Args:
        model: folder or hub name of an image-text-to-text model with a chat template.
        question: with {prompt} where the prompt goes.
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
        self.question, self.device, self.batch_size = question, device, batch_size
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
            texts = [self._text(str(prompt)) for prompt in prompts[part]]
            pictures = [[picture.convert("RGB")] for picture in completions[part]]
            inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            with torch.no_grad():
                logits = self.model(**inputs).logits[:, -1].float()
            yes, no = logits[:, self.yes].logsumexp(-1), logits[:, self.no].logsumexp(-1)
            scores += (yes - no).sigmoid().tolist()
        return scores

    def _text(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": self.question.format(prompt=prompt)}]
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
        max_tokens: int = 16,
    ) -> None:
        """Args:
        url: of the server, up to and without /v1.
        question: with {prompt}, and {completion} for texts.
        read: "yes": the probability of yes from the first token's log-probs; "number": the last number of the answer.
        pattern: regular expression whose first group is the number.
        token_env: environment variable with the bearer token; not needed if it is unset.
        timeout: seconds of one request.
        parallel: requests at a time.
        """
        if read not in ("yes", "number"):
            raise ValueError(f"read is 'yes' or 'number', not {read!r}")
        self.url, self.model, self.question = f"{url.rstrip('/')}/v1/chat/completions", model, question
        self.read, self.pattern = read, re.compile(pattern) if pattern else None
        self.token_env, self.timeout, self.parallel, self.max_tokens = token_env, timeout, parallel, max_tokens

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._ask, prompts, completions))

    def _ask(self, prompt: Any, completion: Any) -> float | None:
        """One judgement; None where the answer has no score in it."""
        answer = json.loads(self._post(self._body(prompt, completion)))["choices"][0]
        if self.read == "yes":
            return yes_share(answer["logprobs"]["content"][0]["top_logprobs"])
        text = answer["message"]["content"] or ""
        found = self.pattern.findall(text) if self.pattern else _NUMBER.findall(text)
        return float(found[-1]) if found else None

    def _body(self, prompt: Any, completion: Any) -> dict[str, Any]:
        shown = completion if isinstance(completion, str) else ""
        content: list[dict[str, Any]] = [
            {"type": "text", "text": self.question.format(prompt=prompt, completion=shown)}
        ]
        if isinstance(completion, Image.Image):
            content.insert(0, {"type": "image_url", "image_url": {"url": data_uri(completion)}})
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
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return response.read()


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

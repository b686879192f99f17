"""A reward behind HTTP: `unified-rl serve` or a server with Flow-Factory's `/compute`.

A recipe names it by address, `http://host:port/name`. What fails for a moment (no connection, 5xx, 429, a cut or
slow answer, an answer that is no JSON) is tried again after a growing random pause; what is wrong with the request is
not.
"""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from unified_rl.rewards.picture_wire import encode_picture

MAX_ANSWER_BYTES = 16 * 2**20
LONGEST_PAUSE = 30.0
_jitter = random.Random()


class RemoteError(Exception):
    """The server gave no scores."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class RemoteReward:
    """Scores from a server."""

    def __init__(
        self,
        url: str,
        *,
        protocol: str = "unified_rl",
        token_env: str = "UNIFIED_RL_TOKEN",
        timeout: float = 60.0,
        retries: int = 3,
        first_pause: float = 0.5,
        columns: Sequence[str] | None = None,
    ) -> None:
        """Args:
        url: http://host:port/name of the reward.
        protocol: "unified_rl", or "flow_factory" (POST /compute; the name in the address is only shown).
        token_env: environment variable with the bearer token.
        timeout: seconds that the server may be silent.
        retries: of one request.
        columns: that are sent; None: all.

        Raises:
            ValueError: for an unknown protocol, or an address without a name.
            RemoteError: if the server does not answer, or has no such reward.
        """
        if protocol not in ("unified_rl", "flow_factory"):
            raise ValueError(f"protocol is 'unified_rl' or 'flow_factory', not {protocol!r}")
        self.base, _, self.name = url.rpartition("/")
        if not self.base.partition("://")[2] or not self.name:
            raise ValueError(f"{url} names no reward; write http://host:port/name")
        self.protocol, self.token_env, self.timeout = protocol, token_env, timeout
        self.retries, self.first_pause, self.columns = retries, first_pause, columns
        self._opener = urllib.request.build_opener(_NoRedirects)
        self.version = ""
        if protocol == "unified_rl":
            health = self._request("/health", None)
            if self.name not in health.get("rewards", []):
                raise RemoteError(f"{self.base} has no reward {self.name!r}; it has {health.get('rewards')}")
            self.version = health["version"]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        texts = [_text(completion) for completion in completions]
        pictures = None if texts[0] is not None else [encode_picture(_picture(each)) for each in completions]
        if self.protocol == "flow_factory":
            scores = self._request("/compute", {"prompt": list(prompts), "image": pictures}).get("rewards")
        else:
            chosen = columns if self.columns is None else {name: columns[name] for name in self.columns}
            body = {"prompts": list(prompts), "columns": sendable(chosen), "rewards": [self.name]}
            answer = self._request("/v1/score", {**body, **({"pictures": pictures} if pictures else {"texts": texts})})
            if answer.get("version") != self.version:
                raise RemoteError(f"{self.base} was replaced by another version during the run; start the run again")
            if self.name in answer["errors"]:
                raise RemoteError(answer["errors"][self.name])
            scores = answer["scores"].get(self.name)
        if not isinstance(scores, list):
            raise RemoteError(f"{self.base} sent no list of scores")
        return scores

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One request, tried again where that may help."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(self.token_env):
            headers["Authorization"] = f"Bearer {token}"
        problem, pause = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                backoff = min(LONGEST_PAUSE, self.first_pause * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.5)
                time.sleep(min(LONGEST_PAUSE, max(pause, backoff)))
            try:
                request = urllib.request.Request(self.base + path, data=data, headers=headers)
                with self._opener.open(request, timeout=self.timeout) as response:
                    answer = json.loads(response.read(MAX_ANSWER_BYTES))
                if isinstance(answer, dict):
                    return answer
                problem = "the answer is no JSON object"
            except urllib.error.HTTPError as error:
                problem = f"status {error.code} {_reason(error)}"
                if error.code != 429 and error.code < 500:
                    raise RemoteError(f"{self.base}{path}: {problem}") from error
                after = error.headers.get("Retry-After", "")
                pause = float(after) if after.isdecimal() else 0.0
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise RemoteError(f"{self.base}{path} failed {self.retries + 1} times; last: {problem}")


def sendable(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Raises:
        ValueError: for a column that JSON cannot carry.
    """
    for name, values in columns.items():
        try:
            json.dumps(values)
        except TypeError as error:
            raise ValueError(f"the column {name!r} cannot be sent ({error}); name those to send: columns") from error
    return columns


def _reason(error: urllib.error.HTTPError) -> str:
    return error.read(500).decode("utf-8", "replace")


def _text(completion: Any) -> str | None:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and completion and isinstance(completion[0], dict):
        return completion[-1]["content"]
    return None


def _picture(completion: Any) -> Image.Image:
    if not isinstance(completion, Image.Image):
        raise ValueError("only single pictures and texts can be sent to a server")
    return completion

"""`unified-rl serve`: rewards behind HTTP. JSON only, nothing is unpickled, nothing is fetched.

    GET  /health      {"status": "ok", "version": hash, "rewards": [names]}
    POST /v1/score    {"prompts": [...], "texts" or "pictures": [...], "columns": {name: [...]}, "group_ids": [...],
                       "rewards": [names]} -> {"version", "scores": {name: [number or null]}, "errors": {name: message}}
    POST /compute     Flow-Factory's: {"prompt": [...], "image": [...]} -> {"rewards": [...]}, by the first reward

Loopback needs no token; any other address does. Bodies, pictures and batches have caps, compressed bodies are refused.
"""

import hashlib
import hmac
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unified_rl import __version__
from unified_rl.errors import RecipeError
from unified_rl.recipe.reward import RewardBlock
from unified_rl.rewards.picture_wire import decode_picture
from unified_rl.rewards.scoring import LoadedReward, RewardError, RewardFailedError, load_rewards, score
from unified_rl.types import Completion, Prompt

TOKEN_ENV = "UNIFIED_RL_TOKEN"
NOT_ALL = 1.0 - 1e-9
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may hold."""

    body_bytes: int = 64 * 2**20
    batch: int = 512
    """Completions."""
    pixels: int = 2**22
    """Of one picture (2048 x 2048)."""
    all_pixels: int = 2**26
    """Of all pictures together."""


class BadRequestError(Exception):
    """The request is wrong; carries the status to answer with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def serve_command(names: Sequence[str], *, host: str, port: int) -> int:
    """Serve rewards until the process is stopped; returns the exit code.

    Raises:
        RecipeError: for an unknown reward, an address that others can reach without a token, or a missing extra.
    """
    token = os.environ.get(TOKEN_ENV)
    if host not in LOOPBACK and not token:
        raise RecipeError(f"--host: others can reach {host}; set a token in the environment variable {TOKEN_ENV} first")
    try:
        import uvicorn
    except ImportError as error:
        raise RecipeError("serve: the server needs an extra; pip install 'unified-rl[serve]'") from error
    rewards = load_rewards([RewardBlock(name=name) for name in names])
    sys.stderr.write(f"serving {', '.join(reward.name for reward in rewards)} on http://{host}:{port}\n")
    uvicorn.run(make_app(rewards, names=names, token=token), host=host, port=port, log_level="warning")
    return 0


def make_app(
    rewards: Sequence[LoadedReward], *, names: Sequence[str], token: str | None, limits: Limits | None = None
) -> Any:
    """The ASGI application.

    Args:
        names: the rewards as they were asked for; with the project's version they make the version hash.
        token: that every request but /health has to carry; None: no token.
    """
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse

    limits = limits or Limits()
    version = hashlib.sha256(json.dumps([__version__, *names]).encode()).hexdigest()[:16]
    # A failed call is the client's to count; one that failed for some of its completions still has the others.
    known = {reward.name: replace(reward, max_failures=NOT_ALL) for reward in rewards}
    app = FastAPI(title="unified_rl rewards", docs_url=None, redoc_url=None, openapi_url=None)

    async def answer(request: Request, work: Callable[[dict], dict]) -> JSONResponse:
        try:
            _check_token(request.headers.get("authorization"), token)
            body = _parsed(await _body(request.headers, request.stream(), limits))
            return JSONResponse(await run_in_threadpool(work, body))
        except BadRequestError as error:
            return JSONResponse({"error": str(error)}, status_code=error.status)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": version, "rewards": list(known)}

    async def all_scores(request: Request) -> JSONResponse:
        return await answer(request, lambda body: {"version": version, **scored(known, body, limits)})

    async def flow_factory(request: Request) -> JSONResponse:
        def work(body: dict) -> dict:
            asked = {"prompts": body.get("prompt"), "pictures": body.get("image"), "rewards": [rewards[0].name]}
            found = scored(known, asked, limits)
            if found["errors"]:
                raise BadRequestError(500, next(iter(found["errors"].values())))
            return {"rewards": found["scores"][rewards[0].name]}

        return await answer(request, work)

    app.add_api_route("/v1/score", all_scores, methods=["POST"], response_model=None)
    app.add_api_route("/compute", flow_factory, methods=["POST"], response_model=None)
    return app


def scored(known: Mapping[str, LoadedReward], body: dict, limits: Limits) -> dict[str, Any]:
    """The scores of a request's completions, and the errors of rewards that failed.

    Raises:
        BadRequestError: for what is wrong with the request.
    """
    prompts = _list(body, "prompts", limits)
    names = body.get("rewards") or list(known)
    if not isinstance(names, list) or not all(isinstance(name, str) and name in known for name in names):
        raise BadRequestError(404, f"rewards: this server has {', '.join(known)}")
    num = len(prompts)
    texts = _list(body, "texts", limits, num) if body.get("texts") is not None else [None] * num
    pictures = _list(body, "pictures", limits, num) if body.get("pictures") is not None else []
    if not pictures and any(not isinstance(text, str) for text in texts):
        raise BadRequestError(400, "texts or pictures are needed, one a prompt")
    decoded = _decoded(pictures, limits) if pictures else [()] * num
    groups = _list(body, "group_ids", limits, num) if body.get("group_ids") is not None else list(range(num))
    columns = body.get("columns") or {}
    if not isinstance(columns, dict):
        raise BadRequestError(400, "columns is an object of lists")
    values = {name: _list(columns, name, limits, num) for name in columns}
    rows = [
        Prompt(
            text=prompt,
            images=(),
            columns={name: column[row] for name, column in values.items()},
            group_id=groups[row],
            seed=0,
        )
        for row, prompt in enumerate(prompts)
    ]
    completions = [Completion(text=text, images=shown) for text, shown in zip(texts, decoded, strict=True)]
    scores: dict[str, list[float | None]] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            found = score([known[name]], rows, completions).breakdown[name].tolist()
        except (RewardError, RewardFailedError) as error:
            errors[name] = str(error)
            continue
        scores[name] = [value if math.isfinite(value) else None for value in found]
    return {"scores": scores, "errors": errors}


def _decoded(pictures: Sequence[Any], limits: Limits) -> list[tuple[Any, ...]]:
    left, found = limits.all_pixels, []
    for picture in pictures:
        try:
            image = decode_picture(picture, min(limits.pixels, left))
        except ValueError as error:
            raise BadRequestError(400, str(error)) from error
        left -= image.width * image.height
        found.append((image,))
    return found


def _list(body: Mapping[str, Any], name: str, limits: Limits, num: int | None = None) -> list[Any]:
    found = body.get(name)
    if not isinstance(found, list) or not found:
        raise BadRequestError(400, f"{name} is a list that is not empty")
    if len(found) > limits.batch:
        raise BadRequestError(413, f"{name} has {len(found)} entries; {limits.batch} are allowed in a request")
    if num is not None and len(found) != num:
        raise BadRequestError(400, f"{name} has {len(found)} entries for {num} prompts")
    return found


def _check_token(header: str | None, token: str | None) -> None:
    if token is not None and not hmac.compare_digest((header or "").encode(), f"Bearer {token}".encode()):
        raise BadRequestError(401, "a bearer token is needed")


async def _body(headers: Mapping[str, str], stream: Any, limits: Limits) -> bytes:
    """The body, never more of it than allowed."""
    if headers.get("content-encoding", "identity") != "identity":
        raise BadRequestError(415, "compressed bodies are not read")
    if "json" not in headers.get("content-type", ""):
        raise BadRequestError(415, "the body is JSON (content-type: application/json)")
    declared = headers.get("content-length", "0")
    parts, size = [], 0
    if declared.isdecimal() and int(declared) > limits.body_bytes:
        raise BadRequestError(413, f"the body has more than {limits.body_bytes} bytes")
    async for part in stream:
        size += len(part)
        if size > limits.body_bytes:
            raise BadRequestError(413, f"the body has more than {limits.body_bytes} bytes")
        parts.append(part)
    return b"".join(parts)


def _parsed(body: bytes) -> dict:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(400, f"the body is no JSON: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise BadRequestError(400, "the body is a JSON object")
    return found

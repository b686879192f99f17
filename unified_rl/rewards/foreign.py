"""The reward conventions of other projects, called as those projects call them (their public interfaces, read in 2026).

Each function takes the user's callable and a batch, and returns a list of scores, `Judged`, or an awaitable of one.
"""

import asyncio
import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from unified_rl.plain_text import prompt_text
from unified_rl.rewards.types import Judged, RewardBatch, RewardError, WrongAnswerError, is_tensor, number, numbers


def picture_tensor(pictures: Sequence[Sequence[Any]]) -> Any:
    """The first picture of each completion as one float32 tensor [B, 3, H, W] in [0, 1].

    Raises:
        RewardError: if there are none, or they differ in size.
    """
    import torch

    if not all(pictures):
        raise RewardError("needs pictures, and these completions are text")
    arrays = [np.asarray(images[0].convert("RGB"), dtype=np.float32) / 255.0 for images in pictures]
    if len({array.shape for array in arrays}) > 1:
        raise RewardError("needs pictures of one size")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def no_grad() -> Any:
    """`torch.no_grad()` where torch is in use, else nothing."""
    torch = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None else torch.no_grad()


def _text(batch: RewardBatch, row: int) -> str:
    text = batch.texts[row]
    if text is None:
        raise RewardError("judges texts, and these completions are pictures")
    return text


def _column(batch: RewardBatch, names: Sequence[str]) -> list[Any]:
    """The first column of these names; `reward_model` is verl's {"style", "ground_truth"}."""
    for name in names:
        if name in batch.columns:
            return list(batch.columns[name])
    if "reward_model" in batch.columns:
        return [value["ground_truth"] for value in batch.columns["reward_model"]]
    raise RewardError(f"needs the column {names[0]!r}; the data have: {', '.join(batch.columns) or 'none'}")


def _mean_metrics(rows: Sequence[Mapping[str, Any]], score: str) -> dict[str, float]:
    """The means of the numbers that a reward returned beside its score."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != score and isinstance(value, int | float):
                found.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


async def _each(function: Callable, calls: Sequence[dict[str, Any]], score: str) -> Judged:
    """One call a completion, coroutines together; one that raises costs its own completion only."""
    answers: list[Any] = []
    for call in calls:
        try:
            answers.append(function(**call))
        except Exception as error:  # the user's code: anything may come out of it
            answers.append(error)
    waiting = [index for index, answer in enumerate(answers) if inspect.isawaitable(answer)]
    results = await asyncio.gather(*(answers[index] for index in waiting), return_exceptions=True)
    for index, result in zip(waiting, results, strict=True):
        answers[index] = result
    failures = {
        index: f"{type(answer).__name__}: {answer}" for index, answer in enumerate(answers) if _is_error(answer)
    }
    found = [answer for answer in answers if isinstance(answer, Mapping)]
    values = [float("nan") if _is_error(answer) else number(_score(answer, score)) for answer in answers]
    return Judged(values=values, metrics=_mean_metrics(found, score), failures=failures)


def _is_error(answer: Any) -> bool:
    return isinstance(answer, BaseException)


def _score(answer: Any, score: str) -> Any:
    if not isinstance(answer, Mapping):
        return answer
    if score not in answer:
        raise WrongAnswerError(f"returned a dict without {score!r}")
    return answer[score]


def call_verl(function: Callable, batch: RewardBatch) -> Any:
    """`compute_score(data_source, solution_str, ground_truth, extra_info)`, or verl-omni's with `solution_image`."""
    parameters = inspect.signature(function).parameters
    calls = []
    truths = _column(batch, ("ground_truth", "answer")) if "ground_truth" in parameters else [None] * len(batch)
    tensors = picture_tensor(batch.pictures) if "solution_image" in parameters else None
    for row in range(len(batch)):
        given = {
            "data_source": batch.columns["data_source"][row] if "data_source" in batch.columns else "",
            "ground_truth": truths[row],
            "extra_info": batch.columns["extra_info"][row] if "extra_info" in batch.columns else None,
        }
        given["solution_image" if tensors is not None else "solution_str"] = (
            tensors[row] if tensors is not None else _text(batch, row)
        )
        calls.append({name: value for name, value in given.items() if name in parameters})
    return _each(function, calls, "score")


def _easyr1_inputs(batch: RewardBatch) -> list[dict[str, Any]]:
    truths = _column(batch, ("ground_truth", "answer"))
    texts = [_text(batch, row) for row in range(len(batch))]
    tokens = batch.columns.get("completion_ids", [text.split() for text in texts])
    return [
        {"response": text, "response_length": len(ids), "ground_truth": truth}
        for text, ids, truth in zip(texts, tokens, truths, strict=True)
    ]


def call_easyr1_batch(function: Callable, batch: RewardBatch) -> Any:
    """`compute_score(reward_inputs) -> [{"overall": ..., more}]`. `response_length` is in tokens, or in words
    where the texts come from elsewhere."""
    answers = function(reward_inputs=_easyr1_inputs(batch))
    values = numbers([_score(answer, "overall") for answer in answers], len(batch))
    return Judged(values=values, metrics=_mean_metrics(answers, "overall"))


def call_easyr1_each(function: Callable, batch: RewardBatch) -> Any:
    """`compute_score(reward_input) -> {"overall": ..., more}`."""
    return _each(function, [{"reward_input": each} for each in _easyr1_inputs(batch)], "overall")


def call_openrlhf(function: Callable, batch: RewardBatch) -> Any:
    """`reward_func(queries, prompts, labels) -> {"rewards": [B], "extra_logs": {...}}`, or just the rewards."""
    prompts = [prompt_text(prompt) for prompt in batch.prompts]
    queries = [prompt + _text(batch, row) for row, prompt in enumerate(prompts)]
    known = {"queries": queries, "prompts": prompts}
    parameters = inspect.signature(function).parameters
    if "labels" in parameters:
        known["labels"] = _column(batch, ("label", "labels", "ground_truth", "answer"))
    answer = function(**{name: value for name, value in known.items() if name in parameters})
    if not isinstance(answer, Mapping):
        return answer
    logs = {
        name: float(np.mean(np.asarray(values, dtype=float))) for name, values in answer.get("extra_logs", {}).items()
    }
    return Judged(values=numbers(_score(answer, "rewards"), len(batch)), metrics=logs)


def call_flow_grpo(function: Callable, batch: RewardBatch) -> Any:
    """`f(images, prompts, metadata) -> (scores, info)` with images as a tensor [B, 3, H, W] in [0, 1]. Scores may be a
    dict of several, whose "avg" counts."""
    metadata = [{name: values[row] for name, values in batch.columns.items()} for row in range(len(batch))]
    with no_grad():
        answer = function(picture_tensor(batch.pictures), list(batch.prompts), metadata)
    scores = answer[0] if isinstance(answer, tuple) else answer
    if not isinstance(scores, Mapping):
        return scores
    others = {name: float(np.mean(np.asarray(values, dtype=float))) for name, values in scores.items() if name != "avg"}
    return Judged(values=numbers(_score(scores, "avg"), len(batch)), metrics=others)


@dataclass(slots=True)
class FlowFactoryConfig:
    """What Flow-Factory's reward models read of their configuration."""

    name: str
    device: Any
    dtype: Any
    batch_size: int = 64
    reward_model: str = ""
    weight: float = 1.0
    extra_kwargs: dict[str, Any] = field(default_factory=dict)


def flow_factory_start(target: type, arguments: Mapping[str, Any], device: str) -> tuple[Any, Any]:
    """The (config, accelerator) that a Flow-Factory reward model is constructed with."""
    import torch

    known = {name: value for name, value in arguments.items() if name in ("batch_size", "dtype")}
    dtype = getattr(torch, known.get("dtype", "float32"))
    rest = {name: value for name, value in arguments.items() if name not in known}
    config = FlowFactoryConfig(
        name=target.__name__,
        device=torch.device(device),
        dtype=dtype,
        batch_size=known.get("batch_size", 64),
        extra_kwargs=rest,
    )
    return config, SimpleNamespace(device=torch.device(device), process_index=0, num_processes=1, is_main_process=True)


def call_flow_factory(function: Any, batch: RewardBatch) -> Any:
    """`model(prompt=..., image=..., ...) -> RewardModelOutput(rewards, extra_info)`, with its `required_fields`."""
    images: Any = [pictures[0] for pictures in batch.pictures] if all(batch.pictures) else None
    if images is not None and getattr(function, "use_tensor_inputs", False):  # a marker, which bare classes lack
        images = list(picture_tensor(batch.pictures))
    available = {
        "prompt": [prompt_text(prompt) for prompt in batch.prompts],
        "image": images,
        "video": [list(pictures) for pictures in batch.pictures] if all(batch.pictures) else None,
        "condition_images": list(batch.columns["images"]) if "images" in batch.columns else None,
        **{name: list(values) for name, values in batch.columns.items() if name != "images"},
    }
    given = {}
    for name in function.required_fields:
        if available.get(name) is None:
            raise RewardError(f"needs the field {name!r}; the data have: {', '.join(batch.columns) or 'none'}")
        given[name] = available[name]
    with no_grad():
        answer = function(**given)
    rewards = answer.rewards
    return rewards.flatten().tolist() if is_tensor(rewards) else rewards


CONVENTIONS: tuple[tuple[str, set[str], Callable[[Callable, RewardBatch], Any]], ...] = (
    ("verl", {"solution_str"}, call_verl),
    ("verl-omni", {"solution_image"}, call_verl),
    ("EasyR1", {"reward_inputs"}, call_easyr1_batch),
    ("EasyR1 sequential", {"reward_input"}, call_easyr1_each),
    ("OpenRLHF", {"queries"}, call_openrlhf),
    ("flow_grpo", {"images", "metadata"}, call_flow_grpo),
)
"""(name, parameters that tell it, how it is called)."""

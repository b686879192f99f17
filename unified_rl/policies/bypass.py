"""Stand-ins for a denoiser's outputs where a replay does not need the real forward: zeros of the recorded form, or what
it gave in the rollout, for guidance that remembers earlier steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from unified_rl.policies import row_split
from unified_rl.policies.scheduler_head import AskedPass, LoopLeft, SamplePass, UnsupportedPipelineError

MAX_UNSERVED = 8
"""Scheduler steps that may follow the last denoiser call."""


def recording(
    tape: SamplePass, templates: list[list[Any]], num_rows: int, outputs: list[list[Any]] | None = None
) -> Callable:
    """A denoiser wrapper that notes the form of each output, per (step, call), and in `outputs` what it was (CPU)."""

    def denoise(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        inputs = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
        tape.input_shape = inputs[0].shape if inputs else None
        output = forward(*args, **kwargs)
        while len(templates) <= tape.step:
            templates.append([])
            if outputs is not None:
                outputs.append([])
        templates[tape.step].append(_template(output, num_rows))
        if outputs is not None:
            outputs[tape.step].append(_moved(output, torch.device("cpu")))
        return output

    return denoise


def outputs_by_row(outputs: Sequence[Sequence[Any]], stochastic: Sequence[bool], num_rows: int) -> list[Any]:
    """What `recording` noted, for each row: [steps][calls] of its part and of what puts parts together again. Up to the
    last stochastic step, if there is one: no replay skips later ones."""
    outputs = outputs[: 1 + max((step for step, noisy in enumerate(stochastic) if noisy), default=len(outputs))]
    rows: list[list[list[Any]]] = [[[] for _ in outputs] for _ in range(num_rows)]
    for step, calls in enumerate(outputs):
        for output in calls:
            layout = _layout(output, num_rows)
            form = (layout, row_split.emptied(output, layout))
            for row in range(num_rows):
                rows[row][step].append((row_split.take(output, layout, row, num_rows), form))
    return rows


def bypassing(
    tape: AskedPass, templates: list[list[Any]], num_rows: int, outputs: Sequence[Any] | None = None
) -> Callable:
    """A denoiser wrapper that runs the real forward only where its output reaches an asked step: calls made at one step
    serve every step up to the next one with calls of its own (joint audio and video loops step two schedulers).

    Args:
        outputs: of the rows, from `outputs_by_row`; None: zeros stand in.
    """
    calls = {"step": -1, "count": 0}
    serves = [bool(_served(templates, step) & set(tape.asked)) for step in range(len(templates))]

    def denoise(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if calls["step"] != tape.step:
            calls.update(step=tape.step, count=0)
        call, calls["count"] = calls["count"], calls["count"] + 1
        if tape.step < len(serves) and serves[tape.step]:
            return forward(*args, **kwargs)
        if tape.step >= len(templates) or call >= len(templates[tape.step]):
            raise UnsupportedPipelineError("the replayed loop calls the denoiser more often than sampling did")
        device = next(value.device for value in [*args, *kwargs.values()] if isinstance(value, Tensor))
        if outputs is not None and tape.step < len(outputs[0]):
            return _moved(_joined([row[tape.step][call] for row in outputs]), device)
        return _zeros(templates[tape.step][call], num_rows, device)

    return denoise


def calling(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """A denoiser wrapper that makes every call."""
    return forward(*args, **kwargs)


def leaving(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """A denoiser wrapper that leaves the loop."""
    raise LoopLeft


def _served(templates: list[list[Any]], step: int) -> set[int]:
    """The steps whose latest denoiser calls were made at `step`."""
    with_calls = [later for later in range(step + 1, len(templates)) if templates[later]]
    # Nothing was called after the last such step, so that every later step may depend on it.
    return set(range(step, with_calls[0])) if with_calls else set(range(step, step + MAX_UNSERVED))


def _template(output: Any, num_rows: int) -> Any:
    """The form of a denoiser's output: for a tensor (rows per sample, further shape, dtype)."""
    if isinstance(output, Tensor):
        if output.shape[0] % num_rows:
            raise UnsupportedPipelineError(f"the denoiser gave {output.shape[0]} rows for {num_rows} samples")
        return (output.shape[0] // num_rows, tuple(output.shape[1:]), output.dtype)
    if isinstance(output, dict):  # a BaseOutput, or by the number of a block (Z-Image's ControlNet)
        return (type(output), {key: _template(value, num_rows) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return (type(output), [_template(value, num_rows) for value in output])
    if output is None:
        return None
    raise UnsupportedPipelineError(f"the denoiser returns a {type(output).__name__}, which cannot be bypassed")


def _layout(output: Any, num_rows: int) -> row_split.Layout:
    """That of a denoiser's output: guidance puts all rows behind each other."""
    if isinstance(output, Tensor):
        return row_split.Layout("rows", blocks=len(output) // num_rows)
    if output is None:
        return row_split.Layout("rows")
    parts = output.values() if isinstance(output, dict) else output
    return row_split.Layout("parts", parts=tuple(_layout(part, num_rows) for part in parts))


def _joined(rows: Sequence[tuple[Any, tuple[row_split.Layout, Any]]]) -> Any:
    layout, like = rows[0][1]
    return row_split.join([part for part, _ in rows], layout, like=like)


def _moved(output: Any, device: torch.device) -> Any:
    """A denoiser's output on another device, without its graph."""
    if isinstance(output, Tensor):
        return output.detach().to(device)
    if isinstance(output, BaseOutput):
        return type(output)(**{key: _moved(value, device) for key, value in output.items()})
    if isinstance(output, dict):
        return {key: _moved(value, device) for key, value in output.items()}
    return output if output is None else type(output)(_moved(value, device) for value in output)


def _zeros(template: Any, num_rows: int, device: torch.device) -> Any:
    if template is None:
        return None
    if isinstance(template[0], int):
        rows, shape, dtype = template
        return torch.zeros((rows * num_rows, *shape), dtype=dtype, device=device)
    kind, parts = template
    if isinstance(parts, dict):
        zeros = {key: _zeros(value, num_rows, device) for key, value in parts.items()}
        return kind(**zeros) if issubclass(kind, BaseOutput) else zeros
    return kind(_zeros(value, num_rows, device) for value in parts)

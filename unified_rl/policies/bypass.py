"""Stand-ins for a denoiser's outputs: zeros of the recorded form where a replay does not need the real forward."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from unified_rl.policies.scheduler_head import AskedPass, SamplePass, UnsupportedPipelineError

MAX_UNSERVED = 8
"""Scheduler steps that may follow the last denoiser call."""


def recording(tape: SamplePass, templates: list[list[Any]], num_rows: int) -> Callable:
    """A denoiser wrapper that notes the form of each output, per (step, call)."""

    def denoise(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        inputs = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
        tape.input_shape = inputs[0].shape if inputs else None
        output = forward(*args, **kwargs)
        while len(templates) <= tape.step:
            templates.append([])
        templates[tape.step].append(_template(output, num_rows))
        return output

    return denoise


def bypassing(tape: AskedPass, templates: list[list[Any]], num_rows: int) -> Callable:
    """A denoiser wrapper that runs the real forward only where its output reaches an asked step: calls made at one step
    serve every step up to the next one with calls of its own (joint audio and video loops step two schedulers)."""
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
        return _zeros(templates[tape.step][call], num_rows, device)

    return denoise


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

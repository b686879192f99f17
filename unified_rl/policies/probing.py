"""What may set a policy's replay apart from its rollout, as changes that can be tried (`protocols.Probe`)."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from unified_rl.policies.sharded import is_sharded
from unified_rl.protocols import Probe

FLOAT32 = "in float32"
UNGUIDED = "without guidance"
UNGUIDED_REMEDY = "what guides remembers or draws something of its own; train with the guidance scale at 1"
STATEFUL = "the denoiser or the scheduler remembers earlier steps (a cache, a multistep solver); switch that off"
MOMENTUM = " (if a guider's momentum does, policy.sampling.store_outputs: true)"
"""What else helps where a denoiser's outputs can be stored."""
GUIDANCE = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "pag_scale": 0.0}
"""Endings of the call arguments that weigh guidance, and the values at which it does nothing."""


@contextmanager
def in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside it, all weights are float32 and nothing is cast down; then they are the very tensors that they were."""
    weights = {each for module in modules for each in (*module.parameters(), *module.buffers())}
    low = {each: each.data for each in weights if each.is_floating_point() and each.dtype != torch.float32}
    device = max(each.device.type for each in weights)  # "cuda", where some are on the "cpu"
    try:
        for each, data in low.items():
            each.data = data.float()
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for each, data in low.items():
            each.data = data


def float32_probes(
    modules: Iterable[nn.Module], afresh: Callable[[], AbstractContextManager[None]] = nullcontext
) -> list[Probe]:
    """That probe, where it changes anything and this process holds whole weights.

    Args:
        afresh: inside it, results that low precision gave are forgotten.
    """
    parts = [*modules]

    @contextmanager
    def active() -> Iterator[None]:
        with in_float32(parts), afresh():
            yield

    dtypes = {each.dtype for part in parts for each in part.parameters() if each.is_floating_point()}
    if dtypes == {torch.float32} or any(is_sharded(part) for part in parts):
        return []
    return [Probe(change=FLOAT32, remedy="set policy.dtype: float32", active=active)]


def prefill_probe(active: Callable[[], AbstractContextManager[None]]) -> Probe:
    """A language model that computes every row's own prompt."""
    change = "with each row's prompt computed on its own"
    return Probe(change=change, remedy="rounding differs where a group shares its prompt; use float32", active=active)


@contextmanager
def switched_off(owner: object, name: str) -> Iterator[None]:
    """Inside it, a flag of a policy is False."""
    setattr(owner, name, False)
    try:
        yield
    finally:
        setattr(owner, name, True)


def without_guidance(pipeline_class: type, arguments: Mapping[str, Any]) -> dict[str, float]:
    """The arguments of a call that weigh guidance and do something, at the values where they do not."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    off = {key: value for key in parameters for end, value in GUIDANCE.items() if key.endswith(end)}
    given = {key: arguments.get(key, parameters[key].default) for key in off}
    return {key: value for key, value in off.items() if isinstance(given[key], (int, float)) and given[key] != value}

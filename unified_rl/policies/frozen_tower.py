"""A frozen vision tower that runs once for a batch of pictures, however often the batch is scored.

The reference's forward, and every further pass over a rollout, finds the features that the first forward computed.
They are kept by the content of the tower's inputs, so a batch of other rows is computed anew.
"""

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from unified_rl.policies.memo import Memo


def find_towers(model: Any) -> list[nn.Module]:
    """The vision encoders inside `model`: the outermost parts that are built from its vision configuration."""
    if "vision_config" not in model.config.sub_configs:
        return []
    kind = type(model.config.vision_config)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(module, PreTrainedModel) and isinstance(module.config, kind):
            found[name] = module
    return list(found.values())


def remember(model: Any, memo: Memo) -> None:
    """Put `memo` before every vision encoder of `model` of which nothing is trained."""
    for number, tower in enumerate(find_towers(model)):
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.forward = _remembered(tower, f"tower {number}", memo)


def _remembered(tower: nn.Module, name: str, memo: Memo) -> Any:
    compute = tower.forward

    def fields(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        output = compute(*args, **kwargs)
        if isinstance(output, ModelOutput):
            return type(output), tuple(output.items())
        return None, output

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if any(parameter.numel() == 0 for parameter in tower.parameters()):
            # Sharded (ZeRO-3): its layers gather their weights together on all ranks, so all must run alike.
            return compute(*args, **kwargs)
        kind, value = memo.whole(name, fields, args, kwargs)
        # A fresh record each time: models write further fields into it.
        return value if kind is None else kind(**dict(value))

    return forward

"""What generation must know of weights that lie in shards on several processes (ZeRO-3).

Their layers gather them by collectives, so all processes have to call the model equally often. A process whose rows
have all ended goes on calling it until the last process has finished.
"""

from typing import Any

import torch
import torch.distributed as dist


def is_sharded(model: Any) -> bool:
    """Whether the weights of `model` are gathered from several processes when it is called."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def goes_on_anywhere(mine: bool, device: torch.device) -> bool:
    """Whether any process still decodes; called by all of them after each token."""
    flag = torch.tensor(float(mine), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)

"""What generation must know of weights that lie in shards on several processes (ZeRO-3).

Their layers gather them by collectives, so all processes have to call the model equally often, and alike. A process
whose rows have all ended goes on calling it until the last process has finished; one that has no row of a kind (with
pictures, without) computes another process's row, and throws the result away.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Inputs = dict[str, Tensor]
"""One prompt as its processor returns it."""


def is_sharded(model: Any) -> bool:
    """Whether the weights of `model` are gathered from several processes when it is called."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def goes_on_anywhere(mine: bool, device: torch.device) -> bool:
    """Whether any process still decodes; called by all of them after each token."""
    flag = torch.tensor(float(mine), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def with_stand_ins(model: Any, rows: Sequence[Inputs]) -> list[Inputs]:
    """This process's rows and, where weights are sharded, one of another process for each kind (the names of its
    inputs) that this one has none of; then called by all of them."""
    if not is_sharded(model):
        return [*rows]
    mine = {tuple(sorted(row)): row for row in rows}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    others = {kind: row for each in found for kind, row in each.items() if kind not in mine}
    return [*rows, *others.values()]

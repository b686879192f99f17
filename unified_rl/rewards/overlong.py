"""Completions at the limit of their length: cut ones may be masked, long ones may cost reward (DAPO, Yu et al. 2025,
section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unified_rl.engine import distributed
from unified_rl.recipe.objective import Objective
from unified_rl.types import Completion, Segment


def punishment(segment: Segment, max_steps: int, objective: Objective) -> Tensor:
    """[N] what a completion's length adds to its reward, 0 to -1 (DAPO, eq. 13 with L_max = max_steps)."""
    lengths = segment.loss_mask.sum(1).float()
    if objective.overlong != "penalty":
        return torch.zeros_like(lengths)
    margin = objective.overlong_margin * max_steps
    return -((lengths - (max_steps - margin)) / margin).clamp(0, 1)


def counted(completions: Sequence[Completion], objective: Objective) -> Tensor:
    """[N] bool: the trajectories that carry loss."""
    cut = torch.tensor([completion.truncated for completion in completions])
    return ~cut if objective.overlong == "mask" else torch.ones_like(cut)


def length_metrics(segment: Segment, completions: Sequence[Completion]) -> dict[str, float]:
    """Mean length in tokens of all processes' completions, and the share that was cut. Called by every process."""
    sums = [
        float(len(completions)),
        float(segment.loss_mask.sum()),
        float(sum(completion.truncated for completion in completions)),
    ]
    num_rows, num_steps, num_cut = distributed.sum_over_ranks(sums)
    return {"completion_length": num_steps / num_rows, "frac_truncated": num_cut / num_rows}

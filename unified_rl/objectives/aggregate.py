"""How per-step losses become one number.

The denominators are global counts, known before the backward pass. A weight of a step therefore does not depend on how
the steps are cut into windows, accumulated or sharded, and neither does the gradient.
"""

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


def counts(loss_mask: Tensor) -> tuple[int, int]:
    """Unmasked steps, and rows with at least one, of a loss_mask [N, S] (bool): the caller all-reduces them by sum."""
    assert loss_mask.ndim == 2 and loss_mask.dtype == torch.bool, "loss_mask must be a boolean [N, S]"
    return int(loss_mask.sum()), int(loss_mask.any(1).sum())


def weights(
    loss_mask: Tensor,
    mode: Aggregation,
    *,
    num_steps: float,
    num_sequences: float,
    max_length: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of every step in the loss: loss = (per_step_loss * weights).sum(), summed over windows and processes.

    - token_mean: mean over all steps (DAPO, arXiv 2503.14476, eq. 8).
    - sequence_mean: mean over sequences of the mean over their steps (GRPO, arXiv 2402.03300, eq. 3).
    - sequence_sum: mean over sequences of the sum over their steps (LUSPO, with a sequence ratio).
    - constant: sum over num_sequences * max_length (Dr.GRPO, arXiv 2503.20783, as in TRL).

    Args:
        loss_mask: [N, S] bool, with all steps of each row: cut the result into windows, not the mask. Rows without an
            unmasked step get weight 0 and are not counted among the sequences.
        num_steps, num_sequences: `counts`, summed over all processes for the whole optimiser step.
        max_length: the constant of that mode, the most steps a sequence may have.
        dtype: of the result; computed in float64.

    Returns:
        [N, S], 0 where masked.

    Raises:
        ValueError: for an unknown mode.
    """
    assert loss_mask.ndim == 2 and loss_mask.dtype == torch.bool, "loss_mask must be a boolean [N, S]"
    mask = loss_mask.double()
    # A step of the optimiser without any unmasked step (all samples excluded) has weights 0, not 0 / 0.
    num_steps, num_sequences = max(num_steps, 1), max(num_sequences, 1)
    if mode == "token_mean":
        mask = mask / num_steps
    elif mode == "sequence_mean":
        mask = mask / mask.sum(1, keepdim=True).clamp(min=1.0) / num_sequences
    elif mode == "sequence_sum":
        mask = mask / num_sequences
    elif mode == "constant":
        mask = mask / (num_sequences * max_length)
    else:
        raise ValueError(f"aggregation {mode!r}; known: token_mean, sequence_mean, sequence_sum, constant")
    return mask.to(dtype)

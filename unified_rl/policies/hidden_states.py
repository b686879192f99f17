"""The last hidden states of a language model: what its output layer is given, caught in the forward that also gives the
logits, so that a value head costs no second pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def catching(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """Inside it, the inputs [B, L, H] of the model's output layer, one of each forward; none if not `wanted`."""
    caught: list[Tensor] = []
    if not wanted:
        yield caught
        return
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        handle.remove()


def of_completions(caught: Sequence[Tensor], owner: Sequence[int] | None, num_steps: int) -> Tensor:
    """[B, S, H] states that predicted the S tokens of B completions.

    Args:
        caught: of the forwards of `teacher_forcing.plain_logits` (owner None) or `shared_logits`.
        owner: for each completion, the number of its prompt.
    """
    if owner is None:
        (states,) = caught
        return states[:, -(num_steps + 1) : -1]
    first = caught[0][:, -1:][torch.tensor(owner, device=caught[0].device)]
    return first if num_steps == 1 else torch.cat([first, caught[1][:, -(num_steps - 1) :]], dim=1)

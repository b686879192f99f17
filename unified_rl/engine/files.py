"""Offloaded states on a disk: tensors that are files mapped into memory, of which the kernel keeps in memory what fits.

Whatever computes with such tensors computes what it would in main memory, bit for bit, with no library of its own and
no compiler. (DeepSpeed's own way to a disk compiles against libaio when a run first needs it.) The files have no names:
however a process ends, its disk space is free again.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from unified_rl.errors import RecipeError

ALIGNMENT = 64
"""Bytes: where a tensor may begin in a file."""


def check_folder(folder: str) -> None:
    """
    Raises:
        RecipeError: if no file can be made there.
    """
    try:
        with tempfile.TemporaryFile(dir=Path(folder).expanduser()):
            pass
    except OSError as error:
        raise RecipeError(f"engine.offload_folder: {folder}: no file can be made there ({error.strerror})") from error


class Files:
    """Makes tensors in files of one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).expanduser()
        self._maps: WeakSet[mmap.mmap] = WeakSet()

    def zeros_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Zeros of the same shapes and dtypes, in one file.

        Raises:
            RecipeError: if the disk has no room for them.
        """
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        if not starts[-1]:
            return [torch.zeros_like(tensor) for tensor in tensors]
        mapped = self._map(starts[-1])
        made = []
        for tensor, start, size in zip(tensors, starts, sizes, strict=False):
            raw = torch.frombuffer(mapped, dtype=torch.uint8, offset=start, count=size) if size else torch.empty(0)
            made.append(raw.view(tensor.dtype).view(tensor.shape) if size else torch.zeros_like(tensor))
        return made

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same values, in one file."""
        made = self.zeros_like(tensors)
        for target, source in zip(made, tensors, strict=True):
            target.copy_(source.detach())
        return made

    def release(self) -> None:
        """Take all that lies in files out of this process's memory, for the kernel to keep or to write as it likes."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # Reserved now: a disk that is full later would end the process by a signal.
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise RecipeError(
                f"engine.offload_folder: {self._folder}: {error.strerror}; {size / 2**20:.0f} MiB are needed there"
            ) from error
        self._maps.add(mapped)
        return mapped


def move_states(zero: Any, files: Files, *, stage: int) -> None:
    """Put what a ZeRO optimiser of DeepSpeed's keeps in main memory into files: float32 weights, their gradients, and
    Adam's moments, which are made for it (zeros after no step). Gradients that are being summed stay."""
    vectors = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for vector in vectors:
        weights, gradients, first, second = files.copies([vector, vector.grad, *[torch.zeros_like(vector)] * 2])
        vector.data, vector.grad.data = weights, gradients
        zero.optimizer.state[vector] = {"step": torch.tensor(0.0), "exp_avg": first, "exp_avg_sq": second}
    if stage < 3:
        zero._link_all_hp_params()  # each parameter's part of the vectors


def move_weights(zero: Any, files: Files, frozen: Iterable[Any]) -> None:
    """The same for the shards of the weights themselves (stage 3)."""
    for number, flat in enumerate(zero.fp16_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[number] = files.copies([flat])[0]
        zero._unflatten_partitioned_parameters(number)
    zero.param_groups_fp16_flat_cpu_memory.clear()
    shards = [parameter.ds_tensor for parameter in frozen]
    for shard, moved in zip(shards, files.copies([shard.data for shard in shards]), strict=True):
        shard.data = moved

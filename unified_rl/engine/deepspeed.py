"""The engine of several processes: DeepSpeed ZeRO stages 0 to 3. The only file that imports deepspeed.

Policies call the raw module inside its pipeline, never `engine(...)`, and the number of windows of a step is not known
in advance. So DeepSpeed runs with `managed_gradient_accumulation: false`: `backward` accumulates without any scaling,
`step` is the boundary. What had to be neutralised or worked around (DeepSpeed 0.19.8) is said where it is done.

The processes must build the same graph in the same window (the same parameters used, in the same order): from stage 2
on, gradients are exchanged while backward runs. Parameters may go unused in any window or step: at stages 0 and 1 on
any rank, from stage 2 on by all ranks alike.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unified_rl.checkpoint import CheckpointError
from unified_rl.engine import distributed
from unified_rl.engine.optimizer import build_optimizer, clipped_step, lr_at, set_lr, trained_parameters
from unified_rl.recipe import Optimizer

# Said instead of detected, because detecting it on CPU prints a warning.
os.environ.setdefault("DS_ACCELERATOR", distributed.device().type)
import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

# With a compiler at hand DeepSpeed would build a shared-memory collective for CPUs that training never calls (measured:
# two minutes at the first run). An empty table of compilable operators is its own way of saying that there is none.
deepspeed.ops.__compatible_ops__ = {}
# DeepSpeed's calls of collectives that torch renames; nothing that our user could change.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")

TAG = "zero"
"""DeepSpeed's name for the one checkpoint in a folder."""


def _config(zero_stage: int, max_grad_norm: float) -> dict[str, Any]:
    return {
        # Required by DeepSpeed, used for its own statistics only.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Sum over ranks. Stage 3 has no such switch: there `backward` undoes the average.
        "gradient_allreduce_op": "mean" if zero_stage == 3 else "sum",
        "communication_data_type": "fp32",
        # At stage 0 DeepSpeed neither reports the norm nor skips a non-finite one, so `step` does both itself.
        "gradient_clipping": max_grad_norm if zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        # Never pulls in a compiled optimiser in place of ours.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": zero_stage,
            # Overlap reduces in the order of the hooks even at stage 1, and buys nothing on CPU.
            "overlap_comm": zero_stage >= 2 and distributed.device().type == "cuda",
        },
    }


def _process_group() -> None:
    """DeepSpeed needs a process group and a launcher's variable even for one process."""
    os.environ.setdefault("LOCAL_RANK", str(distributed.local_rank()))
    if not dist.is_initialized():
        backend = "nccl" if distributed.device().type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def _scalars_as_vectors(module: nn.Module, sharded: bool) -> Iterator[None]:
    """Inside it, parameters without dimensions (a logit scale) have one: DeepSpeed cannot broadcast them otherwise."""
    scalars: list[Any] = [parameter for parameter in module.parameters() if parameter.dim() == 0]
    for parameter in scalars:
        parameter.data = parameter.data.view(1)
    yield
    for parameter in scalars:
        if sharded:
            parameter.ds_shape = torch.Size()  # the shape that it takes whenever it is gathered
        else:
            parameter.data = parameter.data.view(())


class DeepSpeedEngine:
    """`Engine` over DeepSpeed; equal to `LocalEngine` on the union of the ranks' windows."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, *, zero_stage: int, num_steps: int) -> None:
        _process_group()
        self.rank = distributed.rank()
        self.world_size = distributed.world_size()
        self._stage = zero_stage
        self._settings = optimizer
        self._num_steps = num_steps
        self._set_step(0)
        self._trained = list(trained_parameters(module).values())
        self._trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in self._trained)
        self._adam = build_optimizer(module, optimizer)
        with _scalars_as_vectors(module, sharded=zero_stage == 3):
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module, optimizer=self._adam, config=_config(zero_stage, optimizer.max_grad_norm)
            )
        self.module = module
        self._comm_bytes = 0.0
        if zero_stage == 3:
            # A policy and its critic are called by themselves, never the module that holds both.
            for called in module.children() if isinstance(module, nn.ModuleDict) else [module]:
                called.register_forward_pre_hook(self._count_gather)

    def _set_step(self, step: int) -> None:
        self._step = step
        self.lr = lr_at(step, self._num_steps, self._settings)

    @contextmanager
    def window(self) -> Iterator[None]:
        """Surrounds the forward and backward of one window."""
        if self._stage:
            # What `engine.forward` does and a direct call of the module does not. Without it stage 3 takes every window
            # for the first one of its step and overwrites the gradients of the earlier ones.
            self._zero.clear_backward_seen_flag()
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` ([], float) to the gradients of this step, summed over ranks."""
        self._engine.backward(loss * self.world_size if self._stage == 3 else loss)
        if self._stage == 2:
            self._count(2 * self._trained_bytes)
        elif self._stage == 3:
            self._count(self._trained_bytes + self._bytes_of_whole(False))

    def step(self) -> float:
        """Clip, update, zero; returns the global gradient norm before clipping, non-finite if all ranks skipped.

        A skipped update still counts as a step of the learning rate.
        """
        norm = self._plain_step() if self._stage == 0 else self._sharded_step()
        self._set_step(self._step + 1)
        if self._stage <= 1:
            self._count(2 * self._trained_bytes)
        if self._stage in (1, 2) and math.isfinite(norm):
            self._count(self._trained_bytes)
        if self._stage == 3:
            self._count(2 * self._bytes_of_whole(True))
        return norm

    def _plain_step(self) -> float:
        # Adds zeros for parameters without a gradient, so that the ranks' buckets have the same sizes.
        self._engine.buffered_allreduce_fallback()
        return clipped_step(self._adam, self._trained, self.lr, self._settings.max_grad_norm)

    def _sharded_step(self) -> float:
        set_lr(self._zero, self.lr)
        if self._stage == 1:
            # Stage 1 leaves out what has no gradient; left out on one rank only, the ranks' buckets would not match.
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self._engine.step()
        if self._stage == 3:
            # A parameter that the next step's first window does not use would keep its gradient of this step.
            self._zero.grad_partitions_flat_buffer.zero_()
        return float(self._engine.get_global_grad_norm())

    @property
    def comm_bytes(self) -> int:
        """Bytes that this rank has sent to others for training since the start, by formula.

        With P bytes of trained float32 parameters, w ranks, and ring collectives (an all-reduce of n bytes sends
        2 n (w-1)/w, a reduce-scatter or an all-gather half of that):

        - stage 0: 2 P (w-1)/w a step (all-reduce of the gradients);
        - stage 1: 3 P (w-1)/w a step (all-reduce, which is what DeepSpeed runs here; all-gather of the parameters);
        - stage 2: 2 P (w-1)/w a window and P (w-1)/w a step;
        - stage 3: P (w-1)/w a window (reduce-scatter); with A bytes of sharded parameters, frozen ones included,
          A (w-1)/w for every forward, of a rollout too, and for every backward, which is an upper bound, because
          DeepSpeed keeps parameters that it will use again soon; 2 K (w-1)/w a step for K bytes of small parameters
          that are kept whole between steps.

        Norms and flags, some bytes a step, are left out, and so are the buckets' paddings.
        """
        return round(self._comm_bytes)

    def _count(self, payload_bytes: int) -> None:
        self._comm_bytes += payload_bytes * (self.world_size - 1) / self.world_size

    def _bytes_of_whole(self, whole: bool) -> int:
        """Stage 3: bytes of the parameters that each rank keeps whole, or of the others."""
        parameters: Iterable[Any] = self.module.parameters()
        return sum(p.ds_numel * p.element_size() for p in parameters if p.ds_persist == whole)

    def _count_gather(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self._count(self._bytes_of_whole(False))

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its part of the parameters."""
        return self._stage == 3

    def shards(self) -> dict[str, Tensor]:
        """This rank's part of every trained parameter (stage 3: flat and padded), to be read or written in place."""
        trained: dict[str, Any] = trained_parameters(self.module)
        tensors = {name: (p.ds_tensor if self._stage == 3 else p).data for name, p in trained.items()}
        # A step gives parameters without dimensions one.
        return {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in tensors.items()}

    def shards_changed(self) -> None:
        """Stage 3: gather anew what is whole at the moment and was gathered from the shards before they were written
        (small parameters, and those that DeepSpeed keeps from one pass to the next); called by every rank."""
        if self._stage == 3:
            parameters: Iterable[Any] = self._trained
            whole = [p for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
            if whole:
                whole[0].partition(whole)
                whole[0].all_gather(whole)

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Inside it, `module` holds whole trained parameters on every rank (stage 3 gathers them), for saving."""
        with deepspeed.zero.GatheredParameters(self._trained, enabled=self._stage == 3):
            yield

    def save(self, directory: Path) -> None:
        """Write DeepSpeed's files, one of each rank for sharded state, and `engine.json`; called by every rank."""
        directory.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        if distributed.is_main():
            (directory / "engine.json").write_text(json.dumps({**self._identity(), "step": self._step}))
        distributed.barrier()

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, exactly; called by every rank.

        Raises:
            CheckpointError: if it was written by another engine, ZeRO stage or number of processes.
        """
        written = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
        step = written.pop("step")
        if written != self._identity():
            raise CheckpointError(f"{directory}: written by {written}, cannot be read by {self._identity()}")
        # Not strict, because frozen parameters were not written.
        path, _ = self._engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)
        if path is None:
            raise CheckpointError(f"{directory}: DeepSpeed found nothing to load")
        self._set_step(step)

    def _identity(self) -> dict[str, Any]:
        return {"engine": "deepspeed", "zero_stage": self._stage, "world_size": self.world_size}

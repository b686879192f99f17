"""The engine of several processes: DeepSpeed ZeRO stages 0 to 3. The only file that imports deepspeed.

Policies call the raw module inside its pipeline, never `engine(...)`, and the number of windows of a step is not known
in advance. So DeepSpeed runs with `managed_gradient_accumulation: false`: `backward` accumulates without any scaling,
`step` is the boundary. What had to be neutralised or worked around (DeepSpeed 0.19.8) is said where it is done.

The processes must build the same graph in the same window (the same parameters used, in the same order): from stage 2
on, gradients are exchanged while backward runs. Parameters may go unused in any window or step: at stages 0 and 1 on
any rank, from stage 2 on by all ranks alike.
"""

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

from unified_rl.engine import distributed
from unified_rl.engine.deepspeed_config import build_config
from unified_rl.engine.files import Files, move_states, move_weights
from unified_rl.engine.optimizer import build_optimizer, clipped_step, lr_at, set_lr, trained_parameters
from unified_rl.engine.state import (
    MOMENTS,
    Counts,
    load_plain_state,
    saved_state,
    shapes_of,
    state_bytes,
    write_plain_state,
    write_state,
)
from unified_rl.errors import RecipeError
from unified_rl.recipe.schema import EngineBlock, Optimizer

# Said instead of detected, because detecting it on CPU prints a warning.
os.environ.setdefault("DS_ACCELERATOR", distributed.device().type)
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

# With a compiler at hand DeepSpeed would build a shared-memory collective for CPUs that training never calls (measured:
# two minutes at the first run). An empty table of compilable operators is its own way of saying that there is none.
deepspeed.ops.__compatible_ops__ = {}
# DeepSpeed's calls of collectives that torch renames; nothing that our user could change.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scale remembers."""


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

    def __init__(self, module: nn.Module, optimizer: Optimizer, *, block: EngineBlock, num_steps: int) -> None:
        """
        Raises:
            RecipeError: if nothing is trained, or weights are of a low precision that this ZeRO stage does not keep
                float32 copies of, or this machine cannot train; or if there is no room in `block.offload_folder`.
        """
        zero_stage = block.zero_stage
        _process_group()
        self.rank = distributed.rank()
        self.world_size = distributed.world_size()
        self._stage = zero_stage
        self._settings = optimizer
        self._num_steps = num_steps
        self._set_step(0)
        self._trained: dict[str, Any] = trained_parameters(module, low_precision=zero_stage >= 2)
        self._shapes = shapes_of(self._trained)
        self._trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in self._trained.values())
        self._gradient_bytes = 4 * sum(shape.numel() for shape in self._shapes.values())
        self._adam = build_optimizer(self._trained, optimizer)
        dtype = str(next(iter(self._trained.values())).dtype).removeprefix("torch.")
        if dtype == "float16" and not get_accelerator().is_fp16_supported():
            raise RecipeError("policy.dtype: DeepSpeed does not train float16 on this machine's CPU; use bfloat16")
        config = build_config(
            block,
            dtype=dtype,
            max_grad_norm=optimizer.max_grad_norm,
            on_gpu=distributed.device().type == "cuda",
        )
        with _scalars_as_vectors(module, sharded=zero_stage == 3):
            self._engine, self._zero, _, _ = deepspeed.initialize(model=module, optimizer=self._adam, config=config)
        self.module = module
        offloads = "offload_optimizer" if zero_stage == 3 else "cpu_offload"
        self._offloaded = bool(zero_stage) and bool(vars(self._zero)[offloads])
        self._files = Files(block.offload_folder) if block.offload_folder is not None else None
        if self._files is not None:
            self._move_to(self._files, weights=block.offload == "all")
        self._sent = {"all_reduce": 0.0, "reduce_scatter": 0.0, "all_gather": 0.0}
        if zero_stage == 3:
            # A policy and its critic are called by themselves, never the module that holds both.
            for called in module.children() if isinstance(module, nn.ModuleDict) else [module]:
                called.register_forward_pre_hook(self._count_gather)

    def _move_to(self, files: Files, *, weights: bool) -> None:
        move_states(self._zero, files, stage=self._stage)
        if self._stage < 3:
            self._link_moments()
        if weights:
            move_weights(self._zero, files, [p for p in self.module.parameters() if not p.requires_grad])
        files.release()

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
            self._count("all_reduce", 2 * self._gradient_bytes)
        elif self._stage == 3:
            self._count("reduce_scatter", self._gradient_bytes)
            self._count("all_gather", self._bytes_of_whole(False))

    def discard(self) -> None:
        """Stages 0 and 1: drop the gradients of the windows since the last step, one of which may have failed."""
        assert self._stage <= 1, "gradients of earlier windows are out of reach"
        for parameter in self._trained.values():
            parameter.grad = None

    def step(self) -> float:
        """Clip, update, zero; returns the global gradient norm before clipping, non-finite if all ranks skipped.

        A skipped update still counts as a step of the learning rate.
        """
        norm = self._plain_step() if self._stage == 0 else self._sharded_step()
        self._set_step(self._step + 1)
        if self._stage <= 1:
            self._count("all_reduce", 2 * self._gradient_bytes)
        if self._stage in (1, 2) and math.isfinite(norm):
            self._count("all_gather", self._trained_bytes)
        if self._stage == 3:
            self._count("all_gather", self._bytes_of_whole(True))
        return norm

    def _plain_step(self) -> float:
        # Adds zeros for parameters without a gradient, so that the ranks' buckets have the same sizes.
        self._engine.buffered_allreduce_fallback()
        return clipped_step(self._adam, list(self._trained.values()), self.lr, self._settings.max_grad_norm)

    def _sharded_step(self) -> float:
        set_lr(self._zero, self.lr)
        if self._stage == 1:
            # Stage 1 leaves out what has no gradient; left out on one rank only, the ranks' buckets would not match.
            for parameter in self._trained.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        unlinked = self._stage < 3 and not self._zero._hp_optimizer_states_linked
        self._engine.step()
        if unlinked and self._zero._hp_optimizer_states_linked:
            # DeepSpeed looks for Adam's moments after the first group's update, when a second group has none yet.
            self._link_moments()
        if self._stage == 3:
            # A parameter that the next step's first window does not use would keep its gradient of this step.
            self._zero.grad_partitions_flat_buffer.zero_()
        if self._offloaded:
            self._forget_offloaded()
        if self._files is not None:
            self._files.release()
        # Float16: an overflow of the scaled gradients leaves the norm of the step before.
        return math.inf if self._zero.overflow else float(self._engine.get_global_grad_norm())

    def _forget_offloaded(self) -> None:
        """Zero the gradients that lie in main memory: DeepSpeed overwrites those of parameters that a step uses, and
        would train the others with what they had before."""
        zero = self._zero
        for vector in zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups:
            if vector.grad is not None:
                vector.grad.zero_()
        for sums in zero.accumulated_grads_in_cpu.values() if self._stage < 3 else ():
            sums.zero_()

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes that this rank has sent to others for training since the start, by collective and by formula.

        With P bytes of trained parameters (gradients: in float32), w ranks, and ring collectives (an all-reduce of n
        bytes sends 2 n (w-1)/w, a reduce-scatter or an all-gather half of that):

        - stage 0: 2 P (w-1)/w a step (all-reduce of the gradients);
        - stage 1: 3 P (w-1)/w a step (all-reduce, which is what DeepSpeed runs here; all-gather of the parameters);
        - stage 2: 2 P (w-1)/w a window and P (w-1)/w a step;
        - stage 3: P (w-1)/w a window (reduce-scatter); with A bytes of sharded parameters, frozen ones included,
          A (w-1)/w for every forward, of a rollout too, and for every backward, which is an upper bound, because
          DeepSpeed keeps parameters that it will use again soon; K (w-1)/w a step (all-gather) for K bytes of small
          parameters that are kept whole between steps, and more in the first step and in those that use other
          parameters than the one before, where it gathers them anew.

        Norms and flags, some bytes a step, are left out, and so are the buckets' paddings. A test compares all of it
        with what torch's collectives are given.
        """
        return {collective: round(sent) for collective, sent in self._sent.items()}

    def _count(self, collective: str, payload_bytes: int) -> None:
        self._sent[collective] += payload_bytes * (self.world_size - 1) / self.world_size

    def _bytes_of_whole(self, whole: bool) -> int:
        """Stage 3: bytes of the parameters that each rank keeps whole, or of the others."""
        parameters: Iterable[Any] = self.module.parameters()
        return sum(p.ds_numel * p.element_size() for p in parameters if p.ds_persist == whole)

    def _count_gather(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self._count("all_gather", self._bytes_of_whole(False))

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its part of the parameters."""
        return self._stage == 3

    @property
    def state_bytes(self) -> int:
        """Bytes that `save` writes, about, on all ranks together."""
        return state_bytes(self._shapes)

    def shards(self) -> dict[str, Tensor]:
        """This rank's part of every trained parameter (stage 3: flat and padded), to be read or written in place."""
        tensors = {name: (p.ds_tensor if self._stage == 3 else p).data for name, p in self._trained.items()}
        # A step gives parameters without dimensions one.
        return {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in tensors.items()}

    def shards_changed(self) -> None:
        """Stage 3: gather anew what is whole at the moment and was gathered from the shards before they were written
        (small parameters, and those that DeepSpeed keeps from one pass to the next); called by every rank."""
        if self._stage == 3:
            whole = [p for p in self._trained.values() if p.ds_status == ZeroParamStatus.AVAILABLE]
            if whole:
                whole[0].partition(whole)
                whole[0].all_gather(whole)

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Inside it, `module` holds whole parameters on every rank (stage 3 gathers them), for saving: the frozen ones
        too, unless adapters are trained, which are saved without the model that they belong to."""
        adapters = any("lora_" in name for name in self._trained)
        saved = list(self._trained.values()) if adapters else list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(saved, enabled=self._stage == 3):
            yield

    def save(self, directory: Path) -> None:
        """Write the trained weights and the optimiser's state; see `engine.state`. Called by every rank."""
        if self._stage == 0:
            write_plain_state(directory, self._trained, self._adam, self._step)
        else:
            states = [state for state in self._zero.optimizer.state.values() if state]
            adam_steps = int(states[0]["step"]) if states else 0
            counts = Counts(step=self._step, adam_steps=adam_steps, loss_scale=self._loss_scale())
            write_state(directory, self._shapes, self._read, counts)

    def load(self, directory: Path) -> None:
        """Restore what an engine's `save` wrote, exactly; called by every rank.

        The number of processes, the ZeRO stage and the engine may have been others.

        Raises:
            CheckpointError: if it was written for other parameters.
        """
        if self._stage == 0:
            self._set_step(load_plain_state(directory, self._trained, self._adam))
            return
        with saved_state(directory, self._shapes) as saved:
            self._make_moments(saved.counts.adam_steps)
            for name, parameter in self._trained.items():
                weight = saved.get("weight", name).to(distributed.device())
                self._write(None, parameter, weight)
                for kind in MOMENTS if saved.counts.adam_steps else ():
                    self._write(kind, parameter, saved.get(kind, name).to(distributed.device()))
                if self._stage < 3 or parameter.ds_status == ZeroParamStatus.AVAILABLE:
                    parameter.data.copy_(weight)
            for key, value in (saved.counts.loss_scale or {}).items():
                setattr(self._zero.loss_scaler, key, type(getattr(self._zero.loss_scaler, key))(value))
            self._set_step(saved.counts.step)

    def _loss_scale(self) -> dict[str, float] | None:
        """The state of float16's dynamic loss scale."""
        scaler = self._zero.loss_scaler
        return {key: float(vars(scaler)[key]) for key in LOSS_SCALE} if scaler.dynamic else None

    def _write(self, kind: str | None, parameter: Any, value: Tensor) -> None:
        """Set this rank's part of a parameter's float32 copy, or of one of its moments, from the whole value."""
        if self._stage == 3:
            # By the local interface: the other one fails for sizes that the number of ranks does not divide.
            size = parameter.ds_tensor.numel()
            flat = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
            part = flat[size * self.rank : size * (self.rank + 1)]
            if kind is None:
                safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.data.copy_(part)  # what forward passes gather
            else:
                safe_set_local_optimizer_state(parameter, part, kind)
        elif kind is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _read(self, kind: str, name: str) -> Tensor:
        """A whole value of sharded state, on every rank."""
        parameter = self._trained[name]
        if kind == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _make_moments(self, adam_steps: int) -> None:
        """Give Adam the state that it would have after `adam_steps` updates, its moments still zero."""
        adam = self._zero.optimizer
        if self._files is not None:
            for state in adam.state.values():
                state["step"].fill_(adam_steps)
                state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
            return
        adam.state.clear()
        flat = [vector for group in adam.param_groups for vector in group["params"]]
        if self._stage == 3:
            flat = self._zero.fp32_partitioned_groups_flat  # `param_groups` are empty between steps
        for vector in flat if adam_steps else ():
            zeros = {kind: torch.zeros_like(vector) for kind in MOMENTS}
            adam.state[vector] = {"step": torch.tensor(float(adam_steps)), **zeros}
        if self._stage < 3 and adam_steps:
            # What DeepSpeed does in its first step, or would have done: later than that, fragments point elsewhere.
            self._link_moments()

    def _link_moments(self) -> None:
        """Stages 1 and 2: let every parameter know where its moments are."""
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

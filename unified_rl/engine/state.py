"""What an engine needs to go on, as files: safetensors and JSON, nothing that could run when it is read.

The files hold whole parameters by name, not the flat buffers that ZeRO cuts them into. So a run may go on with another
number of processes, another ZeRO stage or another engine. The work is shared out: each process collects and writes its
share of the parameters, and holds no more than that share at a time.

    trainer/ engine.json  state_00000_00.safetensors (process 0, first part)  state_00001_00.safetensors ...

A key is `weight/NAME`, or `exp_avg/NAME` and `exp_avg_sq/NAME` for Adam's moments, all of them float32.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unified_rl.engine import distributed
from unified_rl.run_folder.checkpoint import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
PART_BYTES = 2 * 2**30
"""A process writes a file whenever it has collected this much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The numbers beside the tensors."""

    step: int
    """Optimiser steps taken, skipped ones included."""
    adam_steps: int
    """Updates that Adam made; 0: there are no moments yet."""
    loss_scale: dict[str, float] | None = None
    """Float16: the state of the dynamic loss scale."""


Shapes = Mapping[str, torch.Size]
"""Of all trained parameters, by name, as the model was built: ZeRO takes shapes away, and gives scalars a dimension."""


def state_bytes(shapes: Shapes) -> int:
    """Size of the files: the weights and two moments, float32."""
    return 12 * sum(shape.numel() for shape in shapes.values())


def write_state(directory: Path, shapes: Shapes, read: Callable[[str, str], Tensor], counts: Counts) -> None:
    """Write all trained parameters, their moments and `counts`; called by every rank.

    Args:
        read: the whole values of (kind, name), the kind being "weight" or a moment; called by every rank in the same
            order, because it may be a collective.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kinds = ("weight", *MOMENTS) if counts.adam_steps else ("weight",)
    owners = _share_out(shapes)
    buffer: dict[str, Tensor] = {}
    size = num_parts = 0
    error: Exception | None = None
    rank = distributed.rank()
    for name, shape in shapes.items():
        for kind in kinds:
            value = read(kind, name)
            if owners[name] == rank:
                buffer[f"{kind}/{name}"] = value.detach().to("cpu", torch.float32).reshape(shape).contiguous()
                size += value.numel() * 4
        if size >= PART_BYTES and error is None:
            # A full disk must not take this rank out of the others' collectives.
            error = _try_to_save(buffer, directory / _part(rank, num_parts))
            buffer, size, num_parts = {}, 0, num_parts + 1
        elif error is not None:
            buffer.clear()
    if error is not None:
        raise error
    if buffer:
        save_file(buffer, directory / _part(rank, num_parts))
    if distributed.is_main():
        written = {**asdict(counts), "world_size": distributed.world_size()}
        (directory / "engine.json").write_text(json.dumps(written), encoding="utf-8")


def _try_to_save(tensors: dict[str, Tensor], file: Path) -> Exception | None:
    try:
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        return error
    return None


def _part(rank: int, number: int) -> str:
    return f"state_{rank:05d}_{number:02d}.safetensors"


def _share_out(shapes: Shapes) -> dict[str, int]:
    """Which rank writes which parameter: the largest first, each to whom has least."""
    loads = [0] * distributed.world_size()
    owners = {}
    for name in sorted(shapes, key=lambda name: (-shapes[name].numel(), name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += shapes[name].numel()
    return owners


class SavedState:
    """An open folder that `write_state` filled."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        try:
            written = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
            self.world_size = int(written.pop("world_size"))
            self.counts = Counts(**written)
            self._files = {}
            for path in sorted(directory.glob("state_*.safetensors")):
                file = stack.enter_context(safe_open(path, framework="pt"))
                self._files.update(dict.fromkeys(file.keys(), file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{directory}: no state of an engine ({type(error).__name__}: {error})") from error

    def check(self, shapes: Shapes) -> None:
        """
        Raises:
            CheckpointError: if other parameters were trained, or their moments are missing.
        """
        found = {key: torch.Size(file.get_slice(key).get_shape()) for key, file in self._files.items()}
        kinds = ("weight", *MOMENTS) if self.counts.adam_steps else ("weight",)
        expected = {f"{kind}/{name}": shape for name, shape in shapes.items() for kind in kinds}
        if found != expected:
            differing = sorted(set(found) ^ set(expected)) or [key for key in expected if found[key] != expected[key]]
            raise CheckpointError(
                f"{self._directory}: other trained parameters than now, for instance {differing[0].partition('/')[2]}"
            )

    def get(self, kind: str, name: str) -> Tensor:
        """A whole value, float32 on the CPU."""
        return self._files[f"{kind}/{name}"].get_tensor(f"{kind}/{name}")


@contextmanager
def saved_state(directory: Path, shapes: Shapes) -> Iterator[SavedState]:
    """Open what `write_state` wrote and make sure that it is of these parameters.

    Raises:
        CheckpointError: if it does not, or cannot be read.
    """
    with ExitStack() as stack:
        state = SavedState(directory, stack)
        state.check(shapes)
        yield state


def write_plain_state(
    directory: Path, trained: Mapping[str, nn.Parameter], adam: torch.optim.Optimizer, step: int
) -> None:
    """`write_state` for whole parameters that `adam` updates itself."""
    moved = [state for state in adam.state.values() if state]

    def read(kind: str, name: str) -> Tensor:
        return trained[name] if kind == "weight" else adam.state[trained[name]][kind]

    adam_steps = int(moved[0]["step"]) if moved else 0
    write_state(directory, shapes_of(trained), read, Counts(step=step, adam_steps=adam_steps))


def load_plain_state(directory: Path, trained: Mapping[str, nn.Parameter], adam: torch.optim.Optimizer) -> int:
    """Restore what `write_state` wrote into whole parameters and `adam`; returns the number of steps taken.

    Raises:
        CheckpointError: if it was written for other parameters.
    """
    with saved_state(directory, shapes_of(trained)) as saved, torch.no_grad():
        adam.state.clear()
        for name, parameter in trained.items():
            parameter.copy_(saved.get("weight", name))
            if saved.counts.adam_steps:
                moments = {kind: saved.get(kind, name).to(parameter.device) for kind in MOMENTS}
                adam.state[parameter] = {"step": torch.tensor(float(saved.counts.adam_steps)), **moments}
        return saved.counts.step


def shapes_of(trained: Mapping[str, nn.Parameter]) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in trained.items()}

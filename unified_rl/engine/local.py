"""The engine of one process: plain PyTorch, the reference that the sharded engines must agree with."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unified_rl.checkpoint import CheckpointError
from unified_rl.engine import distributed
from unified_rl.engine.optimizer import build_optimizer, clipped_step, lr_at, trained_parameters
from unified_rl.recipe import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class LocalEngine:
    """`Engine` for one process."""

    rank = 0
    world_size = 1
    comm_bytes = 0

    def __init__(self, module: nn.Module, optimizer: Optimizer, *, num_steps: int) -> None:
        self.module = module.to(distributed.device())
        self._settings = optimizer
        self._num_steps = num_steps
        self._trained = trained_parameters(module)
        self._adam = build_optimizer(module, optimizer)
        self._set_step(0)

    def _set_step(self, step: int) -> None:
        self._step = step
        self.lr = lr_at(step, self._num_steps, self._settings)

    @contextmanager
    def window(self) -> Iterator[None]:
        """Nothing to prepare: PyTorch adds the gradients of windows up by itself."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` ([], float) to the gradients of this step."""
        loss.backward()

    def step(self) -> float:
        """Clip, update, zero; returns the gradient norm before clipping, non-finite if the update was skipped.

        A skipped update still counts as a step of the learning rate.
        """
        norm = clipped_step(self._adam, list(self._trained.values()), self.lr, self._settings.max_grad_norm)
        self._set_step(self._step + 1)
        return norm

    is_sharded = False

    def shards(self) -> dict[str, Tensor]:
        """The trained parameters, whole, to be read or written in place."""
        return {name: parameter.data for name, parameter in self._trained.items()}

    def shards_changed(self) -> None:
        """Nothing to follow up: the parameters are what was written."""

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Inside it, `module` holds whole trained parameters; here it always does."""
        yield

    def save(self, directory: Path) -> None:
        """Write `weights.safetensors`, `optimizer.safetensors` and `engine.json` into an existing or new folder."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: parameter.detach().contiguous() for name, parameter in self._trained.items()}
        states = {name: self._adam.state[p] for name, p in self._trained.items() if p in self._adam.state}
        moments = {f"{name}/{key}": state[key].contiguous() for name, state in states.items() for key in MOMENTS}
        save_file(weights, directory / "weights.safetensors")
        save_file(moments, directory / "optimizer.safetensors")
        counts = {"engine": "local", "step": self._step, "adam_steps": {n: int(s["step"]) for n, s in states.items()}}
        (directory / "engine.json").write_text(json.dumps(counts), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, exactly.

        Raises:
            CheckpointError: if it was written by another engine or for other parameters.
        """
        counts = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
        if counts["engine"] != "local":
            raise CheckpointError(f"{directory}: written by {counts['engine']}, cannot be read by the local engine")
        weights = load_file(directory / "weights.safetensors", device=str(distributed.device()))
        moments = load_file(directory / "optimizer.safetensors", device=str(distributed.device()))
        expected = {name: parameter.shape for name, parameter in self._trained.items()}
        if {name: weight.shape for name, weight in weights.items()} != expected:
            differing = sorted(set(weights) ^ set(expected)) or [n for n in expected if weights[n].shape != expected[n]]
            raise CheckpointError(f"{directory}: other trained parameters than now, for instance {differing[0]}")
        self._set_step(counts["step"])
        self._adam.state.clear()
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])
                if name in counts["adam_steps"]:
                    self._adam.state[parameter] = {
                        "step": torch.tensor(float(counts["adam_steps"][name])),
                        **{key: moments[f"{name}/{key}"] for key in MOMENTS},
                    }

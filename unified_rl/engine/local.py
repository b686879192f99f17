"""The engine of one process: plain PyTorch, the reference that the sharded engines must agree with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from unified_rl.engine import distributed
from unified_rl.engine.optimizer import build_optimizer, clipped_step, lr_at, trained_parameters
from unified_rl.engine.state import load_plain_state, shapes_of, state_bytes, write_plain_state
from unified_rl.recipe.schema import Optimizer


class LocalEngine:
    """`Engine` for one process."""

    rank = 0
    world_size = 1
    sent_bytes: Mapping[str, int] = {}

    def __init__(self, module: nn.Module, optimizer: Optimizer, *, num_steps: int) -> None:
        self.module = module.to(distributed.device())
        self._settings = optimizer
        self._num_steps = num_steps
        self._trained = trained_parameters(module)
        self._adam = build_optimizer(self._trained, optimizer)
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

    def discard(self) -> None:
        """Drop the gradients of the windows since the last step."""
        self._adam.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Clip, update, zero; returns the gradient norm before clipping, non-finite if the update was skipped.

        A skipped update still counts as a step of the learning rate.
        """
        norm = clipped_step(self._adam, list(self._trained.values()), self.lr, self._settings.max_grad_norm)
        self._set_step(self._step + 1)
        return norm

    is_sharded = False

    @property
    def state_bytes(self) -> int:
        """Bytes that `save` writes, about."""
        return state_bytes(shapes_of(self._trained))

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
        """Write the trained weights and the optimiser's state; see `engine.state`."""
        write_plain_state(directory, self._trained, self._adam, self._step)

    def load(self, directory: Path) -> None:
        """Restore what an engine's `save` wrote, exactly.

        Raises:
            CheckpointError: if it was written for other parameters.
        """
        self._set_step(load_plain_state(directory, self._trained, self._adam))

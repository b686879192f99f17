"""Named copies of the trained weights ("ema", "old"...), each following them by its own rule, and how to act with one.

    with snapshots.use("ema"):       # the policy now samples and scores with that copy
        reference = policy.log_prob(name, segment, steps)
    # here every trained weight is back, bit for bit

Nothing here knows a policy: what changes are the engine's trained parameters, in place, so `use` works around whatever
runs the model: a rollout, an evaluation, a divergence from a moving reference, `policy.save`. Only trained parameters
are kept (of a LoRA run, the adapter), in float32, and under ZeRO-3 only this rank's shards: neither following nor
switching sends anything except the small parameters that ZeRO-3 keeps whole.

A recipe names its copies under `ema` and `snapshots`; `use("trained")` does nothing, so that a recipe's key can be
handed on as it is. `tick` belongs to the trainer alone, which calls it after every optimiser step and every rollout.
All processes must switch together.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unified_rl.recipe.snapshot import Snapshot
from unified_rl.run_folder.checkpoint import CheckpointError

TRAINED = "trained"
"""The name of the weights themselves."""
Clock = Literal["step", "rollout"]


class HoldsWeights(Protocol):
    """What this module needs of an engine."""

    rank: int
    world_size: int

    @property
    def is_sharded(self) -> bool: ...
    def shards(self) -> dict[str, Tensor]: ...
    def shards_changed(self) -> None: ...


def decay_at(tick: int, rule: Snapshot) -> float:
    """The share d of the old copy that an update at `tick` (from 0) keeps."""
    if rule.warmup == "linear":
        return min(rule.decay, rule.slope * max(0, tick - rule.delay))
    if rule.warmup == "hyperbolic":
        return min(rule.decay, (1 + tick) / (10 + tick))
    return rule.decay


class Snapshots:
    """The copies of one run; equal on every process, or sharded as the weights are."""

    def __init__(self, engine: HoldsWeights, rules: Mapping[str, Snapshot]) -> None:
        self._engine = engine
        self._rules = dict(rules)
        self._ticks: dict[str, int] = {"step": 0, "rollout": 0}
        self._copies = {name: _copied(engine.shards()) for name in rules}
        self._active = TRAINED

    def __contains__(self, name: str) -> bool:
        return name in self._rules

    @torch.no_grad()
    def tick(self, clock: Clock) -> None:
        """Let the copies that follow this clock move towards the trained weights."""
        assert self._active == TRAINED, f"the trained weights are away: {self._active} is in their place"
        now = self._ticks[clock]
        self._ticks[clock] = now + 1
        for name, rule in self._rules.items():
            if rule.clock == clock and (now + 1) % rule.every == 0 and rule.decay < 1:
                weight = 1.0 - decay_at(now, rule)
                shards = self._engine.shards()
                torch._foreach_lerp_(list(self._copies[name].values()), list(shards.values()), weight)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside it, the policy's trained weights are those of a snapshot; "trained" changes nothing.

        Weights must not be trained, ticked or switched again inside.

        Raises:
            KeyError: if the recipe names no such snapshot.
        """
        if name == TRAINED:
            yield
            return
        assert self._active == TRAINED, f"{self._active} is in use"
        self._exchange(name)
        self._active = name
        try:
            yield
        finally:
            self._exchange(name)
            self._active = TRAINED

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        """Put the copy where the weights are and the weights where the copy was: no third set of them in memory."""
        copy = self._copies[name]
        for key, shard in self._engine.shards().items():
            kept = shard.clone()
            shard.copy_(copy[key])
            copy[key].copy_(kept)
        self._engine.shards_changed()

    def save(self, directory: Path) -> None:
        """Write the copies, one file for each rank that holds something of its own; called by every rank."""
        if not self._rules or (self._engine.rank and not self._engine.is_sharded):
            return
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}/{key}": tensor for name, copy in self._copies.items() for key, tensor in copy.items()}
        part, num_parts = self._cut
        # One entry: safetensors writes several in an order that differs between processes, and the hash with it.
        metadata = {"snapshots": json.dumps({"ticks": self._ticks, "num_parts": num_parts})}
        save_file(tensors, _file(directory, part), metadata=metadata)

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote, exactly, with any number of processes and ZeRO stage; the engine's weights are
        restored before.

        A copy that the recipe has now and the checkpoint lacks starts from the restored weights (with decay 1, it stays
        what the run started from).

        Raises:
            CheckpointError: if the copies are of other parameters, or a file is missing.
        """
        if not self._rules:
            return
        found: dict[str, Tensor] = {}
        if directory.is_dir():
            sizes = {f"{name}/{key}": tensor for name, copy in self._copies.items() for key, tensor in copy.items()}
            found, self._ticks = _read(directory, sizes, *self._cut)
        for name, rule in self._rules.items():
            stored = {key.removeprefix(f"{name}/"): found[key] for key in found if key.startswith(f"{name}/")}
            if not stored and rule.decay == 1:
                continue
            source = stored or self._engine.shards()
            for key, tensor in self._copies[name].items():
                if key not in source or source[key].shape != tensor.shape:
                    raise CheckpointError(f"{directory}: other trained parameters than now, for instance {key}")
                tensor.copy_(source[key])

    @property
    def _cut(self) -> tuple[int, int]:
        """Which part of the weights this process holds, and of how many."""
        return (self._engine.rank, self._engine.world_size) if self._engine.is_sharded else (0, 1)


def _file(directory: Path, part: int) -> Path:
    return directory / f"rank_{part:05d}.safetensors"


def _read(
    directory: Path, mine: Mapping[str, Tensor], part: int, num_parts: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """This process's part of every copy and the ticks, from files that may hold the weights in another number of parts.

    Args:
        mine: what the parts look like now, by the keys of the files.
    """
    try:
        with safe_open(_file(directory, 0), "pt") as opened:
            metadata = json.loads(opened.metadata()["snapshots"])
        ticks, written = metadata["ticks"], metadata["num_parts"]
        if written == num_parts:
            return load_file(_file(directory, part)), ticks
        parts = [load_file(_file(directory, number)) for number in range(written)]
        whole = {key: torch.cat([tensors[key].flatten() for tensors in parts]) for key in parts[0]}
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: no whole set of snapshots ({type(error).__name__}: {error})") from error
    found = {}
    for key in whole.keys() & mine.keys():
        size = mine[key].numel()
        spare = size * num_parts - whole[key].numel()
        # Both ends of the vector may be padded, by less than one value a part.
        if abs(spare) >= max(num_parts, written):
            raise CheckpointError(f"{directory}: other trained parameters than now, for instance {key}")
        vector = torch.nn.functional.pad(whole[key], (0, max(0, spare)))
        found[key] = vector[size * part : size * (part + 1)].view_as(mine[key])
    return found, ticks


def _copied(shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for key, shard in shards.items():
        assert shard.dtype == torch.float32, f"{key} is {shard.dtype}; switching back would not be exact"
    return {key: shard.detach().clone() for key, shard in shards.items()}

"""Trackers: TensorBoard, Weights & Biases, or a class of your own are told what a run writes into its folder.

Each has a thread and a bounded queue of its own. One that raises, blocks or loses its server costs its own rows and one
warning, never the run's: the folder is written first, and nobody waits for a tracker before the run's end.
"""

import importlib
import math
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unified_rl.imports import load_import, one_line
from unified_rl.plain_text import prompt_text, redact
from unified_rl.recipe.tracker import TrackerBlock
from unified_rl.run_folder.sample import Sample

MAX_WAITING = 1000
"""Calls that may wait for a slow tracker; what comes on top is left out."""


class Tracker(Protocol):
    """What a tracker's class must do; it is made as `Class(run=folder, recipe=keys, step=n, **arguments)`, where `step`
    is the one that the run goes on from (0: it begins)."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of an optimiser step; those of an evaluation begin with `eval/`. NaNs are left out."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The samples that are kept of a step."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard; a resumed run hides the steps that it repeats."""

    def __init__(self, *, run: Path, recipe: Mapping[str, Any], step: int, **arguments: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = step + 1 if step else None
        self._writer: Any = SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=purge_step, **arguments)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for index, sample in enumerate(samples):
            for number, image in enumerate(sample["images"]):
                pixels = np.asarray(image.convert("RGB"))
                self._writer.add_image(f"samples/{index:03d}_{number}", pixels, step, dataformats="HWC")
            self._writer.add_text(f"samples/{index:03d}", _caption(sample), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one after a resume (its name is kept in RUN/wandb_id)."""

    def __init__(self, *, run: Path, recipe: Mapping[str, Any], step: int, **arguments: Any) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        known = run / "wandb_id"
        if step == 0 or not known.is_file():
            known.write_text(secrets.token_hex(4), encoding="utf-8")
        own = {"name": run.name, "dir": str(run), "id": known.read_text(encoding="utf-8"), "resume": "allow"}
        self._run: Any = self._wandb.init(**{"project": "unified_rl", "config": dict(recipe), **own, **arguments})
        # wandb's own counter refuses steps that a resumed run repeats
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        pictures = [
            self._wandb.Image(image, caption=_caption(sample)) for sample in samples for image in sample["images"]
        ]
        texts = [[prompt_text(sample["prompt"]), sample["text"]] for sample in samples if sample["text"] is not None]
        found = {"samples": pictures} if pictures else {}
        if texts:
            found["texts"] = self._wandb.Table(columns=["prompt", "text"], data=texts)
        self._run.log({**found, "step": step})

    def close(self) -> None:
        self._run.finish()


CLASSES: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Follower:
    """Passes calls on to a tracker, in a thread of its own."""

    def __init__(self, block: TrackerBlock, tell: Callable[[str], None], **context: Any) -> None:
        """
        Args:
            tell: is given a warning, by the thread that calls this object.
            context: what every tracker is made with.
        """
        self._block, self._tell, self._context = block, tell, context
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(MAX_WAITING)
        self._trouble = ""
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {block.name}", daemon=True)
        self._thread.start()

    def log(self, step: int, row: Mapping[str, float | int | None], prefix: str = "") -> None:
        """Numbers of an optimiser step, those that are finite."""
        values = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        self._pass_on("log", step, {f"{prefix}{name}": value for name, value in values.items() if name != "step"})

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._pass_on("log_samples", step, list(samples))

    def close(self) -> None:
        """Let it send what waits, for at most the block's timeout."""
        self._pass_on("close")
        if not self._trouble:
            self._thread.join(self._block.timeout)
            if self._thread.is_alive():
                self._trouble = f"did not finish within {self._block.timeout:g} s"
        self._warn()

    def _pass_on(self, name: str, *arguments: Any) -> None:
        self._warn()
        if self._trouble:
            return
        try:
            self._calls.put_nowait((name, arguments))
        except queue.Full:
            self._trouble = f"is {MAX_WAITING} calls behind"
            self._warn()

    def _warn(self) -> None:
        if self._trouble and not self._told:
            self._told = True
            why = f"{self._block.name} {self._trouble}"
            self._tell(f"trackers: {why}; it is told nothing more, the run's folder has it all")

    def _work(self) -> None:
        try:
            make = CLASSES.get(self._block.name) or load_import(self._block.name, "trackers")
            tracker = make(**self._context, **self._block.arguments)
            name = ""
            while name != "close":
                name, arguments = self._calls.get()
                getattr(tracker, name)(*arguments)
        except Exception as error:  # a tracker's server, package or class may raise anything
            self._trouble = redact(f"failed: {type(error).__name__}: {one_line(error)}")


def _caption(sample: Sample) -> str:
    rewards = "  ".join(f"{name} {value:.3g}" for name, value in sample["rewards"].items())
    text = "" if sample["text"] is None else f"\n\n{sample['text']}"
    return f"{prompt_text(sample['prompt'])}{text}\n\n{rewards}"

"""A run's folder and its console: everything that a run writes for people, and nothing that it needs to resume.

    RUN/ recipe.yaml  metrics.jsonl  eval.jsonl  events.jsonl  samples/step_000010/{*.png, *.npy, samples.jsonl}

Rows are appended and the file closed at once, so that a killed run loses at most the line that it was writing. Trackers
are told afterwards (trackers.py).
"""

import fcntl
import json
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from PIL import Image
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unified_rl.errors import RecipeError
from unified_rl.plain_text import clean, prompt_text, redact
from unified_rl.recipe.file import dump_recipe
from unified_rl.recipe.schema import Recipe
from unified_rl.run_folder.sample import Sample
from unified_rl.run_folder.trackers import Follower

if TYPE_CHECKING:  # protocols imports torch, which reading a run's folder does not need
    from unified_rl.protocols import Console

Level = Literal["info", "warning", "error"]


class Run(Protocol):
    """What the trainer may ask of a run's folder; see `RunFolder` for what each method does."""

    path: Path

    def write_recipe(self, recipe: Recipe) -> None: ...
    def log_metrics(self, row: Mapping[str, float | int | None]) -> None: ...
    def log_evaluation(self, row: Mapping[str, float | int | None]) -> None: ...
    def log_ranks(self, row: Mapping[str, Any]) -> None: ...
    def log_event(self, level: Level, message: str) -> None: ...
    def save_samples(self, step: int, rows: Sequence[Sample]) -> None: ...
    def truncate(self, step: int) -> None: ...
    def follow(self, recipe: Recipe, step: int, show: Callable[[str], None]) -> None: ...
    def close(self) -> None: ...


class NullRun:
    """The run's folder as the processes other than the first see it: nothing is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_recipe(self, recipe: Recipe) -> None:
        pass

    def log_metrics(self, row: Mapping[str, float | int | None]) -> None:
        pass

    def log_evaluation(self, row: Mapping[str, float | int | None]) -> None:
        pass

    def log_ranks(self, row: Mapping[str, Any]) -> None:
        pass

    def log_event(self, level: Level, message: str) -> None:
        pass

    def save_samples(self, step: int, rows: Sequence[Sample]) -> None:
        pass

    def truncate(self, step: int) -> None:
        pass

    def follow(self, recipe: Recipe, step: int, show: Callable[[str], None]) -> None:
        pass

    def close(self) -> None:
        pass


class RunFolder:
    """A run's folder, locked for this process until `close` or the process ends."""

    def __init__(self, path: Path) -> None:
        """Create the folder and lock it.

        Raises:
            RecipeError: if the folder cannot be written, or another process that is alive holds it.
        """
        check_writable(path)
        self.path = path
        self._lock = _lock(path / "run.lock")
        self._followers: list[Follower] = []

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.yaml, which `load_recipe` reads back to an equal recipe."""
        write_whole(self.path / "recipe.yaml", dump_recipe(recipe))

    def log_metrics(self, row: Mapping[str, float | int | None]) -> None:
        """Append one optimiser step to metrics.jsonl; NaN and infinities become null."""
        _append(self.path / "metrics.jsonl", row)
        for follower in self._followers:
            follower.log(int(row["step"] or 0), row)

    def log_evaluation(self, row: Mapping[str, float | int | None]) -> None:
        """Append one evaluation to eval.jsonl; NaN and infinities become null."""
        _append(self.path / "eval.jsonl", row)
        for follower in self._followers:
            follower.log(int(row["step"] or 0), row, "eval/")

    def log_ranks(self, row: Mapping[str, Any]) -> None:
        """Append what each process says of an optimiser step to ranks.jsonl."""
        _append(self.path / "ranks.jsonl", row)

    def log_event(self, level: Level, message: str) -> None:
        """Append to events.jsonl with the time; secrets in the message are masked."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        _append(self.path / "events.jsonl", {"time": now, "level": level, "message": redact(message)})

    def samples_folder(self, step: int) -> Path:
        """Where the samples of a step lie: samples/step_000010."""
        return samples_folder(self.path, step)

    def save_samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Write pictures and samples.jsonl, replacing what an interrupted run left there."""
        folder = self.samples_folder(step)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        lines = [to_json(_save_sample(folder, f"{index:03d}", row)) for index, row in enumerate(rows)]
        # last, so that a folder with samples.jsonl is complete
        write_whole(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
        for follower in self._followers:
            follower.log_samples(step, rows)

    def truncate(self, step: int) -> None:
        """Forget metrics, evaluations and samples of later steps, which a resumed run repeats; -1 forgets all. Events
        stay: they tell what happened."""
        for name in ("metrics.jsonl", "eval.jsonl", "ranks.jsonl"):
            file = self.path / name
            if file.is_file():
                kept = [row for row in read_jsonl(file) if row["step"] <= step]
                write_whole(file, "".join(f"{to_json(row)}\n" for row in kept))
        for later, folder in sample_folders(self.path):
            if later > step:
                shutil.rmtree(folder)

    def follow(self, recipe: Recipe, step: int, show: Callable[[str], None]) -> None:
        """From now on tell the recipe's trackers what is written; the run goes on from `step` (0: it begins)."""

        def tell(warning: str) -> None:
            self.log_event("warning", warning)
            show(f"warning: {warning}")

        context = {"run": self.path, "recipe": recipe.model_dump(mode="json"), "step": step}
        self._followers = [Follower(block, tell, **context) for block in recipe.trackers]

    def close(self) -> None:
        """Let trackers finish and release the lock."""
        while self._followers:
            self._followers.pop().close()
        if self._lock >= 0:
            (self.path / "run.lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def open_run(path: Path, rank: int) -> Run:
    """The run's folder for process `rank`: only the first process writes.

    Raises:
        RecipeError: if the folder cannot be written, or another process that is alive holds it.
    """
    return RunFolder(path) if rank == 0 else NullRun(path)


def check_writable(path: Path) -> None:
    """Create a folder if needed and prove that files can be written into it.

    Raises:
        RecipeError: if they cannot.
    """
    probe = path / f".writable.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"--output {path}: not writable ({error.strerror}); choose another folder") from error


def samples_folder(run: Path, step: int) -> Path:
    """Where the samples of a step lie."""
    return run / "samples" / f"step_{step:06d}"


def sample_folders(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all samples that were saved, by step."""
    found = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in (run / "samples").glob("step_*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it does not exist. A last line without its newline was cut off and is left out.

    Raises:
        ValueError: with the line's number, if another line is not a JSON object.
    """
    if not file.is_file():
        return []
    *lines, _cut = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{number}: not a JSON object")
        rows.append(row)
    return rows


class QuietConsole:
    """Shows nothing: for the processes other than the first."""

    def log(self, message: str) -> None:
        pass

    def metrics(self, row: Mapping[str, float]) -> None:
        pass

    def track(self, items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        return items


class RunConsole:
    """Shows a run on standard output: bars if that is a terminal, else plain lines."""

    def __init__(self, num_steps: int | None) -> None:
        self._num_steps = num_steps
        self._rich = RichConsole(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._progress: Progress | None = None

    def log(self, message: str) -> None:
        """One message; terminal sequences that a model or a file wrote are taken out, secrets are masked."""
        self._rich.print(clean(redact(message)))

    def metrics(self, row: Mapping[str, float]) -> None:
        """One compact line for an optimiser step."""
        self._rich.print(metrics_line(row, self._num_steps))

    def track(self, items: Iterable[Any], description: str, total: int) -> Generator[Any, None, None]:
        """Pass the items on, with a bar for them; tracks may be nested."""
        if not self._rich.is_terminal:
            yield from items
            return
        outermost = self._progress is None
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._rich, transient=True)
            self._progress.start()
        progress = self._progress
        task = progress.add_task(clean(description), total=total)
        try:
            for item in items:
                yield item
                progress.advance(task)
        finally:
            progress.remove_task(task)
            if outermost:
                progress.stop()
                self._progress = None


def make_console(quiet: bool = False, num_steps: int | None = None) -> "Console":
    """The console of a run of `num_steps` optimiser steps; `quiet` for every process but the first."""
    return QuietConsole() if quiet else RunConsole(num_steps)


def metrics_line(row: Mapping[str, float | None], num_steps: int | None) -> str:
    """The line of one optimiser step: `step 12/60  reward 0.412  kl 0.0031  ...  2.3 s/step`."""
    step = int(row["step"] or 0)
    parts = [f"step {step}/{num_steps}" if num_steps else f"step {step}"]
    named = {key.split("/")[1]: value for key, value in row.items() if key.startswith("rewards/")}
    shown = {"reward": row.get("reward"), **(named if len(named) > 1 else {})}
    shown |= {name: row[name] for name in ("loss", "kl", "entropy", "grad_norm") if row.get(name)}
    gap = row.get("replay_gap")
    if gap and not math.isnan(gap):  # only the first update of a rollout measures it
        shown["replay_gap"] = gap
    parts += [f"{name} {value:.3g}" for name, value in shown.items() if value is not None]
    low, high = row.get("clip_fraction/low"), row.get("clip_fraction/high")
    if low or high:
        parts.append(f"clipped {low or 0:.0%}/{high or 0:.0%}")
    seconds = row.get("time/total")
    if seconds:
        parts.append(f"{seconds:.1f} s/step")
        if num_steps and step < num_steps:
            parts.append(f"{_duration(seconds * (num_steps - step))} left")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _lock(file: Path) -> int:
    """Lock a file for this process and write who holds it; returns the descriptor that keeps it locked.

    The kernel drops the lock when its holder dies, on this machine or (NFS) another one, so a stale file never blocks a
    restarted job, and a reused pid never looks like a living run.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            message = f"--output {file.parent}: another run ({holder}) is writing here; choose another folder"
            raise RecipeError(message) from error
        # the holder before may have removed the file between our open and our lock
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            break
        os.close(descriptor)
    os.truncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _save_sample(folder: Path, name: str, row: Sample) -> dict[str, Any]:
    return {
        "prompt": prompt_text(row["prompt"]),
        "text": row["text"],
        "images": _save_images(row["images"], folder, lambda index: f"{name}_{index}.png"),
        "condition_images": _save_images(
            row["condition_images"], folder, lambda index: f"{name}_condition_{index}.png"
        ),
        "rewards": dict(row["rewards"]),
        "seed": row["seed"],
        **_save_arrays(row, folder, name),
    }


def _save_images(images: Sequence[Image.Image], folder: Path, name: Callable[[int], str]) -> list[str]:
    for index, image in enumerate(images):
        image.convert("RGBA" if "A" in image.mode else "RGB").save(folder / name(index))
    return [name(index) for index in range(len(images))]


def _save_arrays(row: Sample, folder: Path, name: str) -> dict[str, list[str]]:
    """The files of what is no picture, in a key that rows of pictures and texts do not have."""
    arrays = row.get("arrays", ())
    names = [f"{name}_{index}.npy" for index in range(len(arrays))]
    for file, array in zip(names, arrays, strict=True):
        np.save(folder / file, array, allow_pickle=False)
    return {"arrays": names} if names else {}


def _append(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(to_json(row) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and never a part."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def to_json(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value

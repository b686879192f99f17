"""Checkpoints that are either complete or not there: `checkpoints/step_000010/{policy/, trainer/, manifest.json}`,
and `ema/` beside `policy/` where a run keeps an average of its weights.

Everything is written into a staging folder; the manifest, with the size and hash of every file, comes last; then one
rename makes the checkpoint exist. A crash at any point leaves the earlier checkpoints as they were. With several
machines the run's folder must lie on a file system that they share.
"""

import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from unified_rl.engine import distributed
from unified_rl.protocols import Policy

MANIFEST = "manifest.json"
FORMAT = 2

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{6,})")


class CheckpointError(Exception):
    """A checkpoint is missing, incomplete, corrupt, or of another run. The message is one line that names the file."""


class TrainedState(Protocol):
    """What this module needs of an engine."""

    @property
    def state_bytes(self) -> int: ...
    def save(self, directory: Path) -> None: ...
    def full_weights(self) -> AbstractContextManager[None]: ...


class KeptCopies(Protocol):
    """What this module needs of the snapshots."""

    def __contains__(self, name: str) -> bool: ...
    def use(self, name: str) -> AbstractContextManager[None]: ...
    def save(self, directory: Path) -> None: ...


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    policy: Policy,
    engine: TrainedState,
    snapshots: KeptCopies,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, and keep the newest `keep` and the best one; called by every rank.

    Args:
        state: what else a resumed run needs, as JSON (the data's position, counters, generators); its "held_out", a
            number or None, is what the best one has most of.
    Returns:
        The checkpoint's folder.
    Raises:
        TypeError: if `state` is not JSON; nothing is written.
        CheckpointError: on every rank, if one could not write (its cause is chained there); nothing is left of it.
    """
    final = run_folder / "checkpoints" / f"step_{step:06d}"
    staging = final.with_name(f".staging_{final.name}")
    head = {"format": FORMAT, "step": step, "world_size": distributed.world_size(), "state": state}
    json.dumps(head)
    try:
        _on_main(lambda: _begin(staging, engine.state_bytes), staging)
        for folder, weights in (("policy", "trained"), ("ema", "ema")):
            if weights == "trained" or weights in snapshots:
                with snapshots.use(weights), engine.full_weights():
                    _on_main(functools.partial(_save_policy, policy, staging / folder), staging)
        _together(lambda: engine.save(staging / "trainer"), staging)
        _together(lambda: snapshots.save(staging / "trainer" / "snapshots"), staging)
        _on_main(lambda: _publish(staging, final, head, keep), staging)
    except CheckpointError:
        if distributed.is_main() and staging.exists():
            shutil.rmtree(staging)  # a full disk needs its space back
        raise
    return final


def _on_main(action: Callable[[], None], subject: Path) -> None:
    """Run `action` on rank 0 while the others wait; if it fails, every rank raises, and none waits for ever."""
    _together(action if distributed.is_main() else lambda: None, subject)


def _together(action: Callable[[], None], subject: Path) -> None:
    """Run `action` on every rank; if it fails on one, every rank raises."""
    error: Exception | None = None
    try:
        action()
    except Exception as raised:
        error = raised
    if distributed.broadcast_flag(error is not None):
        reason = f": {error}" if error else " by another process"
        raise CheckpointError(f"{subject}: could not be written{reason}") from error


def _begin(staging: Path, state_bytes: int) -> None:
    """An empty staging folder, no remains of those that a crash left, and room for a checkpoint.

    Args:
        state_bytes: what the engine will write at least; a run's later checkpoints need as much as the last one had.
    """
    _clean_staging(staging)
    existing = list_checkpoints(staging.parent.parent)
    needed = max([state_bytes, *(_size(path) for path in existing[-1:])])
    free = shutil.disk_usage(staging).free
    if free < needed:
        raise OSError(f"no room: {needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free")


def _size(checkpoint: Path) -> int:
    return sum(entry["size"] for entry in _read_manifest(checkpoint)["files"])


def _clean_staging(staging: Path) -> None:
    """An empty staging folder, and no remains of those that a crash left."""
    for old in staging.parent.glob(".staging_*"):
        shutil.rmtree(old)
    (staging / "trainer").mkdir(parents=True)


def _save_policy(policy: Policy, folder: Path) -> None:
    folder.mkdir()
    policy.save(folder)


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path}: a symbolic link in a checkpoint")
        if path.is_file():
            yield path


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(staging: Path, final: Path, head: dict[str, Any], keep: int) -> None:
    entries = []
    for path in _files_below(staging):
        _sync(path)
        relative = path.relative_to(staging).as_posix()
        entries.append({"path": relative, "size": path.stat().st_size, "sha256": _digest(path)})
    for folder in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        _sync(folder)
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({**head, "files": entries}, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(staging)
    if final.exists():  # written before the run went back to an earlier checkpoint
        _remove(final)
    staging.rename(final)
    _sync(final.parent)
    complete = list_checkpoints(final.parent.parent)
    best = best_checkpoint(final.parent.parent)
    for old in complete[:-keep]:
        if best is None or old != best[0]:
            _remove(old)


def best_checkpoint(run_folder: Path) -> tuple[Path, float] | None:
    """The complete checkpoint with the highest held-out number, and that number, the earliest of equals; None if none
    was evaluated."""
    rewards = {path: load_state(path).get("held_out") for path in list_checkpoints(run_folder)}
    evaluated = [(path, float(reward)) for path, reward in rewards.items() if reward is not None]
    return max(evaluated, key=lambda pair: pair[1]) if evaluated else None


def set_aside_later(run_folder: Path, step: int) -> list[str]:
    """Rename the checkpoints of steps after `step` to superseded_step_*, which nothing resumes from or deletes: a run
    that goes on from an earlier one must not find them later. Called by every rank; rank 0 does it and gets the names.
    """
    if not distributed.is_main():
        return []
    later = [path for path in _candidates(run_folder) if int(path.name.removeprefix("step_")) > step]
    for path in later:
        kept = path.with_name(f"superseded_{path.name}")
        if kept.exists():
            shutil.rmtree(kept)
        path.rename(kept)
    return [path.name for path in later]


def _remove(checkpoint: Path) -> None:
    """The manifest goes first, so that an interrupted removal leaves nothing that looks complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _candidates(run_folder: Path) -> list[Path]:
    """The folders that look like checkpoints, oldest step first."""
    found = [path for path in (run_folder / "checkpoints").glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _inside(checkpoint: Path, relative: Any) -> Path:
    """The file of a manifest entry.

    Raises:
        CheckpointError: if the entry leads out of the checkpoint, by its path or by a symbolic link.
    """
    path = PurePosixPath(relative) if isinstance(relative, str) and relative else None
    if path is None or path.is_absolute() or ".." in path.parts or "\\" in relative or "\0" in relative:
        raise CheckpointError(f"{checkpoint / MANIFEST}: refused the path {relative!r}")
    file = checkpoint
    for part in path.parts:
        file = file / part
        if file.is_symlink():
            raise CheckpointError(f"{file}: refused a symbolic link")
    return file


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint (every file there with its size; hashes are left to `verify`).

    Raises:
        CheckpointError: says what is missing or wrong.
    """
    path = checkpoint / MANIFEST
    if path.is_symlink():
        raise CheckpointError(f"{path}: refused a symbolic link")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']!r}, this version reads {FORMAT}")
        entries = [(entry["path"], entry["size"], entry["sha256"]) for entry in manifest["files"]]
        if not isinstance(manifest["state"], dict) or not isinstance(manifest["step"], int):
            raise CheckpointError(f"{path}: step or state is not readable")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not there; a checkpoint is a folder such as checkpoints/step_000010") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable ({type(error).__name__}: {error})") from error
    for relative, size, _ in entries:
        file = _inside(checkpoint, relative)
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {size}")
    return manifest


def verify(path: Path) -> None:
    """Check a checkpoint to the last byte.

    Raises:
        CheckpointError: naming the first file that is missing, refused, not what was written, or was not written at
            all but would be read with the others.
    """
    entries = _read_manifest(path)["files"]
    listed = {path / entry["path"] for entry in entries} | {path / MANIFEST}
    for file in _files_below(path):
        # A file system's own files and a note that somebody left are read by nobody.
        if file not in listed and not file.name.startswith(".") and file.suffix != ".md":
            raise CheckpointError(f"{file}: is not in the manifest")
    for entry in entries:
        file = _inside(path, entry["path"])
        if _digest(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: its content is not what was written (sha256 differs)")


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first (sizes checked, hashes not)."""
    return [path for path in _candidates(run_folder) if _problem(path, _read_manifest) is None]


def _problem(path: Path, check: Callable[[Path], object]) -> str | None:
    """Why `check` refuses a checkpoint; None if it does not."""
    try:
        check(path)
    except CheckpointError as error:
        return str(error)
    return None


def find_checkpoint(run_folder: Path, resume: str, report: Callable[[str], None] = _log.warning) -> Path | None:
    """The verified checkpoint to resume from; called by every rank, decided by rank 0.

    Args:
        resume: "auto": the newest good one; "never": none; else the path of a checkpoint's folder.
        report: called on rank 0 with one line for each newer checkpoint that "auto" skips.
    Raises:
        CheckpointError: on every rank, if a given path is no good checkpoint.
    """
    if resume == "never":
        return None
    found: Path | None = None
    error: str | None = None
    if distributed.is_main() and resume == "auto":
        for candidate in reversed(_candidates(run_folder)):
            problem = _problem(candidate, verify)
            if problem is None:
                found = candidate
                break
            report(f"skipped the checkpoint {candidate.name}: {problem}")
    elif distributed.is_main():
        found = Path(resume)
        error = _problem(found, verify)
    answer = {"path": str(found) if found else None, "error": error}
    answer = distributed.gather_objects([answer])[0]
    if answer["error"]:
        raise CheckpointError(answer["error"])
    return Path(answer["path"]) if answer["path"] else None


def load_state(path: Path) -> dict[str, Any]:
    """The `state` that `save_checkpoint` was given.

    Raises:
        CheckpointError: if the checkpoint is not complete.
    """
    return _read_manifest(path)["state"]

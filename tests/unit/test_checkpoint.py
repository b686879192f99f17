"""A checkpoint is complete or not there, and what is read is what was written."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unified_rl.engine.local import LocalEngine
from unified_rl.recipe.schema import Optimizer
from unified_rl.run_folder import checkpoint
from unified_rl.run_folder.checkpoint import CheckpointError, find_checkpoint, list_checkpoints, load_state, verify
from unified_rl.snapshots import Snapshots


class Policy:
    def __init__(self):
        self.error = None

    def save(self, directory):
        (directory / "nested").mkdir()
        (directory / "nested" / "adapter.bin").write_bytes(b"weights")
        if self.error:
            raise self.error


@pytest.fixture
def save(tmp_path):
    policy = Policy()
    engine = LocalEngine(nn.Linear(2, 2), Optimizer(), num_steps=9)

    def save(step, *, keep=9, error=None, **state):
        policy.error = error
        return checkpoint.save_checkpoint(
            tmp_path, step, policy=policy, engine=engine, snapshots=Snapshots(engine, {}), state=state, keep=keep
        )

    save.engine = engine
    return save


def names(run_folder):
    return [path.name for path in list_checkpoints(run_folder)]


def edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_layout_and_manifest(save, tmp_path):
    path = save(10, cursor=[1, 2], name="run")
    assert path == tmp_path / "checkpoints" / "step_000010"
    manifest = json.loads((path / "manifest.json").read_text())
    on_disk = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    assert {entry["path"]: entry["size"] for entry in manifest["files"]} | {
        "manifest.json": on_disk["manifest.json"]
    } == on_disk
    assert {"policy/nested/adapter.bin", "trainer/state_00000_00.safetensors"} <= set(on_disk)
    assert (manifest["step"], manifest["world_size"]) == (10, 1)
    hashes = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    # printf weights | sha256sum
    assert hashes["policy/nested/adapter.bin"] == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    verify(path)
    assert load_state(path) == {"cursor": [1, 2], "name": "run"}


def test_the_engine_comes_back(save):
    path = save(1)
    engine = LocalEngine(nn.Linear(2, 2), Optimizer(), num_steps=9)
    engine.load(path / "trainer")
    assert torch.equal(engine.module.weight, save.engine.module.weight)


def test_only_the_newest_are_kept_in_order_of_steps(save, tmp_path):
    for step in (5, 999_999, 1_000_000, 1_000_001):
        save(step, keep=3)
    assert names(tmp_path) == ["step_999999", "step_1000000", "step_1000001"]
    assert find_checkpoint(tmp_path, "auto").name == "step_1000001"


def test_auto_never_and_path(save, tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    older, newer = save(1), save(2)
    assert find_checkpoint(tmp_path, "auto") == newer
    assert find_checkpoint(tmp_path, "never") is None
    assert find_checkpoint(tmp_path, str(older)) == older
    with pytest.raises(CheckpointError, match=r"manifest\.json: not there"):
        find_checkpoint(tmp_path, str(tmp_path))


def damage_content(path):
    file = path / "policy/nested/adapter.bin"
    file.write_bytes(b"WEIGHTS")
    return file


def damage_size(path):
    file = path / "trainer/state_00000_00.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return file


def damage_missing(path):
    file = path / "trainer/engine.json"
    file.unlink()
    return file


def damage_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-20])
    return file


def damage_no_manifest(path):
    file = path / "manifest.json"
    file.unlink()
    return file


def damage_by_another_file(path):
    """Which the engine would find by its name, after the real one."""
    file = path / "trainer/state_00009_00.safetensors"
    return shutil.copy(path / "trainer/state_00000_00.safetensors", file)


DAMAGES = [damage_content, damage_size, damage_missing, damage_manifest, damage_no_manifest, damage_by_another_file]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(save, tmp_path, damage):
    older, newer = save(1), save(2)
    file = damage(newer)
    reports = []
    assert find_checkpoint(tmp_path, "auto", reports.append) == older
    assert len(reports) == 1 and "step_000002" in reports[0] and str(file) in reports[0]
    with pytest.raises(CheckpointError, match=file.name):
        verify(newer)
    with pytest.raises(CheckpointError, match=file.name):
        find_checkpoint(tmp_path, str(newer))

    if damage not in (damage_content, damage_by_another_file):  # which are seen by `verify` alone
        assert names(tmp_path) == ["step_000001"]
        with pytest.raises(CheckpointError):
            load_state(newer)


def test_a_note_in_a_checkpoint_does_no_harm(save):
    path = save(1)
    (path / "policy" / "README.md").write_text("the good one")
    (path / ".nfs0001").write_text("")
    verify(path)


@pytest.mark.parametrize(
    "entry", ["/etc/hostname", "../outside", "policy/../../outside", "", 3, None, "policy\\..\\x", "a\0b"]
)
def test_a_manifest_cannot_lead_outside(save, tmp_path, entry):
    path = save(1)
    outside = tmp_path / "checkpoints" / "outside"
    outside.write_bytes(b"x")
    edit_manifest(path, files=[{"path": entry, "size": 1, "sha256": "0"}])
    with pytest.raises(CheckpointError, match="refused the path"):
        verify(path)
    assert names(tmp_path) == []


def test_symbolic_links_are_refused(save, tmp_path):
    path = save(1)
    file = path / "policy/nested/adapter.bin"
    (tmp_path / "same").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "same")
    with pytest.raises(CheckpointError, match=r"adapter\.bin: refused a symbolic link"):
        verify(path)
    path = save(2)
    shutil.move(path / "policy", tmp_path / "policy")
    (path / "policy").symlink_to(tmp_path / "policy")
    with pytest.raises(CheckpointError, match="policy: refused a symbolic link"):
        verify(path)


@pytest.mark.parametrize("changes", [{"format": 1}, {"files": None}, {"files": [{}]}, {"state": []}, {"step": "1"}])
def test_an_unreadable_manifest_is_an_error_not_a_crash(save, tmp_path, changes):
    path = save(1)
    edit_manifest(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_state(path)
    assert names(tmp_path) == []


def test_a_failed_save_leaves_the_older_ones_and_the_next_one_cleans_up(save, tmp_path):
    save(1)
    with pytest.raises(CheckpointError, match="could not be written: disk full"):
        save(2, error=OSError("disk full"))
    assert names(tmp_path) == ["step_000001"]
    assert find_checkpoint(tmp_path, "auto").name == "step_000001"
    save(3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000003"]


def test_the_manifest_is_written_last(save, tmp_path, monkeypatch):
    """Killed between any two of its writes, a save leaves no checkpoint; here: before the final rename."""

    def killed(staging, final):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(1)
    assert names(tmp_path) == [] and find_checkpoint(tmp_path, "auto") is None


def test_a_step_can_be_written_again(save, tmp_path):
    save(4, attempt=1)
    assert load_state(save(4, attempt=2)) == {"attempt": 2}
    assert names(tmp_path) == ["step_000004"]


def test_an_interrupted_removal_leaves_nothing_that_looks_complete(save, tmp_path, monkeypatch):
    save(1)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(2, keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_state_must_be_json(save, tmp_path):
    with pytest.raises(TypeError):
        save(1, tensor=torch.zeros(1))
    assert not (tmp_path / "checkpoints").exists()


def test_the_best_by_the_held_out_reward_is_kept_beside_the_newest(save, tmp_path):
    for step, held_out in ((1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, 0.9)):
        save(step, keep=1, held_out=held_out)
    assert names(tmp_path) == ["step_000002", "step_000005"], "of equals the earliest"
    save(6, keep=1, held_out=0.95)
    assert names(tmp_path) == ["step_000006"]


def test_nothing_is_begun_without_room(save, tmp_path, monkeypatch):
    save(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="no room: 0 MiB are needed"):
        save(2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_later_checkpoints_are_set_aside_and_never_resumed_from(save, tmp_path):
    for step in (1, 2, 3):
        save(step)
    assert checkpoint.set_aside_later(tmp_path, 1) == ["step_000002", "step_000003"]
    save(2)
    save(3)
    assert checkpoint.set_aside_later(tmp_path, 2) == ["step_000003"], "once more, over the older one"
    assert names(tmp_path) == ["step_000001", "step_000002"]
    assert (tmp_path / "checkpoints/superseded_step_000003/manifest.json").is_file()


def test_killed_at_any_point_of_a_save(save, tmp_path, monkeypatch):
    """Before each file or folder is forced to the disk, and before the rename."""
    save(1)
    for point in range(1, 40):
        child = os.fork()
        if child == 0:
            countdown = itertools.count(1)

            def die(*_, countdown=countdown, point=point):
                if next(countdown) == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(checkpoint, "_sync", die)
            save(2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = find_checkpoint(tmp_path, "auto")
        assert found is not None and found.name in ("step_000001", "step_000002")
        verify(found)
        assert names(tmp_path)[0] == "step_000001"
    assert point > 6, "there were points to be killed at"
    assert find_checkpoint(tmp_path, "auto").name == "step_000002"


def test_a_full_disk_in_the_middle_of_a_save(save, tmp_path):
    """By a limit: no file may grow beyond 64 bytes."""
    save(1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    verify(save(2))


ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from torch import nn
from unified_rl.engine.local import LocalEngine
from unified_rl.recipe.schema import Optimizer
from unified_rl.run_folder import checkpoint
from unified_rl.snapshots import Snapshots

class Policy:
    size = 200_000
    def save(self, directory):
        (directory / "weights.bin").write_bytes(bytes(self.size))

run = Path(sys.argv[1])
engine = LocalEngine(nn.Linear(2, 2), Optimizer(), num_steps=9)
policy = Policy()
def save(step):
    parts = {"policy": policy, "engine": engine, "snapshots": Snapshots(engine, {}), "state": {"step": step}}
    return checkpoint.save_checkpoint(run, step, **parts, keep=9)
save(1)
policy.size = 2_000_000  # more than was estimated
try:
    save(2)
    sys.exit("it had room")
except checkpoint.CheckpointError as error:
    print(error)
assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
checkpoint.verify(run / "checkpoints/step_000001")
policy.size = 200_000
checkpoint.verify(save(3))
"""


def test_a_full_disk(tmp_path):
    """A file system of 1 MB in a mount namespace of its own."""
    mounted = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    inside = ["unshare", "-Urm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mounted], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system in a namespace")
    command = f'{mounted} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run([*inside, command, sys.executable, ON_A_SMALL_DISK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be written: [Errno 28] No space left on device" in done.stdout

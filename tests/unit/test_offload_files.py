"""Offloaded states in files: the same numbers, out of this process's own memory, and nothing left behind."""

import ctypes
import gc
import json
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests import forks
from unified_rl.engine import build_engine
from unified_rl.engine.files import Files, check_folder
from unified_rl.errors import RecipeError
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.schema import EngineBlock, Optimizer

# Large beside what an allocator keeps or not: some 12 MB have been seen.
WIDTH, LAYERS = 1536, 4
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Model(nn.Module):
    """Trained layers behind frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).requires_grad_(False)
        self.trained = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(self.frozen(x))


def own_bytes() -> int:
    """Memory of this process that no file stands behind, what it has freed left out."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    # What a loaded machine has moved to its swap belongs to the process too.
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "VmSwap")))


def train(folder: str | None, keys: dict, told: str) -> None:
    """Two steps and one more after a resume; what came out is written to the file `told`."""
    before = own_bytes()
    block = EngineBlock(backend="deepspeed", offload_folder=folder, **keys)
    recipe = SimpleNamespace(engine=block, optimizer=Optimizer(lr=1e-2))
    engine = build_engine(Model(), recipe, num_steps=3)

    def step() -> float:
        with engine.window():
            engine.backward(engine.module(torch.ones(2, WIDTH)).pow(2).mean())
        return engine.step()

    norms = [step(), step()]
    grown = own_bytes() - before
    state = Path(told).with_suffix("")
    engine.save(state)
    norms.append(step())
    last = {name: value.clone() for name, value in engine.shards().items()}
    engine.load(state)
    assert step() == norms[2]
    equal = all(torch.equal(value, last[name]) for name, value in engine.shards().items())
    left = [path.name for path in Path(folder).iterdir()] if folder else []
    sums = [float(value.double().sum()) for value in last.values()]
    Path(told).write_text(json.dumps({"norms": norms, "grown": grown, "equal": equal, "left": left, "sums": sums}))


@pytest.mark.parametrize(
    ("keys", "freed"),
    [
        # Float32 weights, moments and their gradients.
        ({"zero_stage": 2, "offload": "optimizer"}, 4 * 4),
        # And both halves' own weights.
        ({"zero_stage": 3, "offload": "all", "deepspeed": SHARDED}, 6 * 4),
    ],
)
def test_memory_shrinks_and_numbers_stay(keys: dict, freed: int, tmp_path: Path):
    found = []
    for name, folder in (("memory", None), ("files", tmp_path / "disk")):
        if folder:
            folder.mkdir()
        told = tmp_path / f"{name}.json"
        end = forks.Fork(train, folder and str(folder), keys, str(told), environment={}, log=tmp_path / name).wait()
        assert end.returncode == 0, end.stderr[-3000:]
        found.append(json.loads(told.read_text()))
    in_memory, in_files = found
    assert in_files["norms"] == in_memory["norms"] and in_files["sums"] == in_memory["sums"]
    assert in_files["equal"] and in_memory["equal"] and in_files["left"] == []
    num_trained = LAYERS * WIDTH * (WIDTH + 1)
    assert in_memory["grown"] - in_files["grown"] > 0.9 * freed * num_trained


def test_tensors_in_a_file_are_like_those_in_memory(tmp_path: Path):
    files = Files(str(tmp_path))
    given = [torch.arange(5.0), torch.tensor(3, dtype=torch.int64), torch.zeros(0, 2), torch.ones(2, 3).bfloat16()]
    made = files.copies(given)
    made[0].mul_(2)
    files.release()
    for tensor, source in zip(made, [given[0] * 2, *given[1:]], strict=True):
        assert tensor.dtype == source.dtype and torch.equal(tensor, source)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_told_at_the_start(tmp_path: Path):
    """By a limit on the size of files: written later, a full disk would end the process by a signal."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    try:
        with pytest.raises(RecipeError, match=r"engine\.offload_folder: .*: File too large; 4 MiB are needed there"):
            Files(str(tmp_path)).zeros_like([torch.empty(2**20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


def test_wrong_folders_are_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"engine\.offload_folder: .*nowhere: no file can be made there"):
        check_folder(str(tmp_path / "nowhere"))
    policy = {"model": "toy", "family": "causal_lm"}
    parse = {"policy": policy, "data": {"prompts": "toy:prompts"}, "rewards": [{"name": "toy:reward"}]}
    with pytest.raises(RecipeError, match=r"engine\.offload_folder: nothing is offloaded"):
        parse_recipe({**parse, "engine": {"offload_folder": str(tmp_path)}}, tmp_path)

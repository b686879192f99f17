"""The bar of ZeRO-3: what each of four processes holds of weights, float32 copies and moments, against ZeRO-0."""

import json
from pathlib import Path

import pytest

from benchmarks import zero_memory
from tests import forks
from unified_rl.engine import distributed
from unified_rl.planning.planner import need


def measure(folder: str) -> None:
    distributed.initialise(300)
    found = {stage: zero_memory.held(stage, "none") for stage in (0, 3)}
    (Path(folder) / f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.shutdown()


def test_four_processes_hold_a_third_under_zero_3(tmp_path: Path):
    """ZeRO-0 holds weights and two moments; ZeRO-3 a quarter of those and of a float32 copy: 4 / (4 x 3) of it. So
    says the planner."""
    ends = forks.run_together(4, measure, str(tmp_path), log=tmp_path / "log")
    assert not any(end.returncode for end in ends), ends[0].stderr[-3000:]
    for rank in range(4):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        whole = 3 * 4 * zero_memory.LAYERS * zero_memory.WIDTH * (zero_memory.WIDTH + 1)
        assert whole <= found["0"] <= 1.01 * whole
        assert 0.3 <= found["3"] / found["0"] <= 0.35
        for stage in (0, 3):
            planned = need(zero_memory.MODEL, stage, num_gpus=4, num_windows=1)
            assert found[str(stage)] == pytest.approx(planned.weights + planned.optimizer, rel=0.01)

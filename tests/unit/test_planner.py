"""The plan of a run on several GPUs, by hand; benchmarks/zero_memory.py compares it with what processes hold."""

import pytest

from unified_rl.cli import main
from unified_rl.planning.planner import GIB, Model, need, table

MODEL = Model(trained=100, module=300, beside=1000, frozen_bytes=2, trained_bytes=4)
"""An adapter of 100 parameters on a frozen bfloat16 module of 200, beside encoders of 1000."""


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "traffic"),
    [
        # Weights: 2 x 1000 beside, 4 x 100 + 2 x 200 of the module. Traffic: times 3/4, for 2 windows.
        (0, 2800, 400, 800, 0.75 * 800),
        (1, 2800, 400, 1200 / 4, 0.75 * (800 + 400)),
        (2, 2800, 100, 1200 / 4, 0.75 * (800 * 2 + 400)),
        (3, 2000 + 200, 100, 1200 / 4, 0.75 * (400 + 1600) * 2),
    ],
)
def test_by_hand(stage, weights, gradients, optimizer, traffic):
    found = need(MODEL, stage, 4, 2)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert found.traffic == traffic and found.total == weights + gradients + optimizer


def test_the_smallest_stage_that_fits_is_named():
    model = Model(trained=GIB, module=GIB, beside=0, frozen_bytes=2, trained_bytes=2)
    # Stage 0: 2 + 4 + 8 = 14; stage 1: 2 + 4 + 3; stage 2: 2 + 1 + 3; stage 3: 0.5 + 1 + 3 GiB.
    for memory, advice in ((18, "engine.zero_stage: 0"), (12, "engine.zero_stage: 1"), (6, "engine.zero_stage: 3")):
        assert advice in table(model, num_gpus=4, gpu_memory=memory, num_windows=1)
    assert "none fits" in table(model, num_gpus=4, gpu_memory=5, num_windows=1)


def test_validate_prints_it(capsys):
    assert main(["validate", "quickstart_vlm", "--gpus", "8", "--gpu-memory", "1"]) == 0
    assert "plan for 8 GPUs of 1 GiB" in capsys.readouterr().out

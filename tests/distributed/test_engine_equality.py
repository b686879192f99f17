"""Real processes under DeepSpeed train exactly what one process trains: ZeRO 0 to 3, any split into windows."""

import math
from pathlib import Path

import engine_worker as worker
import pytest
import torch

from tests import forks
from unified_rl.engine import build_engine
from unified_rl.planning.planner import Model, need
from unified_rl.run_folder.checkpoint import find_checkpoint, load_state, verify

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(folder):
    """What `engine_worker.py` found in two processes (one launch for all tests)."""
    out = folder / "results.pt"
    module = worker.Net(0)
    engine = build_engine(module, worker.recipe("local", "0"), num_steps=worker.NUM_STEPS)
    steps = worker.train(module, engine, worker.SPLITS["mixed"], range(worker.NUM_RANKS))
    next(steps), next(steps)
    engine.save(folder / "states" / "one process")
    return launch(out, 2, folder / "states")


def launch(out: Path, num_ranks: int, states: Path) -> dict:
    log = out.with_name("log")
    ends = forks.run_together(num_ranks, worker.main, out, num_ranks, states, log=log, timeout=900)
    assert not any(end.returncode for end in ends), ends[0].stderr[-6000:]
    return torch.load(out)


def local(split, **options):
    """The same windows in one process."""
    module = worker.Net(0)
    engine = build_engine(module, worker.recipe("local", "0"), num_steps=worker.NUM_STEPS)
    norms = list(worker.train(module, engine, split, range(worker.NUM_RANKS), **options))
    return worker.weights(module, engine), norms


def assert_equal_weights(found, expected):
    for name, weight in expected.items():
        assert torch.linalg.norm(found[name] - weight) <= TOLERANCE * torch.linalg.norm(weight), name


def test_the_comparison_is_sensitive_to_the_scale_of_gradients():
    weights, norms = local(worker.SPLITS["one"])
    module = worker.Net(0)
    engine = build_engine(module, worker.recipe("local", "0"), num_steps=worker.NUM_STEPS)
    add = engine.backward
    engine.backward = lambda loss: add(loss * 0.5)
    halved = list(worker.train(module, engine, worker.SPLITS["one"], range(worker.NUM_RANKS)))
    assert max(norms) > worker.NORM_LIMIT > min(norms)
    assert halved[0] == pytest.approx(norms[0] / 2)
    with pytest.raises(AssertionError):
        assert_equal_weights(worker.weights(module, engine), weights)


@pytest.mark.parametrize("split", worker.SPLITS)
@pytest.mark.parametrize("stage", worker.STAGES)
def test_parameters_and_norms_equal_one_process(results, stage, split):
    weights, norms = local(worker.SPLITS[split])
    found = results["settings"][stage, split]
    assert found["norms"] == pytest.approx(norms, rel=TOLERANCE)
    assert_equal_weights(found["weights"], weights)


@pytest.mark.parametrize("stage", worker.STAGES)
def test_the_number_of_windows_does_not_matter(results, stage):
    weights, norms = local(worker.SPLITS["one"], skipping="none")
    found = results["settings"][stage, "resplit"]
    assert found["norms"] == pytest.approx(norms, rel=TOLERANCE)
    assert_equal_weights(found["weights"], weights)


@pytest.mark.parametrize("stage", worker.UNEVEN_STAGES)
def test_ranks_may_use_different_parameters(results, stage):
    weights, norms = local(worker.SPLITS["mixed"], skipping="last rank")
    found = results["settings"][stage, "uneven"]
    assert found["norms"] == pytest.approx(norms, rel=TOLERANCE)
    assert_equal_weights(found["weights"], weights)


@pytest.mark.parametrize("stage", worker.STAGES)
def test_a_bad_gradient_on_one_rank_skips_the_update_on_both(results, stage):
    weights, norms = local(worker.SPLITS["mixed"], bad_step=1)
    found = results["settings"][stage, "bad"]
    assert not math.isfinite(norms[1])
    for of_rank in found["norms"]:
        assert [math.isfinite(float(norm)) for norm in of_rank] == [True, False, True, True, True]
        assert float(of_rank[2]) == pytest.approx(norms[2], rel=TOLERANCE)
    assert_equal_weights(found["weights"], weights)
    assert found["lr"] == 0.0


@pytest.mark.parametrize("stage", worker.STAGES)
def test_a_loaded_engine_continues_identically(results, stage):
    found = results["settings"][stage, "resumed"]
    assert found["norms"][0] == found["norms"][1]
    assert found["lr"] == pytest.approx(1e-2)
    for name, weight in found["straight"].items():
        assert torch.equal(weight, found["again"][name]), name


@pytest.mark.parametrize("stage", worker.STAGES)
def test_other_stages_and_another_number_of_processes_go_on_from_a_state(results, folder, stage):
    expected, _ = local(worker.SPLITS["mixed"])
    crossed = results["settings"][stage, "crossed"]
    assert "one process" in crossed and len(crossed) == 1 + worker.STAGES.index(stage)
    for found in crossed.values():
        assert_equal_weights(found, expected)
    module = worker.Net(1)
    module.frozen.load_state_dict(worker.Net(0).frozen.state_dict())
    engine = build_engine(module, worker.recipe("local", "0"), num_steps=worker.NUM_STEPS)
    engine.load(folder / "states" / stage)
    list(worker.train(module, engine, worker.SPLITS["mixed"], range(worker.NUM_RANKS), start=2))
    assert_equal_weights(worker.weights(module, engine), expected)


@pytest.mark.parametrize("stage", worker.VARIANTS)
def test_low_precision_trains_float32_copies(results, stage):
    """And resumes from them bit for bit, or goes on from another stage's of another precision."""
    expected, _ = local(worker.SPLITS["mixed"])
    start = {name: weight.detach() for name, weight in worker.Net(0).named_parameters()}
    found = results["settings"][stage, "mixed"]["weights"]
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in expected])
    error = torch.cat([(found[name].float().view_as(start[name]) - expected[name]).flatten() for name in expected])
    assert error.norm() < 0.1 * moved.norm()
    resumed = results["settings"][stage, "resumed"]
    assert resumed["norms"][0] == resumed["norms"][1]
    for name, weight in resumed["straight"].items():
        assert torch.equal(weight, resumed["again"][name]), name
    crossed = results["settings"][stage, "crossed"]
    assert len(crossed) == (stage != worker.VARIANTS[0])
    for found in crossed.values():
        error = torch.cat([(found[name].float().view_as(start[name]) - expected[name]).flatten() for name in expected])
        assert error.norm() < 0.1 * moved.norm()


@pytest.mark.parametrize("stage", worker.OFFLOADED)
def test_states_in_main_memory_train_and_resume_the_same(results, stage):
    """Some steps leave parameters out, whose last gradients DeepSpeed would use again; a bad step is skipped."""
    expected, norms = local(worker.SPLITS["mixed"])
    resumed = results["settings"][stage, "resumed"]
    assert_equal_weights(resumed["straight"], expected)
    assert resumed["norms"][0] == resumed["norms"][1] == pytest.approx(norms[2:], rel=TOLERANCE)
    for name, weight in resumed["straight"].items():
        assert torch.equal(weight, resumed["again"][name]), name
    if stage.endswith("offload"):
        assert_equal_weights(results["settings"][stage, "crossed"]["0"], expected)
    weights, norms = local(worker.SPLITS["mixed"], bad_step=1)
    bad = results["settings"][stage, "bad"]
    assert [math.isfinite(norm) for norm in bad["norms"]] == [True, False, True, True, True]
    assert bad["norms"][2:] == pytest.approx(norms[2:], rel=TOLERANCE)
    assert_equal_weights(bad["weights"], weights)


def test_the_trap_of_stage_3_is_still_there(results):
    """Called directly, without what `window` does, a module's earlier gradients of a step are lost without a word. If
    this fails, DeepSpeed has changed, and `DeepSpeedEngine.window` may not be needed any more."""
    _, norms = local(worker.SPLITS["three"])
    assert results["settings"]["3-sharded", "three"]["norms"] == pytest.approx(norms, rel=TOLERANCE)
    assert results["settings"]["3-sharded", "trap"]["norms"][0] != pytest.approx(norms[0], rel=0.01)


def test_four_processes_train_the_same(results, folder, tmp_path, monkeypatch):
    """And go on from what two processes of other stages wrote after two steps."""
    found = launch(tmp_path / "results.pt", 4, folder / "states")["settings"]
    monkeypatch.setattr(worker, "NUM_RANKS", 4)
    weights, norms = local(worker.SPLITS["mixed"])
    for stage in worker.STAGES:
        assert found[stage, "mixed"]["norms"] == pytest.approx(norms, rel=TOLERANCE), stage
        assert_equal_weights(found[stage, "mixed"]["weights"], weights)
        assert_equal_weights(found[stage, "mixed"]["crossed"], weights)


def test_comm_bytes_follow_the_formula(results):
    size = sum(p.numel() * 4 for p in worker.Net(0).parameters() if p.requires_grad)
    sent = {stage: results["settings"][stage, "three"]["bytes"] for stage in worker.STAGES}
    share = {stage: sum(counts.values()) / (size / 2) for stage, counts in sent.items()}
    # Five steps of three windows, two ranks.
    assert share["0"] == 5 * 2
    assert share["1"] == 5 * 3
    assert share["2"] == 5 * (3 * 2 + 1)
    every = sum(p.numel() * 4 for p in worker.Net(0).parameters()) / size
    assert share["3"] == pytest.approx(15 + 5 * every)
    assert share["3-sharded"] == pytest.approx(15 + 15 * 2 * every)
    parts = {stage: [count / (size / 2) for count in counts.values()] for stage, counts in sent.items()}
    assert list(sent["0"]) == ["all_reduce", "reduce_scatter", "all_gather"]
    assert parts["0"] == [10, 0, 0] and parts["1"] == [10, 0, 5] and parts["2"] == [30, 0, 5]
    assert parts["3-sharded"] == pytest.approx([0, 15, 30 * every])


@pytest.mark.parametrize("stage", worker.STAGES)
def test_the_formula_is_what_the_collectives_are_given(results, stage):
    """Counted where DeepSpeed calls torch, in steps that use all parameters; norms, flags and paddings come on top."""
    measured, told = (results["settings"][stage, "resplit"][key] for key in ("measured", "told"))
    model = Model(trained=654, module=727, beside=0, frozen_bytes=4, trained_bytes=4)
    planned = need(model, int(stage[0]), num_gpus=2, num_windows=3).traffic
    # In its first step DeepSpeed gathers one parameter after the other, until it knows their order.
    for found, formula in zip(measured[1:], told[1:], strict=True):
        if stage == "3-sharded":
            # An upper bound: what one window gathered for its forward is still there for its backward.
            assert 0.45 * formula["all_gather"] <= found["all_gather"] <= formula["all_gather"]
            assert sum(formula.values()) == pytest.approx(planned, rel=0.01)
            found, formula = ({**counts, "all_gather": 0} for counts in (found, formula))
        elif stage != "3":
            assert sum(formula.values()) == planned
        assert found == pytest.approx(formula, rel=0.02, abs=100)


def test_helpers(results):
    found = results["helpers"]
    assert found["bool"].tolist() == [True, True, False, True]
    assert found["bfloat16"].dtype == torch.bfloat16 and found["bfloat16"].shape == (2, 2, 2)
    assert found["bfloat16"][:, 0, 0].tolist() == [0.5, 1.5]
    assert found["int64"].tolist() == [[0, 2**60], [1, 2**60 + 1]]
    assert found["empty"].shape == (0, 3)
    assert found["uneven refused"] == [True, True]
    assert found["objects"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}, {"rank": 1, "text": "ü"}]
    assert found["slowest"] == {"slowest/update": 2 / 1.5, "slowest/update_process": 1}
    assert found["sum"] == [3.0, 2.0**41 + 1]
    assert found["max"] == [0.0, 1.0]
    assert found["flags"] == [True, False]


def test_checkpoints_of_two_processes(results, folder):
    run = folder / "run"
    found = results["checkpoints"]
    for good, bad in found["errors"]:
        assert good == "" and "could not be written" in bad
    newest = find_checkpoint(run, "auto")
    assert newest is not None and newest.name == "step_000001"
    assert found["found"] == [str(newest)] * 2
    verify(newest)
    assert load_state(newest) == {"step": 1}


@pytest.mark.parametrize("stage", worker.STAGES)
def test_snapshots_follow_and_switch_under_sharding(results, stage):
    module = worker.Net(0)
    engine = build_engine(module, worker.recipe("local", "0"), num_steps=worker.NUM_STEPS)
    average, outputs = worker.weights(module, engine), []
    start = average
    for _ in worker.train(module, engine, worker.SPLITS["mixed"], range(worker.NUM_RANKS)):
        now = worker.weights(module, engine)
        average = {name: 0.75 * average[name] + 0.25 * now[name] for name in now}
        state = dict(module.state_dict())
        acting = worker.Net(0)
        acting.load_state_dict({**state, **average})
        with torch.no_grad():
            outputs.append(acting(torch.ones(2, 8), True))
    found = results["settings"][stage, "snapshots"]
    assert_equal_weights(found["ema"], average)
    for name, weight in start.items():
        assert torch.equal(found["start"][name].view_as(weight), weight)
        assert torch.equal(found["restored"][name], found["ema"][name])
        assert torch.equal(found["trained"][name], results["settings"][stage, "mixed"]["weights"][name])
    torch.testing.assert_close(torch.stack(found["outputs"]), torch.stack(outputs), rtol=1e-5, atol=1e-6)
    whole = sum(weight.numel() for weight in average.values())
    assert found["bytes"] <= (whole / 2 + 2 * len(average) if stage.startswith("3") else whole), "shards only"

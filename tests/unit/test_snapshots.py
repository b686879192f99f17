"""Copies of the trained weights: their rules by hand, switching bit for bit, and resuming exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.toys import Bandit, again, build_parts
from unified_rl.engine.local import LocalEngine
from unified_rl.errors import RecipeError
from unified_rl.recipe.schema import Optimizer
from unified_rl.recipe.snapshot import Ema, Snapshot
from unified_rl.run_folder.checkpoint import CheckpointError
from unified_rl.snapshots import Snapshots, decay_at
from unified_rl.train import Position, StopSignal, run_loop, start

BEGIN = Position(step=0, rollout=0)


def line(*weights: float) -> tuple[nn.Linear, LocalEngine]:
    module = nn.Linear(len(weights), 1)
    module.weight.data = torch.tensor([weights])
    module.bias.requires_grad_(False)
    return module, LocalEngine(module, Optimizer(), num_steps=9)


def test_decays_by_hand():
    def decays(rule: Snapshot, ticks: list[int]) -> list[float]:
        return [decay_at(tick, rule) for tick in ticks]

    assert decays(Snapshot(decay=0.9), [0, 7]) == [0.9, 0.9]
    assert decays(Ema(decay=0.5), [0, 1, 8, 99]) == [0.1, 2 / 11, 0.5, 0.5]
    # DiffusionNFT's two schedules: min(0.001 k, 0.5), and 0 until 75, then min(0.0075 (k - 75), 0.999)
    first = Snapshot(decay=0.5, warmup="linear", slope=0.001)
    assert decays(first, [0, 100, 500, 900]) == pytest.approx([0.0, 0.1, 0.5, 0.5])
    second = Snapshot(decay=0.999, warmup="linear", slope=0.0075, delay=75)
    assert decays(second, [0, 75, 76, 175, 1000]) == pytest.approx([0.0, 0.0, 0.0075, 0.75, 0.999])


def test_an_average_by_hand():
    module, engine = line(1.0, 2.0)
    copies = Snapshots(
        engine,
        {
            "ema": Snapshot(decay=0.75),
            "third": Snapshot(decay=0.0, every=3),
            "rollout": Snapshot(decay=0.0, clock="rollout"),
            "start": Snapshot(decay=1.0),
        },
    )
    for value in (5.0, 9.0):
        module.weight.data.fill_(value)
        copies.tick("step")
    # ema: 1 -> 0.75 + 1.25 = 2 -> 1.5 + 2.25 = 3.75; 2 -> 2.75 -> 4.3125
    expected = {"ema": [3.75, 4.3125], "third": [1.0, 2.0], "rollout": [1.0, 2.0], "start": [1.0, 2.0]}
    for name, weights in expected.items():
        with copies.use(name):
            assert module.weight.tolist() == [weights], name
    module.weight.data.fill_(7.0)
    copies.tick("step")
    copies.tick("rollout")
    for name in ("third", "rollout"):
        with copies.use(name):
            assert module.weight.tolist() == [[7.0, 7.0]]


def test_switching_back_is_exact_also_after_an_error():
    module, engine = line(*torch.randn(64).tolist())
    copies = Snapshots(engine, {"ema": Ema()})
    module.weight.data.mul_(1.0 / 3.0)
    copies.tick("step")
    before, pointer = module.weight.detach().clone(), module.weight.data_ptr()
    with copies.use("ema"):
        inside = module.weight.detach().clone()
    assert not torch.equal(inside, before)
    with pytest.raises(ZeroDivisionError), copies.use("ema"):
        1 / 0
    assert torch.equal(module.weight, before) and module.weight.data_ptr() == pointer
    with copies.use("ema"):
        assert torch.equal(module.weight, inside)
    with copies.use("trained"):
        assert torch.equal(module.weight, before)
    with pytest.raises(KeyError), copies.use("old"):
        pass
    with copies.use("ema"), pytest.raises(AssertionError, match="away"):
        copies.tick("step")


def test_a_graph_survives_a_switch_between_forward_and_backward():
    module, engine = line(1.0, 2.0)
    copies = Snapshots(engine, {"ema": Ema()})
    module.weight.data.fill_(3.0)
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    output = module(x).square().sum()
    with copies.use("ema"), torch.no_grad():
        module(x)
    output.backward()
    assert x.grad is not None and x.grad.tolist() == [pytest.approx([2 * (9.0 + float(module.bias)) * 3.0] * 2)]


def test_what_was_saved_comes_back(tmp_path: Path):
    module, engine = line(1.0, 2.0)
    rules = {"ema": Ema(), "start": Snapshot(decay=1.0)}
    copies = Snapshots(engine, rules)
    for value in (3.0, 4.0):
        module.weight.data.fill_(value)
        copies.tick("step")
    copies.save(tmp_path / "snapshots")
    resumed = Snapshots(engine, {**rules, "new": Snapshot()})
    resumed.load(tmp_path / "snapshots")
    for kept in (copies, resumed):
        kept.tick("step")
    for name in rules:
        weights = []
        for kept in (copies, resumed):
            with kept.use(name):
                weights.append(module.weight.detach().clone())
        assert torch.equal(*weights), name
    with resumed.use("new"):
        assert module.weight.tolist() == [[4.0, 4.0]], "what the checkpoint lacks starts from the restored weights"
    other = Snapshots(line(1.0, 2.0, 3.0)[1], rules)
    with pytest.raises(CheckpointError, match="other trained parameters"):
        other.load(tmp_path / "snapshots")


class Part:
    """What ZeRO-3 leaves one process of a weight [2, 5]: its share of the padded vector, or all of it as it is."""

    def __init__(self, weight: torch.Tensor, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.is_sharded = rank, world_size, world_size > 1
        size = -(-weight.numel() // world_size)
        padded = nn.functional.pad(weight.flatten(), (0, size * world_size - weight.numel()))
        self._shard = padded[size * rank : size * (rank + 1)].clone() if self.is_sharded else weight.clone()

    def shards(self) -> dict[str, torch.Tensor]:
        return {"weight": self._shard}

    def shards_changed(self) -> None:
        pass


@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1), (4, 3), (3, 4)])
def test_other_processes_go_on_with_the_copies(before: int, now: int, tmp_path: Path):
    weight, rules = torch.arange(1.0, 11.0).view(2, 5), {"start": Snapshot(decay=1.0)}
    for rank in range(before):
        Snapshots(Part(weight, rank, before), rules).save(tmp_path)
    for rank in range(now):
        engine = Part(torch.zeros(2, 5), rank, now)
        copies = Snapshots(engine, rules)
        copies.load(tmp_path)
        with copies.use("start"):
            assert torch.equal(engine.shards()["weight"], Part(weight, rank, now).shards()["weight"])
    with pytest.raises(CheckpointError, match="other trained parameters than now, for instance start/weight"):
        Snapshots(Part(torch.zeros(2, 9), 0, now), rules).load(tmp_path)
    (tmp_path / f"rank_{before - 1:05d}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no whole set of snapshots"):
        Snapshots(Part(weight, 0, now), rules).load(tmp_path)


KEYS: dict[str, Any] = {
    "ema": {"decay": 0.8},
    "snapshots": {"old": {"decay": 0.5, "clock": "rollout"}},
    "rollout_weights": "old",
    "epochs": 2,
    "num_steps": 12,
    "checkpoint": {"every": 1, "keep": 99},
}


def test_a_run_that_samples_from_a_copy_resumes_exactly(tmp_path: Path):
    whole = Bandit([0.2, 0.0, -0.1])
    parts = build_parts(tmp_path, whole, **KEYS)
    run_loop(parts, BEGIN, StopSignal())
    folder = parts.run.path / "checkpoints" / "step_000006"
    fresh = Bandit([0.2, 0.0, -0.1])
    resumed = again(parts, tmp_path, fresh)
    run_loop(resumed, start(resumed, str(folder)), StopSignal())
    assert torch.equal(fresh.module.weight, whole.module.weight)
    for name in ("ema", "old"):
        with parts.snapshots.use(name), resumed.snapshots.use(name):
            assert torch.equal(fresh.module.weight, whole.module.weight)
            if name == "ema":
                average = whole.module.weight.detach().clone()
    whole.restore(parts.run.path / "checkpoints" / "step_000012" / "ema")
    assert torch.equal(whole.module.weight, average), "a checkpoint's ema/ is what the policy saves under it"


def test_rollouts_and_their_replay_are_those_of_the_copy(tmp_path: Path):
    policy = Bandit([0.2, 0.0, -0.1])
    parts = build_parts(tmp_path, policy, **{**KEYS, "snapshots": {"old": {"decay": 1.0}}, "optimizer": {"lr": 0.3}})
    sampled: list[torch.Tensor] = []
    draw = policy.sample

    def seen(*args: Any, **kwargs: Any) -> Any:
        sampled.append(policy.module.weight.detach().clone())
        return draw(*args, **kwargs)

    policy.sample = seen
    run_loop(parts, BEGIN, StopSignal())  # would stop if the gap were measured with the trained weights
    assert all(torch.equal(weights, torch.tensor([0.2, 0.0, -0.1])) for weights in sampled)
    assert (policy.module.weight - sampled[0]).abs().max() > 0.1


def test_a_biased_sampler_is_caught_behind_a_copy(tmp_path: Path):
    parts = build_parts(tmp_path, Bandit([0.2, 0.0], sampler_bias=0.01), **KEYS)
    with pytest.raises(RecipeError, match="max_replay_gap"):
        run_loop(parts, BEGIN, StopSignal())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ema": {"decai": 0.9}}, "ema.decai: unknown key; did you mean 'decay'?"),
        ({"snapshots": {"old": {"evry": 2}}}, "snapshots.old.evry: unknown key; did you mean 'every'?"),
        ({"snapshots": {"ema": {}}}, "snapshots.ema: the name is taken"),
        (
            {"snapshots": {"old": {}}, "rollout_weights": "odl"},
            "rollout_weights: no snapshot 'odl'; did you mean 'old'?",
        ),
        ({"evaluation": {"weights": "ema"}}, "evaluation.weights: ema needs the block ema"),
        ({"ema": {"decay": 1.5}}, "ema.decay: "),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, keys: dict[str, Any], message: str):
    with pytest.raises(RecipeError) as raised:
        build_parts(tmp_path, Bandit([0.0, 0.0]), **keys)
    assert message in str(raised.value) and "\n" not in str(raised.value)

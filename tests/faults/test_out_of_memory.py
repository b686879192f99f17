"""An update that does not fit into memory: made again in smaller windows where the recipe asks for it, else
ended with advice.

With several processes: `distributed/test_methods_equality`.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.toys import Bandit, again, build_parts
from unified_rl.fitting import TooLargeError, as_fitted
from unified_rl.memory import Memory
from unified_rl.recipe.file import parse_recipe
from unified_rl.run_folder.tracking import read_jsonl
from unified_rl.stopping import StopSignal
from unified_rl.train import Position, run_loop, start
from unified_rl.types import Segment, StepStats

KEYS = {"num_steps": 3, "epochs": 2, "optimizer": {"lr": 0.05, "eps": 1e-3}}


class Large(Bandit):
    """A policy with memory for some rows at a time, of which it finds out in the backward pass."""

    rows = 3
    asked: list[int]
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        num_rows = segment.num_rows
        self.asked.append(num_rows)
        stats = super().log_prob(name, segment, steps)
        # The first windows fit: what they leave behind must be dropped.
        if num_rows > self.rows and len(self.asked) % 2 == 0:
            stats.log_probs.register_hook(self.run_out)
        return stats

    def run_out(self, gradient: torch.Tensor) -> None:
        raise self.error


def trained(tmp_path, policy: Bandit, **engine: Any) -> torch.Tensor:
    parts = build_parts(tmp_path, policy, **KEYS, engine={"micro_batch": 8, **engine})
    run_loop(parts, Position(step=0, rollout=0), StopSignal())
    return policy.module.weight.detach()


@pytest.mark.parametrize(
    "error", [Large.error, RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate")]
)
def test_windows_are_halved_until_they_fit_and_the_updates_are_the_same(error: Exception, tmp_path):
    policy = Large([0.3, 0.1])
    policy.asked, policy.error = [], error
    found = trained(tmp_path / "large", policy, on_out_of_memory="halve")
    torch.testing.assert_close(found, trained(tmp_path / "plain", Bandit([0.3, 0.1])), rtol=1e-6, atol=1e-7)
    # 16 rows: one window of 8 that fits and one that does not, one of 4 and one that does not, then always 2.
    assert policy.asked == [8, 8, 4, 4] + 3 * 8 * [2]
    said = [row["message"] for row in read_jsonl(tmp_path / "large/run/events.jsonl") if row["level"] == "warning"]
    halvings = [line for line in said if "ran out of memory" in line]
    assert [line.rpartition(" ")[2] for line in halvings] == ["4", "2"] and str(error)[:20] in halvings[0]


def test_a_run_that_was_halved_goes_on_with_the_windows_that_it_had(tmp_path):
    engine = {"micro_batch": 8, "on_out_of_memory": "halve"}
    keys = {**KEYS, "num_steps": 8, "checkpoint": {"every": 2, "keep": 9}, "engine": engine}
    policy = Large([0.3, 0.1])
    policy.asked = []
    parts = build_parts(tmp_path, policy, **keys)
    run_loop(parts, Position(step=0, rollout=0), StopSignal())
    whole, rows = policy.module.weight.detach().clone(), policy.asked[-1]
    for step in (4, 6, 8):
        (tmp_path / f"run/checkpoints/step_{step:06d}/manifest.json").unlink()
    resumed = Large([0.3, 0.1])
    resumed.asked, resumed.rows = [], 100  # it would have room now
    parts = again(parts, tmp_path, resumed)
    run_loop(parts, start(parts, "auto"), StopSignal())
    assert set(resumed.asked) == {rows} == {2} and torch.equal(resumed.module.weight.detach(), whole)
    others = again(parts, tmp_path, Large([0.3, 0.1]))
    smaller = others.recipe.model_copy(update={"engine": others.recipe.engine.model_copy(update={"micro_batch": 3})})
    others = replace(others, recipe=smaller, memory=Memory(smaller))
    start(others, "auto")
    assert as_fitted(others).recipe.engine.micro_batch == 3, "what is asked for now counts"


def test_unasked_for_it_ends_with_advice_and_other_errors_pass(tmp_path):
    policy = Large([0.3, 0.1])
    policy.asked = []
    with pytest.raises(TooLargeError, match=r"Tried to allocate 20.00 GiB.*lower engine.micro_batch \(8\).*halve"):
        trained(tmp_path / "stop", policy)
    policy.asked, policy.rows = [], 0
    with pytest.raises(TooLargeError, match="with one row a window"):
        trained(tmp_path / "one", policy, on_out_of_memory="halve")
    policy.asked, policy.error = [], RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        trained(tmp_path / "other", policy, on_out_of_memory="halve")


def test_stages_that_exchange_gradients_within_windows_cannot(tmp_path):
    keys = {"policy": {"model": "toy", "family": "causal_lm"}, "data": {"prompts": "toy:prompts"}}
    engine = {"zero_stage": 2, "on_out_of_memory": "halve"}
    with pytest.raises(Exception, match="halve needs zero_stage 0 or 1"):
        parse_recipe({**keys, "rewards": [{"name": "toy:reward"}], "engine": engine}, tmp_path)

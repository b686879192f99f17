"""A replay that differs from its rollout ends the run before a weight has changed, and what is to blame is named."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from test_image_tokens import policy_of as image_tokens_policy_of
from test_masked_diffusion import policy_of as masked_policy_of
from test_pipelines import case_of
from toys import build_parts

from tests.contract.pipelines.check import policy_of
from unified_rl.errors import RecipeError
from unified_rl.policies.probing import UNGUIDED_REMEDY
from unified_rl.replay import AGAIN, ROLLOUT_SHAPE, SAME, diagnosis
from unified_rl.rewards.scoring import reward_of
from unified_rl.run_folder.resume import Position
from unified_rl.stopping import UNASKED
from unified_rl.tiny.twin import brightness
from unified_rl.train import run_loop


class Broken:
    """A hook on a denoiser whose output it spoils."""

    def __init__(self) -> None:
        self.calls, self.last = 0, None

    def batch_shape(self, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 0.2 * len(output))

    def low_precision(self, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 0.2 * len(output)) if output.dtype == torch.bfloat16 else output

    def memory(self, output: torch.Tensor) -> torch.Tensor:
        """As a multistep solver has it: the mean with the last output, from the first step on."""
        last = output if self.calls % 3 == 0 or self.last.shape != output.shape else self.last
        self.calls, self.last = self.calls + 1, output.detach()
        return (output + last) / 2

    def guided(self, output: torch.Tensor) -> torch.Tensor:
        """A momentum of the guided half, as in adaptive projected guidance."""
        return self.memory(output) if len(output) % 4 == 0 else output

    def counter(self, output: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return output * (1 + 0.2 * self.calls)


CASES: dict[str, tuple[str, str, list[str]]] = {
    "batch_shape": ("float32", "at the rollout's batch shape: set engine.rollout_batch", []),
    "low_precision": ("bfloat16", "in float32: set policy.dtype: float32", ["at the rollout's batch shape"]),
    "memory": ("float32", "with every call of the denoiser made: the denoiser or the scheduler remembers", []),
    "guided": ("float32", f"without guidance: {re.escape(UNGUIDED_REMEDY)}", ["with every call of the denoiser made"]),
    "counter": ("float32", "two replays of the same rows differ: something is drawn at random or remembered", []),
}


@pytest.mark.parametrize("fault", CASES)
def test_the_cause_of_a_gap_is_measured_before_a_weight_changes(fault: str, tmp_path: Path):
    dtype, named, also = CASES[fault]
    policy = policy_of(case_of("StableDiffusion3Pipeline"), lora=dtype == "bfloat16")
    broken = Broken()
    spoil: Callable = getattr(broken, fault)

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (spoil(output[0]),)

    policy.module.register_forward_hook(hook)
    before = {name: weight.detach().clone() for name, weight in policy.module.named_parameters()}
    rows = {"batch_shape": 1, "low_precision": 1}.get(fault, 2)
    parts = build_parts(
        tmp_path, policy, group_size=2, prompts_per_step=1, engine={"micro_batch": rows, "rollout_batch": 2}
    )
    parts = dataclasses.replace(parts, rewards=[reward_of(brightness, name="brightness")])
    with pytest.raises(RecipeError, match=f"max_replay_gap: replay differs from the rollout by .*{named}") as caught:
        run_loop(parts, Position(step=0, rollout=0), UNASKED)
    assert all(other in str(caught.value) for other in also) and "\n" not in str(caught.value)
    for name, weight in policy.module.named_parameters():
        assert torch.equal(weight, before[name]) and weight.dtype == before[name].dtype
    assert "measured: {" in (tmp_path / "run" / "events.jsonl").read_text()


def test_only_policies_that_can_store_outputs_are_told_to():
    key = "policy.sampling.store_outputs: true"
    told = [probe.remedy for probe in policy_of(case_of("StableDiffusion3Pipeline")).probes() if key in probe.remedy]
    assert len(told) == 2
    for policy in (masked_policy_of(), image_tokens_policy_of("janus")):
        remedies = [probe.remedy for probe in policy.probes()]
        assert remedies and not any("store_outputs" in remedy for remedy in remedies)


def test_the_diagnosis_says_what_helps_and_what_does_not():
    advice = {ROLLOUT_SHAPE: "set that", "in float32": "set this", SAME: "start afresh"}
    told = diagnosis(0.5, 1e-3, {AGAIN: 0.0, ROLLOUT_SHAPE: 0.5, SAME: 0.4, "in float32": 1e-7}, advice)
    assert told == (
        "max_replay_gap: replay differs from the rollout by 5.00e-01 nats, more than 1e-03; it is 1.0e-07 in float32: "
        "set this; it stays at the rollout's batch shape, nothing changed"
    )
    assert "replay does not compute what sampling did" in diagnosis(0.5, 1e-3, {AGAIN: 0.0, SAME: 0.4}, advice)
    everything_helps = diagnosis(0.5, 1e-3, {AGAIN: 0.0, SAME: 0.0, "in float32": 0.0}, advice)
    assert "start afresh" in everything_helps and "float32" not in everything_helps

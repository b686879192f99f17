"""A replay that does not give the rollout's log-probs stops the run instead of training on wrong ratios."""

from pathlib import Path

import pytest
import replay_worker
import torch

from tests import forks
from unified_rl.engine.local import LocalEngine
from unified_rl.errors import RecipeError
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.recipe.file import load_recipe
from unified_rl.train import train

SMALL = ["num_steps=1", "group_size=2", "prompts_per_step=1", "data.evaluation=null", "engine.threads=1"]


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_replay_stops_the_run(error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replay = CausalLMPolicy._completion_logits

    def wrong(self, *args, **kwargs):
        logits, states = replay(self, *args, **kwargs)
        return logits + error * torch.arange(logits.shape[-1]), states

    def never(self):
        raise AssertionError("the weights were to stay as they are")

    monkeypatch.setattr(CausalLMPolicy, "_completion_logits", wrong)
    monkeypatch.setattr(LocalEngine, "step", never)
    found = "two replays of the same rows differ" if error != error else "no change that was tried takes it away"
    with pytest.raises(RecipeError, match=f"max_replay_gap: replay differs from the rollout by .*{found}"):
        train(load_recipe("quickstart_vlm", SMALL), tmp_path / "run", resume="never")
    assert "on its own" in (tmp_path / "run" / "events.jsonl").read_text(), "the policy's own suspicion was tried"


def test_a_wrong_replay_of_one_process_stops_all(tmp_path: Path):
    ends = forks.run_together(2, replay_worker.main, tmp_path, log=tmp_path / "log")
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-3000:]
    told = [(tmp_path / f"told_{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1] and "differs from the rollout by 5.00e-01 nats" in told[0]

"""A replay that does not give the rollout's log-probs stops the run instead of training on wrong ratios."""

from pathlib import Path

import pytest
import torch

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

    monkeypatch.setattr(CausalLMPolicy, "_completion_logits", wrong)
    with pytest.raises(RecipeError, match="max_replay_gap: replay differs from the rollout"):
        train(load_recipe("quickstart_vlm", SMALL), tmp_path / "run", resume="never")

"""An average of the weights draws rollouts with noise in few steps: a window (MixGRPO), a branch (Flow-GRPO-Fast)."""

import json
from pathlib import Path

import pytest

from unified_rl import cli

COUNTS = ["num_steps=2", "group_size=4", "prompts_per_step=2", "epochs=1", "engine.micro_batch=4"]
AVERAGED = ["ema.decay=0.9", "rollout_weights=ema", "evaluation={every: 2, num_prompts: 2, num_saved: 0, weights: ema}"]
PLACES = {
    "window": "{noise_place: window, noise_shift: {schedule: progressive, every: 1}",
    "branch": "{noise_place: branch, noise_range: [0, 5]",
}


@pytest.mark.parametrize("place", PLACES)
def test_an_average_draws_rollouts_with_noise_in_a_few_steps(place: str, tmp_path: Path):
    """Its pictures replay exactly with the average, and count as off-policy for the weights that are trained."""
    sampling = f"policy.sampling={PLACES[place]}, num_inference_steps: 8, noise_steps: 2}}"
    assert cli.main(["train", "quickstart", *COUNTS, *AVERAGED, sampling, "--output", str(tmp_path)]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["replay_gap"] for row in metrics] == [0.0] * 2 and all(row["grad_norm"] > 0 for row in metrics)
    assert metrics[0]["ratio/mean"] == 1.0 and all(row["ratio/mean"] != 1.0 for row in metrics[1:])
    assert [json.loads(line)["step"] for line in (tmp_path / "eval.jsonl").read_text().splitlines()] == [0, 2]
    assert any((tmp_path / "checkpoints/step_000002/ema").rglob("*.safetensors"))

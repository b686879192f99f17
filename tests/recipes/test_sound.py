"""An audio pipeline trains: its rewards hear waveforms, and the run keeps them."""

import json
from pathlib import Path

import numpy as np

from tests.contract.pipelines.build import build, call_settings
from tests.contract.pipelines.cases import CASES
from unified_rl import cli

REWARD = """
def reward(prompts, completions, **_):
    return [float(abs(waveform).mean()) for (waveform,) in completions]
"""


def test_an_audio_pipeline_trains_on_a_reward_of_its_waveforms(tmp_path: Path):
    """Its schedule is told from the other end, and its class makes its scheduler itself."""
    case = next(case for case in CASES if case.name == "LongCatAudioDiTPipeline")
    build(case).save_pretrained(tmp_path / "model")
    (tmp_path / "loud.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue square\n")
    recipe = {
        "num_steps": 2,
        "group_size": 2,
        "prompts_per_step": 2,
        "policy": {
            "model": "model",
            "memory": {"gradient_checkpointing": True},
            "sampling": {"num_inference_steps": 3, "call": call_settings(case)},
        },
        "data": {"prompts": "prompts.txt", "evaluation": "prompts.txt"},
        "rewards": [{"name": "loud.py:reward"}],
        "objective": {"preset": "flow_grpo"},
        "engine": {"micro_batch": 4},
        "evaluation": {"every": 2, "num_prompts": 2},
    }
    (tmp_path / "sound.yaml").write_text(json.dumps(recipe))
    command = ["train", str(tmp_path / "sound.yaml")]
    assert cli.main([*command, "--output", str(tmp_path / "run")]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and metrics[0]["replay_gap"] <= 1e-5 and metrics[0]["grad_norm"] > 0
    (folder, *_) = sorted((tmp_path / "run/samples").iterdir())
    row = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    waveform = np.load(folder / row["arrays"][0])
    assert row["images"] == [] and waveform.ndim == 2 and len(waveform) == 1
    (heard,) = row["rewards"].values()
    assert abs(heard - np.abs(waveform).mean()) <= 1e-6
    assert cli.main([*command, "record_rollouts=true", "--output", str(tmp_path / "recorded")]) == 2

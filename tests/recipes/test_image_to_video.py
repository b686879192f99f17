"""An image-to-video pipeline trains from a dataset whose rows bring their first frame."""

import json
from pathlib import Path

from PIL import Image

from tests.contract.pipelines.build import build, call_settings
from tests.contract.pipelines.cases import CASES
from unified_rl import cli


def test_image_to_video_trains_from_a_column_of_pictures(tmp_path: Path):
    case = next(case for case in CASES if case.name == "LTXImageToVideoPipeline")
    build(case).save_pretrained(tmp_path / "model")
    call = {key: value for key, value in call_settings(case).items() if key != "output_type"}  # frames, not latents
    rows = []
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
        rows.append(json.dumps({"prompt": f"a {name} circle", "image": f"{name}.png"}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    recipe = {
        "num_steps": 2,
        "group_size": 2,
        "prompts_per_step": 2,
        "policy": {"model": "model", "sampling": {"num_inference_steps": 3, "call": call}},
        "data": {"prompts": "rows.jsonl"},
        "rewards": [{"name": "unified_rl.tiny.twin:brightness"}],
        "objective": {"preset": "dance_grpo"},
        "engine": {"micro_batch": 4},
    }
    (tmp_path / "i2v.yaml").write_text(json.dumps(recipe))
    command = ["train", str(tmp_path / "i2v.yaml"), "--output", str(tmp_path / "run")]
    assert cli.main(command) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and metrics[0]["replay_gap"] <= 1e-5 and metrics[0]["grad_norm"] > 0
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "no picture"}) + "\n")
    assert cli.main([*command, "--resume", "never"]) == 2

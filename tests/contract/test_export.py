"""What `unified-rl export` writes, the libraries load by themselves, and it computes what the policy computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from unified_rl.cli import main
from unified_rl.engine.local import LocalEngine
from unified_rl.policies import build_policy
from unified_rl.recipe.file import dump_recipe, parse_recipe
from unified_rl.recipe.snapshot import Snapshot
from unified_rl.run_folder.checkpoint import save_checkpoint
from unified_rl.snapshots import Snapshots

RATE = 0.5
REST: dict[str, Any] = {"data": {"prompts": "x.txt"}, "rewards": [{"name": "compressibility"}]}


def make_run(folder: Path, model: Path, *, lora: bool) -> tuple[Path, Any, Snapshots]:
    """A run of two checkpoints with an average, its policy as the second one has it."""
    raw = {
        "policy": {"model": str(model), "adapter": {"kind": "lora" if lora else "none", "rank": 2, "alpha": 4.0}},
        **REST,
        "ema": {"decay": RATE, "warmup": "none"},
    }
    recipe = parse_recipe(raw, folder)
    torch.manual_seed(0)
    policy = build_policy(recipe, torch.device("cpu"))
    engine = LocalEngine(policy.module, recipe.optimizer, num_steps=2)
    snapshots = Snapshots(engine, {"ema": Snapshot(decay=RATE)})
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    rewards = {1: 0.7, 2: 0.4, 3: 0.9}
    (run / "eval.jsonl").write_text("".join(json.dumps({"step": s, "reward": r}) + "\n" for s, r in rewards.items()))
    for step in (1, 2):
        with torch.no_grad():
            for shard in engine.shards().values():
                shard += 0.05 * torch.randn(shard.shape, generator=torch.Generator().manual_seed(step))
        snapshots.tick("step")
        save_checkpoint(run, step, policy=policy, engine=engine, snapshots=snapshots, state={}, keep=2)
    return run, policy, snapshots


def export(run: Path, out: Path, *arguments: str) -> Path:
    assert main(["export", str(run), str(out), *arguments]) == 0
    return out


def load(folder: Path) -> Any:
    """As the quickstart's checkpoint itself is loaded: it has no third text encoder."""
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def denoise(transformer: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 3, 32, 32, generator=draw),
            encoder_hidden_states=torch.randn(2, 12, 144, generator=draw),
            pooled_projections=torch.randn(2, 144, generator=draw),
            timestep=torch.tensor([300.0, 700.0]),
            return_dict=False,
        )[0]


def answer(model: Any) -> torch.Tensor:
    tokens = torch.arange(8, 20)[None]
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def test_a_lora_of_a_pipeline(quickstart: Path, tmp_path: Path):
    model = quickstart / "shapes_sd3"
    run, policy, snapshots = make_run(tmp_path, model, lora=True)
    expected = denoise(policy.module)
    with snapshots.use("ema"):
        averaged = denoise(policy.module)
    with policy.reference():
        base = denoise(policy.module)
    assert (expected - base).abs().max() > 1e-2 and (averaged - expected).abs().max() > 1e-3
    plain = load(model)
    plain.load_lora_weights(export(run, tmp_path / "lora", "--format", "diffusers"))
    torch.testing.assert_close(denoise(plain.transformer), expected, rtol=1e-4, atol=1e-5)
    plain.unload_lora_weights()
    adapter = export(run, tmp_path / "peft", "--format", "peft", "--weights", "ema")
    wrapped = PeftModel.from_pretrained(plain.transformer, str(adapter))
    torch.testing.assert_close(denoise(wrapped), averaged, rtol=1e-4, atol=1e-5)
    merged = load(export(run, tmp_path / "merged", "--format", "merged"))
    assert not any("lora" in name for name, _ in merged.transformer.named_parameters())
    torch.testing.assert_close(denoise(merged.transformer), expected, rtol=1e-4, atol=1e-4)


def test_a_full_fine_tuning_of_a_pipeline(quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run, policy, _ = make_run(tmp_path, quickstart / "shapes_sd3", lora=False)
    folder = export(run, tmp_path / "whole", "--format", "diffusers")
    loaded = load(folder)
    assert torch.equal(denoise(loaded.transformer), denoise(policy.module))
    assert type(loaded.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert parse_recipe({**REST, "policy": {"model": str(folder)}}, tmp_path).policy.family == "diffusion"
    best = load(export(run, tmp_path / "best", "--format", "merged", "--checkpoint", "best", "--weights", "ema"))
    assert "step_000001 -> " in capsys.readouterr().out
    policy.restore(run / "checkpoints" / "step_000001" / "ema")
    assert torch.equal(denoise(best.transformer), denoise(policy.module))


@pytest.mark.parametrize("lora", [True, False])
def test_a_language_model(quickstart: Path, tmp_path: Path, lora: bool):
    run, policy, snapshots = make_run(tmp_path, quickstart / "shapes_vlm", lora=lora)
    expected = answer(policy.module)
    with snapshots.use("ema"):
        averaged = answer(policy.module)
    assert (averaged - expected).abs().max() > 1e-3
    own = export(run, tmp_path / "own", "--format", "transformers")
    torch.testing.assert_close(answer(AutoModelForImageTextToText.from_pretrained(own)), expected)
    merged = export(run, tmp_path / "merged", "--format", "merged", "--weights", "ema")
    assert not list(merged.glob("adapter*"))
    torch.testing.assert_close(
        answer(AutoModelForImageTextToText.from_pretrained(merged)), averaged, rtol=1e-4, atol=1e-4
    )
    assert AutoProcessor.from_pretrained(merged).tokenizer.eos_token_id == 3
    if lora:
        adapter = export(run, tmp_path / "peft", "--format", "peft")
        base = AutoModelForImageTextToText.from_pretrained(quickstart / "shapes_vlm")
        torch.testing.assert_close(answer(PeftModel.from_pretrained(base, str(adapter))), expected)


def test_mistakes_are_one_line(quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run, _, _ = make_run(tmp_path, quickstart / "shapes_sd3", lora=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    cases = {
        "no run's folder": [tmp_path, "out", "--format", "merged"],
        "is there already; name a new folder": [run, tmp_path / "full", "--format", "merged"],
        "has no adapter; use merged": [run, "out", "--format", "peft"],
        "a pipeline; use diffusers or merged": [run, "out", "--format", "transformers"],
        "--checkpoint 7: there are 1, 2; or newest, best": [run, "out", "--format", "merged", "--checkpoint", "7"],
    }
    for message, arguments in cases.items():
        assert main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (run / "eval.jsonl").unlink()
    assert main(["export", str(run), "out", "--format", "merged", "--checkpoint", "best"]) == 2
    assert "no checkpoint of" in capsys.readouterr().err
    (run / "checkpoints" / "step_000002" / "policy" / "transformer" / "config.json").write_text("{}")
    assert main(["export", str(run), "out", "--format", "merged", "--checkpoint", "2"]) == 2
    assert "--checkpoint 2: there are 1" in capsys.readouterr().err, "an incomplete one is none"
    assert not Path("out").exists()

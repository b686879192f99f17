"""Recorded samples through the command line, with the shipped checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unified_rl.cli import main
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.recipe.file import load_recipe
from unified_rl.run_folder.tracking import read_jsonl
from unified_rl.train import train
from unified_rl.types import Prompt, Recorded

SMALL = [
    "num_steps=1", "group_size=2", "prompts_per_step=2", "engine.micro_batch=4", "engine.threads=1",
    "checkpoint.every=1", "epochs=1",
]  # fmt: skip


def never(*_, **__):
    raise AssertionError("nothing is generated")


def test_texts_train_without_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recorded text has the log-probs that its sampler gave it, token by token; training on it draws none."""
    recipe = load_recipe("quickstart_vlm")
    policy = CausalLMPolicy.load(
        recipe.policy, evaluation=recipe.policy.sampling, with_reference=False, entropy_gradient=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    prompts = [Prompt(text="How many circles?", images=(), columns={}, group_id=row, seed=row) for row in range(4)]
    drawn = policy.sample(prompts)
    segment = drawn.segments["text"]
    rows = [
        Recorded(completion=completion, token_ids=tokens.tolist(), log_probs=known[: len(tokens)].tolist())
        for completion, tokens, known in zip(
            drawn.completions, segment.actions["tokens"], segment.rollout_log_probs, strict=True
        )
    ]
    monkeypatch.setattr(CausalLMPolicy, "sample", never)
    again = policy.record(prompts, rows).segments["text"]
    assert torch.equal(again.rollout_log_probs, segment.rollout_log_probs)
    assert torch.equal(again.loss_mask, segment.loss_mask)
    with torch.no_grad():
        scored = policy.log_prob("text", again, slice(None)).log_probs
    torch.testing.assert_close(scored, segment.rollout_log_probs, atol=1e-4, rtol=0.0)
    whole = [row for row in rows if not row.completion.truncated]
    texts = [Recorded(completion=row.completion, token_ids=None, log_probs=None) for row in whole]
    plain = policy.record(prompts[: len(whole)], texts)
    assert whole and [each.text for each in plain.completions] == [row.completion.text for row in whole]


def test_a_recorded_rollout_trains_as_it_did_when_it_was_drawn(tmp_path: Path):
    """What a run records is all that its own update needed: same advantages, ratios and gradient, importance weights 1,
    in another order of rows; and against other weights, those weights are no longer 1."""
    small = [*SMALL, "group_size=4", "data.evaluation=null", "evaluation.num_saved=0"]
    corrected = "objective={preset: grpo, old_log_probs: recompute, correction: {mode: truncate, level: sequence}}"

    def run(folder: str, *more: str) -> dict[str, float]:
        train(load_recipe("quickstart_vlm", [*small, corrected, *more]), tmp_path / folder, resume="never")
        return read_jsonl(tmp_path / folder / "metrics.jsonl")[-1]

    online = run("online", "record_rollouts=true")
    offline = [f"data={{rollouts: {tmp_path / 'online'}}}"]
    again = run("offline", *offline)
    assert online["grad_norm"] > 0 and again["grad_norm"] == pytest.approx(online["grad_norm"], rel=1e-3)
    for key in ("reward", "reward_std", "loss", "entropy", "ratio/mean", "correction/mean"):
        assert again[key] == pytest.approx(online[key], abs=1e-4), key
    assert again["correction/mean"] == pytest.approx(1.0, abs=1e-4)
    assert run("hot", *offline, "policy.sampling.temperature=2.0")["correction/mean"] < 0.99
    lines = read_jsonl(tmp_path / "online/rollouts/rollout_000000_00.jsonl")
    assert len(lines) == 8 and all(len(line["token_ids"]) == len(line["log_probs"]) for line in lines)
    assert len(list((tmp_path / "online/rollouts/pictures").iterdir())) == 2  # one a prompt, not one a sample


def test_pictures_from_a_runs_folder(tmp_path: Path):
    """Two commands: a run that shows its samples, and one that prefers its best ones to its worst."""

    def command(folder: str, *more: str) -> None:
        assert main(["train", "quickstart_ddpo", *SMALL, *more, "--output", str(tmp_path / folder)]) == 0

    base = Path(load_recipe("quickstart_ddpo").data.prompts)
    command("online", f"data={{prompts: {base}}}")
    objective = "objective={preset: diffusion_dpo, train_steps: 2}"
    command("offline", f"data={{rollouts: {tmp_path / 'online'}}}", objective)
    (row,) = [json.loads(line) for line in (tmp_path / "offline/metrics.jsonl").read_text().splitlines()]
    assert row["pair/accuracy"] == 0.5 and row["loss"] == pytest.approx(0.6931, abs=1e-3) and row["grad_norm"] > 0
    (weights,) = (tmp_path / "offline/checkpoints/step_000001/policy").rglob("*.safetensors")
    assert load_file(weights)

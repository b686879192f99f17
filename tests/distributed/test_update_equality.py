"""The update is the same however the work is cut: micro-batches, processes, ZeRO stages."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forks

WORK = [
    "num_steps=2",
    "group_size=4",
    "prompts_per_step=2",
    "data.evaluation=null",
    "engine.threads=1",
    "checkpoint.every=1",
    # Batches of one shape in all runs: sampling in other shapes rounds differently, which is another rollout.
    "engine.rollout_batch=4",
    # Adam turns the rounding noise of gradients that are exactly zero on paper (key biases) into steps of size lr.
    "optimizer.eps=1e-5",
]
RECIPES = {
    "quickstart": ["epochs=1", "policy.sampling.num_inference_steps=4", "objective.train_steps=2"],
    "quickstart_vlm": [],
}
CUTS = {
    "one window": (1, ["engine.micro_batch=8"]),
    "windows of 1": (1, ["engine.micro_batch=1"]),
    "windows of 2": (1, ["engine.micro_batch=2"]),
    "two processes": (2, ["engine.micro_batch=4"]),
    "two processes, ZeRO-2": (2, ["engine.micro_batch=2", "engine.zero_stage=2"]),
}
# Small as these models are, all of them would be kept whole.
SHARDED = ["engine.zero_stage=3", "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"]
ZERO_3 = {"one window": CUTS["one window"], "two processes, ZeRO-3": (2, ["engine.micro_batch=2", *SHARDED])}
CUTS_OF = {
    "quickstart": CUTS,
    "quickstart_vlm": {**CUTS, "by tokens, two processes": (2, ["engine.micro_batch_tokens=60"])},
}
REWARD = """
def reward(prompts, completions, **_):
    if isinstance(completions[0], str):
        return [float(len(text)) for text in completions]
    return [sum(image.convert("L").getdata()) / 255 / image.width / image.height for image in completions]
"""


def train(recipe: str, folder: Path, num_processes: int, overrides: list[str]) -> dict[str, torch.Tensor]:
    (folder.parent / "reward.py").write_text(REWARD)
    rewards = f"rewards=[{{name: {folder.parent / 'reward.py'}:reward}}]"
    words = ["train", recipe, *WORK, *RECIPES[recipe], *overrides, rewards, "--output", str(folder)]
    log = folder.parent / f"log_{folder.name}"
    if num_processes == 1:
        ends = [forks.run(words, log=log)]
    else:
        ends = forks.run_together(num_processes, forks.cli, words, log=log)
    assert not any(end.returncode for end in ends), ends[0].stderr[-2000:]
    files = sorted((folder / "checkpoints/step_000002/policy").rglob("*.safetensors"))
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_update_does_not_depend_on_how_the_work_is_cut(recipe: str, tmp_path: Path):
    check(recipe, tmp_path, CUTS_OF[recipe])


def test_a_critic_is_trained_alike_under_zero_3(tmp_path: Path):
    """GAE, its whitening and the value loss; the second update clips."""
    ppo = ["objective={preset: ppo}", "epochs=2", "optimizer.critic_lr=1e-3"]
    names = check("quickstart_vlm", tmp_path, {name: (num, [*keys, *ppo]) for name, (num, keys) in ZERO_3.items()})
    assert any(name.startswith("critic.safetensors/") for name in names)


def test_an_adapter_and_its_average_are_trained_alike_under_zero_3(tmp_path: Path):
    """The divergence's reference is the model without its adapter; rollouts are drawn by the average."""
    lora = ["policy.adapter={kind: lora, rank: 4}", "objective.kl={coef: 0.1, estimator: k3}", "ema={decay: 0.5}"]
    cuts = {name: (num, [*keys, *lora, "rollout_weights=ema"]) for name, (num, keys) in ZERO_3.items()}
    names = check("quickstart_vlm", tmp_path, cuts)
    assert any("lora_" in name for name in names)


def check(recipe: str, folder: Path, cuts: dict[str, tuple[int, list[str]]]) -> set[str]:
    """Train by each cut and compare all weights; returns their names."""
    trained = {name: train(recipe, folder / name.replace(" ", "_"), *settings) for name, settings in cuts.items()}
    base = trained.pop("one window")
    scale = max(float(value.abs().max()) for value in base.values())
    for name, weights in trained.items():
        difference = max(float((weights[key] - base[key]).abs().max()) for key in base)
        assert difference / scale <= 1e-6, f"{name}: {difference / scale:.1e}"
        assert weights.keys() == base.keys()
    return set(base)

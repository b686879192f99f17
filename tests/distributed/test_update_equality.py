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
    "quickstart_vla": [],
    "quickstart_think_then_draw": ["policy.sampling.think.max_new_tokens=8"],
    # Wan 2.2: the first of the three steps is drawn by one transformer, the others by the other one. Both updates are
    # of one rollout: rewards of its second one would differ by a pixel that is rounded up in one run alone.
    "wan22_t2v_dance_grpo": [
        "--tiny",
        "epochs=2",
        "policy.dtype=float32",
        "policy.sampling.num_inference_steps=3",
        "optimizer.lr=1e-2",
    ],
}
SAME = 1e-5
"""Of the largest weight. Most differ by less than 1e-6, Wan 2.2's, at its high learning rate, by 4e-6."""
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
def reward(prompts, completions, **columns):
    if isinstance(completions[0], str):
        return [float(len(text)) for text in completions]
    if "num_turns" in columns:
        return columns["num_turns"]
    images = [each[-1] if isinstance(each, list) else each for each in completions]  # a video's last frame
    return [sum(image.convert("L").getdata()) / 255 / image.width / image.height for image in images]


def rows():
    # With two pictures, none, one and two.
    from unified_rl.worlds import shapes

    seen = shapes.questions("train", 4)
    both = [{"prompt": "what differs ?", "images": [seen[i]["image"], seen[i + 1]["image"]]} for i in (0, 2)]
    one = {"prompt": "which ?", "image": seen[1]["image"]}
    return [both[0], {"prompt": "how many circles are there ?"}, one, both[1]]
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
    saved = folder / "checkpoints/step_000002/policy"
    files = sorted(saved.rglob("*.safetensors"))
    return {f"{file.relative_to(saved)}/{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("recipe", CUTS_OF)
def test_the_update_does_not_depend_on_how_the_work_is_cut(recipe: str, tmp_path: Path):
    check(recipe, tmp_path, CUTS_OF[recipe])


def test_a_critic_is_trained_alike_under_zero_2_and_3(tmp_path: Path):
    """GAE, its whitening and the value loss; the second update clips."""
    ppo = ["objective={preset: ppo}", "epochs=2", "optimizer.critic_lr=1e-3"]
    cuts = {**ZERO_3, "two processes, ZeRO-2": CUTS["two processes, ZeRO-2"]}
    names = check("quickstart_vlm", tmp_path, {name: (num, [*keys, *ppo]) for name, (num, keys) in cuts.items()})
    assert any(name.startswith("critic.safetensors/") for name in names)


def test_an_adapter_and_its_average_are_trained_alike_under_zero_3(tmp_path: Path):
    """The divergence's reference is the model without its adapter; rollouts are drawn by the average. The sharded run
    computes activations again in its backward passes, and keeps its states in files."""
    lora = ["policy.adapter={kind: lora, rank: 4}", "objective.kl={coef: 0.1, estimator: k3}", "ema={decay: 0.5}"]
    cuts = {name: (num, [*keys, *lora, "rollout_weights=ema"]) for name, (num, keys) in ZERO_3.items()}
    saving = ["policy.memory.gradient_checkpointing=true", "engine.offload=all", f"engine.offload_folder={tmp_path}"]
    cuts["two processes, ZeRO-3"][1].extend(saving)
    names = check("quickstart_vlm", tmp_path, cuts)
    assert any("lora_" in name for name in names)


def test_rows_with_other_numbers_of_pictures_are_trained_alike_under_zero_3(tmp_path: Path):
    """One process may have rows with two pictures, another one with one and with none."""
    rows = [f"data.prompts={tmp_path / 'reward.py'}:rows", "group_size=2", "prompts_per_step=4"]
    check("quickstart_vlm", tmp_path, {name: (num, [*keys, *rows]) for name, (num, keys) in ZERO_3.items()})


def test_a_text_and_its_picture_are_trained_alike_under_zero_3(tmp_path: Path):
    """Texts end at different tokens, pictures never do; both are guided by the same sharded weights."""
    check("quickstart_think_then_draw", tmp_path, ZERO_3)


def test_two_denoisers_are_trained_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A window goes through one of them, and leaves the other one without gradients."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuts = {**ZERO_3, "two processes, ZeRO-2": CUTS["two processes, ZeRO-2"]}
    trained = check("wan22_t2v_dance_grpo", tmp_path, cuts)
    for part in ("transformer", "transformer_2"):
        assert any(value.any() for name, value in trained.items() if name.startswith(f"{part}/") and "lora_B" in name)


def test_episodes_of_different_lengths_are_trained_alike(tmp_path: Path):
    """Processes act for different numbers of turns."""
    check("quickstart_vla", tmp_path, {name: CUTS[name] for name in ("one window", "two processes, ZeRO-2")})


def check(recipe: str, folder: Path, cuts: dict[str, tuple[int, list[str]]]) -> dict[str, torch.Tensor]:
    """Train by each cut and compare all weights; returns them."""
    trained = {name: train(recipe, folder / name.replace(" ", "_"), *settings) for name, settings in cuts.items()}
    base = trained.pop("one window")
    scale = max(float(value.abs().max()) for value in base.values())
    for name, weights in trained.items():
        difference = max(float((weights[key] - base[key]).abs().max()) for key in base)
        assert difference / scale <= SAME, f"{name}: {difference / scale:.1e}"
        assert weights.keys() == base.keys()
    return base

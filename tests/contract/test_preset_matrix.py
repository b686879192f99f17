"""Every preset raises a reward on a real model of every family that it fits, within a few updates; where it does not
fit, it is refused.

The rewards are of the simplest kind, so that this takes seconds: bright pictures, letters from the front of the
alphabet. How presets do on the embedded world is measured (docs/preset_table.md).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat
from test_image_tokens import policy_of
from test_masked_diffusion import policy_of as masked_policy_of
from test_masked_text import policy_of as denoiser_of
from test_replay import diffusion_policy, text_policy
from torch import Tensor

from unified_rl.assemble import Parts
from unified_rl.data.prompts import PromptSampler
from unified_rl.engine.local import LocalEngine
from unified_rl.errors import RecipeError
from unified_rl.health import Health
from unified_rl.memory import Memory
from unified_rl.policies.critic import add_critics
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.policy import Think
from unified_rl.recipe.presets import PRESETS
from unified_rl.rewards.gradients import DifferentiableReward
from unified_rl.rewards.scoring import reward_of
from unified_rl.run_folder.tracking import NullRun, QuietConsole
from unified_rl.snapshots import Snapshots
from unified_rl.train import collect, plan_update
from unified_rl.types import Prompt
from unified_rl.update import update
from unified_rl.worlds import shapes

GAUSSIAN = {"flow_grpo", "flow_grpo_fast", "mix_grpo", "grpo_guard", "flow_dppo"}
NOISED = {"diffusion_nft", "awm", "dgpo", "diffusion_dpo"}
WHOLE_SEQUENCES = {"gspo", "gspo_token", "luspo", "vespo", "trl_rloo", "dpo"}
CRITICS = {"ppo", "verl_ppo"}
GRADIENTS = {"draft", "draft_lv", "alignprop", "refl"}
MISFITS = {
    "causal_lm": GAUSSIAN | NOISED | GRADIENTS | {"bicot_grpo", "uni_grpo"},
    "image_tokens": GAUSSIAN | NOISED | GRADIENTS | {"uni_grpo"},
    "masked_diffusion": GAUSSIAN | NOISED | GRADIENTS | CRITICS | (WHOLE_SEQUENCES - {"dpo"}) | {"bicot_grpo"},
    "masked_text": GAUSSIAN | NOISED | GRADIENTS | CRITICS | (WHOLE_SEQUENCES - {"dpo"}) | {"bicot_grpo"},
    "diffusion": WHOLE_SEQUENCES | {"bicot_grpo", "uni_grpo", "drpo"},
}
"""Presets that a family refuses."""
CELLS = [
    (family, preset) for family in MISFITS for preset in PRESETS if (family, preset) != ("image_tokens", "bicot_grpo")
]
THINKING = [("thinking", "bicot_grpo"), ("thinking", "ppo")]
"""Of image tokens whose policy writes a text first."""


def early_letters(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """The share of a text's letters that come before f, in tenths."""
    letters = [[letter for letter in text if letter.isalpha()] for text in completions]
    return [10.0 * sum(letter < "f" for letter in found) / max(len(found), 1) for found in letters]


def brightness(prompts: Sequence[Any], completions: Sequence[Image.Image], **_: Any) -> list[float]:
    """Mean grey of a picture, from 0 to 255."""
    return [ImageStat.Stat(image.convert("L")).mean[0] for image in completions]


def redness(prompts: Sequence[Any], completions: Sequence[Image.Image], **_: Any) -> list[float]:
    """How much more red than blue a picture has, from -255 to 255."""
    colours = [ImageStat.Stat(image.convert("RGB")).mean for image in completions]
    return [red - blue for red, _, blue in colours]


def soft_redness(prompts: Sequence[Any], completions: Tensor, **_: Any) -> Tensor:
    """The same of pictures [B, 3, H, W] in [0, 1], with a gradient."""
    return 255.0 * (completions[:, 0] - completions[:, 2]).mean((1, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What a family is taught."""

    reward: Callable[..., list[float]]
    rise: float
    """The least gain of its mean over samples with fixed seeds."""
    lr: float = 1e-2
    num_updates: int = 8
    group_size: int = 4
    exam_size: int = 64


LESSONS = {
    "causal_lm": Lesson(reward=early_letters, rise=0.6, lr=5e-4, num_updates=6, group_size=8, exam_size=32),
    "image_tokens": Lesson(reward=brightness, rise=0.3),
    "thinking": Lesson(reward=brightness, rise=0.3),
    "masked_diffusion": Lesson(reward=redness, rise=1.5, lr=5e-3, num_updates=6, group_size=8, exam_size=32),
    "masked_text": Lesson(reward=early_letters, rise=2.0),
    "diffusion": Lesson(reward=redness, rise=1.5, lr=5e-4, num_updates=4, exam_size=16),
}
BLIND = ("sft",)
"""Presets that imitate every sample, whatever its reward."""


def objective_of(family: str, preset: str) -> dict[str, Any]:
    """The preset, with what these rewards need."""
    keys: dict[str, Any] = {"preset": preset}
    if preset == "rwr":
        keys["temperature"] = 0.2
    if preset == "diffusion_nft":
        # How far it goes from an old policy that hardly follows.
        keys |= {"advantage_clip": 1.0, "mix_coef": 0.3}
    if preset in ("alignprop", "refl"):
        keys["reward_gradient"] = {"steps": [1, 2]}
    if family == "diffusion" and preset in ("rwr", "best_of_n"):
        keys["subtract_mean"] = True
    return keys


def judged(policy: Any, exam: Sequence[Prompt], family: str) -> float:
    """Mean reward of samples with fixed seeds."""
    completions = policy.sample(exam).completions
    shown = [done.images[0] if done.images else done.text for done in completions]
    return statistics.fmean(LESSONS[family].reward(exam, shown))


@pytest.fixture(scope="module")
def policies(quickstart: Path) -> dict[str, tuple[Any, list[dict[str, Any]], dict[str, Tensor]]]:
    """By family: a policy with a reference, dataset rows, and the weights that it starts from."""
    built = {
        "causal_lm": (text_policy(quickstart / "shapes_vlm"), shapes.heldout_questions(2)),
        "image_tokens": (policy_of("janus", with_reference=True), [{"prompt": "a red cat"}, {"prompt": "two"}]),
        "thinking": (
            policy_of("janus", with_reference=True, think=Think(max_new_tokens=5)),
            [{"prompt": "a red cat"}, {"prompt": "two"}],
        ),
        "masked_text": (
            denoiser_of("masked", with_reference=True, estimator="coupled_mask", num_masks=1),
            [{"prompt": "a"}, {"prompt": "b c"}],
        ),
        "masked_diffusion": (
            masked_policy_of(with_reference=True, estimator="random_mask", num_masks=2),
            [{"prompt": "a"}, {"prompt": "b"}],
        ),
        "diffusion": (
            diffusion_policy(quickstart / "shapes_sd3", sampling={"noise_steps": 2, "num_inference_steps": 4}),
            shapes.heldout_drawing()[:2],
        ),
    }
    return {
        family: (policy, rows, {name: p.detach().clone() for name, p in policy.module.named_parameters()})
        for family, (policy, rows) in built.items()
    }


def recipe_of(family: str, preset: str, folder: Path) -> Any:
    raw = {
        "policy": {"model": "toy", "family": "image_tokens" if family == "thinking" else family},
        "data": {"prompts": "toy:prompts"},
        "rewards": [{"name": "toy:reward"}],
        "objective": objective_of(family, preset),
        "num_steps": LESSONS[family].num_updates,
        "group_size": LESSONS[family].group_size,
        "prompts_per_step": 2,
        "optimizer": {"lr": LESSONS[family].lr, "decay": "none"},
        "engine": {"micro_batch": 16},
    }
    return parse_recipe(raw, folder)


@pytest.mark.parametrize(("family", "preset"), CELLS + THINKING)
def test_a_preset_raises_the_reward_of_each_family_that_it_fits(
    policies: Any, family: str, preset: str, tmp_path: Path
):
    if preset in MISFITS.get(family, ()):
        with pytest.raises(RecipeError, match=r"objective.*; "):
            recipe_of(family, preset, tmp_path)
        return
    recipe = recipe_of(family, preset, tmp_path)
    policy, rows, weights = policies[family]
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            parameter.copy_(weights[name])
    sampler = PromptSampler(rows, seed=0, group_size=recipe.group_size, prompts_per_step=2)
    if recipe.objective["all"].advantage == "gae":
        policy = add_critics(policy, recipe, sampler.rollout(0, rank=0, world_size=1)[:1])
    engine = LocalEngine(policy.module, recipe.optimizer, num_steps=recipe.num_steps)
    parts = Parts(
        recipe=recipe,
        policy=policy,
        engine=engine,
        snapshots=Snapshots(engine, recipe.all_snapshots),
        rewards=[reward_of(LESSONS[family].reward, name="reward")],
        differentiable=[DifferentiableReward(name="reward", weight=1.0, function=soft_redness)] * (preset in GRADIENTS),
        sampler=sampler,
        exam=[],
        run=NullRun(tmp_path),
        console=QuietConsole(),
        memory=Memory(recipe),
        health=Health(recipe),
    )
    exam_size = LESSONS[family].exam_size // 2
    exam = PromptSampler(rows, seed=1, group_size=exam_size, prompts_per_step=2).rollout(0, rank=0, world_size=1)
    before = judged(policy, exam, family)
    for index in range(recipe.num_steps):
        _, prepared, _ = collect(parts, index)
        row = update(parts.policy, engine, plan_update(parts, prepared, index, 0), first_update=True)
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        assert row["grad_norm"] > 0 or index  # later, all rewards of a group may be the highest
    trained = dict(policies[family][0].module.named_parameters())
    assert any(not torch.equal(trained[name], weights[name]) for name in weights)
    gain = judged(policy, exam, family) - before
    assert gain > LESSONS[family].rise or preset in BLIND

"""Every preset takes an optimiser step on a real model of every family that it fits; where it does not, it is refused.

That the reward then rises is tested on toys (tests/unit/test_objective_wiring.py, test_methods.py and
test_reward_gradient.py, together of every preset), and measured on the embedded world (docs/preset_table.md).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_image_tokens import policy_of
from test_masked_diffusion import policy_of as masked_policy_of
from test_masked_text import policy_of as denoiser_of
from test_replay import diffusion_policy, text_policy

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
from unified_rl.rewards.scoring import reward_of
from unified_rl.run_folder.tracking import NullRun, QuietConsole
from unified_rl.snapshots import Snapshots
from unified_rl.train import collect, plan_update
from unified_rl.update import update
from unified_rl.worlds import shapes

GAUSSIAN = {"flow_grpo", "flow_grpo_fast", "mix_grpo", "grpo_guard", "flow_dppo"}
NOISED = {"diffusion_nft", "awm", "dgpo", "diffusion_dpo"}
WHOLE_SEQUENCES = {"gspo", "gspo_token", "luspo", "vespo", "trl_rloo", "dpo"}
CRITICS = {"ppo", "verl_ppo"}
MISFITS = {
    "causal_lm": GAUSSIAN | NOISED | {"bicot_grpo", "uni_grpo"},
    "image_tokens": GAUSSIAN | NOISED | {"uni_grpo"},
    "masked_diffusion": GAUSSIAN | NOISED | CRITICS | (WHOLE_SEQUENCES - {"dpo"}) | {"bicot_grpo"},
    "masked_text": GAUSSIAN | NOISED | CRITICS | (WHOLE_SEQUENCES - {"dpo"}) | {"bicot_grpo"},
    "diffusion": WHOLE_SEQUENCES | {"bicot_grpo", "uni_grpo", "drpo"},
}
"""Presets that a family refuses."""
# Gradients of rewards need a differentiable one: see test_reward_gradient.py.
NAMES = [name for name, (_, keys) in PRESETS.items() if keys.get("method") != "reward_gradient"]
CELLS = [
    (family, preset) for family in MISFITS for preset in NAMES if (family, preset) != ("image_tokens", "bicot_grpo")
]
THINKING = [("thinking", "bicot_grpo"), ("thinking", "ppo")]
"""Of image tokens whose policy writes a text first."""


def uneven(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Some number of each completion, so that groups are not tied."""
    if isinstance(completions[0], str):
        return [float(sum(map(ord, text)) % 7) for text in completions]
    return [float(sum(image.convert("L").resize((4, 4)).tobytes()) % 101) for image in completions]


@pytest.fixture(scope="module")
def policies(quickstart: Path) -> dict[str, tuple[Any, list[dict[str, Any]], dict[str, torch.Tensor]]]:
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
            diffusion_policy(quickstart / "shapes_sd3", sampling={"noise_steps": 2}),
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
        "objective": {"preset": preset},
        "num_steps": 1,
        "group_size": 4,
        "prompts_per_step": 2,
        "optimizer": {"lr": 1e-3},
        "engine": {"micro_batch": 8},
    }
    return parse_recipe(raw, folder)


@pytest.mark.parametrize(("family", "preset"), CELLS + THINKING)
def test_a_preset_trains_each_family_that_it_fits(policies: Any, family: str, preset: str, tmp_path: Path):
    if preset in MISFITS.get(family, ()):
        with pytest.raises(RecipeError, match=r"objective.*; "):
            recipe_of(family, preset, tmp_path)
        return
    recipe = recipe_of(family, preset, tmp_path)
    policy, rows, weights = policies[family]
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            parameter.copy_(weights[name])
    sampler = PromptSampler(rows, seed=0, group_size=4, prompts_per_step=2)
    if recipe.objective["all"].advantage == "gae":
        policy = add_critics(policy, recipe, sampler.rollout(0, rank=0, world_size=1)[:1])
    engine = LocalEngine(policy.module, recipe.optimizer, num_steps=1)
    parts = Parts(
        recipe=recipe,
        policy=policy,
        engine=engine,
        snapshots=Snapshots(engine, recipe.all_snapshots),
        rewards=[reward_of(uneven, name="toy:reward")],
        sampler=sampler,
        exam=[],
        run=NullRun(tmp_path),
        console=QuietConsole(),
        memory=Memory(recipe),
        health=Health(recipe),
    )
    _, prepared, _ = collect(parts, 0)
    row = update(parts.policy, engine, plan_update(parts, prepared, 0, 0), first_update=True)
    assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
    trained = dict(policies[family][0].module.named_parameters())
    assert any(not torch.equal(trained[name], weights[name]) for name in weights)

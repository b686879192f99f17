"""Critics on the shipped models: states without a second forward, what is trained, what is saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_image_tokens import policy_of as drawing_policy
from test_image_tokens import prompts as drawing_prompts
from test_replay import diffusion_policy, image_prompts, question_prompts, text_policy

from unified_rl.policies.critic import CRITIC_FILE, CriticPolicy
from unified_rl.recipe.critic import Critic
from unified_rl.types import Segment


def token_critic(quickstart: Path, *, lora: bool = False, **settings: Any) -> tuple[CriticPolicy, Segment]:
    policy = text_policy(quickstart / "shapes_vlm", lora=lora)
    prompts = [prompt for prompt in question_prompts(2) for _ in range(2)]
    segment = policy.sample(prompts).segments["text"]
    critic = CriticPolicy(policy, {"text": Critic(**settings)}, {"text": segment})
    with torch.no_grad():  # away from the constant 0 that a critic begins with
        for layer in critic.module["critics"].values():
            torch.nn.init.normal_(layer.out.weight)
    return critic, segment


@pytest.mark.parametrize("network", ["head", "separate"])
def test_values_of_tokens_do_not_depend_on_how_they_are_computed(quickstart: Path, network: str):
    critic, segment = token_critic(quickstart, network=network)
    stats = critic.log_prob("text", segment, slice(None))
    apart = critic.values("text", segment, slice(None))
    mask = segment.loss_mask
    assert stats.values.shape == mask.shape and stats.states is None
    torch.testing.assert_close(stats.values[mask], apart[mask])
    # Row by row, so that no prompt is shared.
    alone = torch.cat([critic.values("text", segment.rows(slice(row, row + 1)), slice(None)) for row in range(4)])
    torch.testing.assert_close(alone[mask], apart[mask], atol=1e-5, rtol=1e-5)
    assert apart[mask].std() > 1e-3
    torch.testing.assert_close(critic.values("text", segment, slice(1, 3)), apart[:, 1:3])
    assert (stats.log_probs - segment.rollout_log_probs)[mask].abs().max() < 1e-5


def test_a_value_sees_what_came_before_its_token_and_nothing_later(quickstart: Path):
    critic, segment = token_critic(quickstart)
    before = critic.values("text", segment, slice(None))
    row = int(segment.loss_mask.sum(1).argmax())
    changed = [tokens.clone() for tokens in segment.actions["tokens"]]
    changed[row][1] = (changed[row][1] + 1) % 50
    other = Segment(
        actions={**segment.actions, "tokens": changed},
        rollout_log_probs=segment.rollout_log_probs,
        loss_mask=segment.loss_mask,
        turn_ids=segment.turn_ids,
    )
    after = critic.values("text", other, slice(None))
    torch.testing.assert_close(after[row, :2], before[row, :2])
    assert (after[row, 2] - before[row, 2]).abs() > 1e-4


def gradients(critic: CriticPolicy, segment: Segment) -> set[str]:
    stats = critic.log_prob("text", segment, slice(None))
    critic.module.zero_grad()
    stats.values.square().sum().backward()
    parts = critic.module
    return {name for name in parts if any(p.grad is not None and p.grad.any() for p in parts[name].parameters())}


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, {"critics"}),
        ({"trunk_gradient": True}, {"critics", "policy"}),
        ({"network": "separate"}, {"critics", "trunks"}),
    ],
)
def test_what_the_value_loss_trains(quickstart: Path, settings: dict[str, Any], trained: set[str]):
    assert gradients(*token_critic(quickstart, **settings)) == trained


def test_a_separate_critic_is_another_model(quickstart: Path):
    critic, segment = token_critic(quickstart, network="separate", lora=True)
    before = critic.values("text", segment, slice(None)).detach()
    with torch.no_grad():
        for name, parameter in critic.module["policy"].named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_()
    assert torch.equal(critic.values("text", segment, slice(None)), before)
    moved = critic.log_prob("text", segment, slice(None)).log_probs - segment.rollout_log_probs
    assert moved.abs().max() > 1e-2
    with critic.reference():
        stats = critic.log_prob("text", segment, slice(None))
    assert stats.values is None
    torch.testing.assert_close(stats.log_probs, segment.rollout_log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["shapes_sd3", "digits_unet"])
def test_values_of_latents(quickstart: Path, name: str):
    policy = diffusion_policy(quickstart / name)
    prompts = image_prompts("a red circle" if name == "shapes_sd3" else "a handwritten seven", 3)
    segment = policy.sample(prompts).segments["image"]
    states = policy.states("image", segment, slice(None))
    recorded = torch.stack(segment.actions["states"])
    assert torch.equal(states.state[:, 1:], recorded[:, :-1]) and states.state.shape == recorded.shape
    assert (states.level[:, 0] > 0.75).all() and (states.level.diff(dim=1) < 0).all() and (states.level > 0).all()
    # The first latents are each row's own, and those that the loop began with: one step of it leads to the recorded
    # state, by the density that the rollout reported.
    noise = policy.states("image", segment.rows(slice(1, 2)), slice(0, 1)).state
    assert torch.equal(noise[0], states.state[1, :1]) and (states.state[0, 0] - states.state[1, 0]).abs().max() > 0.1
    critic = CriticPolicy(policy, {"image": Critic(width=8)}, {"image": segment})
    torch.nn.init.normal_(critic.module["critics"]["image"].out.weight)
    whole = critic.values("image", segment, slice(None))
    stats = critic.log_prob("image", segment, slice(2, 3))
    torch.testing.assert_close(stats.values, whole[:, 2:3])
    assert whole.std() > 1e-3
    stats.values.sum().backward()
    assert all(p.grad is None for p in policy.module.parameters())


@pytest.mark.parametrize("network", ["head", "separate"])
def test_values_of_image_tokens(network: str):
    """Of the conditional row's states: the same whole, row by row and with the log-probs, and blind to what is drawn at
    their own step and after it."""
    policy = drawing_policy("janus")
    segment = policy.sample(drawing_prompts()).segments["image"]
    critic = CriticPolicy(policy, {"image": Critic(network=network)}, {"image": segment})
    torch.nn.init.normal_(critic.module["critics"]["image"].out.weight)
    values = critic.values("image", segment, slice(None))
    assert values.shape == segment.loss_mask.shape and values.std() > 1e-3
    stats = critic.log_prob("image", segment, slice(1, 3))
    torch.testing.assert_close(stats.values, values[:, 1:3])
    alone = torch.cat([critic.values("image", segment.rows([row]), slice(None)) for row in range(segment.num_rows)])
    torch.testing.assert_close(alone, values, atol=1e-5, rtol=1e-5)
    codes = segment.actions["codes"].clone()
    codes[:, 1] = (codes[:, 1] + 1) % 8
    other = critic.values("image", replace(segment, actions={**segment.actions, "codes": codes}), slice(None))
    torch.testing.assert_close(other[:, :2], values[:, :2])
    assert (other[:, 2] - values[:, 2]).abs().max() > 1e-5


def test_a_critic_is_saved_beside_the_policy(quickstart: Path, tmp_path: Path):
    critic, segment = token_critic(quickstart, lora=True)
    other, _ = token_critic(quickstart, lora=True)
    torch.nn.init.ones_(other.module["critics"]["text"].out.weight)
    critic.save(tmp_path)
    assert (tmp_path / CRITIC_FILE).is_file() and (tmp_path / "adapter_model.safetensors").is_file()
    expected = critic.values("text", segment, slice(None))
    assert not torch.equal(other.values("text", segment, slice(None)), expected)
    other.restore(tmp_path)
    assert torch.equal(other.values("text", segment, slice(None)), expected)

"""A language model in environments: episodes replay exactly, depend on their seeds alone, are judged as they ended."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_replay import text_policy

from reward_models.episodes import episode_return, success
from unified_rl.data.environments import Observation, Turn
from unified_rl.errors import RecipeError
from unified_rl.policies.action import ActionPolicy
from unified_rl.policies.critic import CriticPolicy
from unified_rl.policies.episode import EnvironmentFailedError
from unified_rl.recipe.critic import Critic
from unified_rl.recipe.environment import EnvironmentBlock
from unified_rl.rewards.scoring import reward_of, score
from unified_rl.types import Prompt, concat_trajectories
from unified_rl.worlds import walk

TURNS = 5


class Countdown:
    """Ends after as many turns as the task says, whatever is done; the last action's length is its reward."""

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale

    def reset(self, task: Any, seed: int) -> Observation:
        self.task, self.seed, self.left = task, seed, task["turns"]
        return self.seen()

    def step(self, action: str) -> Turn:
        self.left -= 1
        return Turn(
            observation=self.seen(), reward=self.scale * len(action), ended=self.left == 0, success=self.left == 0
        )

    def seen(self) -> Observation:
        return Observation(text=f"{self.task['prompt']} {self.left}")


def block(max_turns: int, **keys: Any) -> EnvironmentBlock:
    return EnvironmentBlock(name="my.py:World", max_turns=max_turns, **keys)


def walking(quickstart: Path, **keys: Any) -> ActionPolicy:
    return ActionPolicy(text_policy(quickstart / "shapes_vla", **keys), walk.Walk, block(TURNS))


def walk_prompts(num: int, *, group_size: int = 2) -> list[Prompt]:
    return [
        Prompt(
            text=task["prompt"],
            images=(),
            columns={"things": task["things"], "start": task["start"]},
            group_id=group,
            seed=100 * group + member,
        )
        for group, task in enumerate(walk.tasks("train", num))
        for member in range(group_size)
    ]


@pytest.mark.parametrize("lora", [False, True])
def test_episodes_replay_exactly(quickstart: Path, lora: bool):
    policy = walking(quickstart, lora=lora)
    trajectory = policy.sample(walk_prompts(4))
    segment = trajectory.segments["text"]
    lengths = [len(set(turns[mask].tolist())) for turns, mask in zip(segment.turn_ids, segment.loss_mask, strict=True)]
    assert lengths == [completion.measured["num_turns"] for completion in trajectory.completions]
    assert len(set(lengths)) > 1 and max(lengths) <= TURNS
    assert segment.loss_mask.shape[1] <= policy.max_steps["text"] == 8 * TURNS
    for rows in (slice(None), [5, 2], slice(3, 4)):
        part = segment.rows(rows)
        with torch.no_grad():
            gap = (policy.log_prob("text", part, slice(None)).log_probs - part.rollout_log_probs)[part.loss_mask]
        assert gap.abs().max() <= 1e-5
    steps = policy.log_prob("text", segment, slice(2, 5)).log_probs
    torch.testing.assert_close(steps, policy.log_prob("text", segment, slice(None)).log_probs[:, 2:5])


def test_an_episode_depends_on_its_seed_alone(quickstart: Path):
    policy = walking(quickstart)
    prompts = walk_prompts(3, group_size=3)
    together = policy.sample(prompts)
    alone = concat_trajectories([policy.sample([prompt]) for prompt in prompts])
    assert [each.text for each in together.completions] == [each.text for each in alone.completions]
    first, second = together.segments["text"], alone.segments["text"]
    torch.testing.assert_close(first.rollout_log_probs, second.rollout_log_probs, atol=1e-5, rtol=0)
    assert torch.equal(first.turn_ids, second.turn_ids)
    other = policy.sample([replace(prompt, seed=prompt.seed + 50) for prompt in prompts])
    assert [each.text for each in together.completions] != [each.text for each in other.completions]
    words = {word for each in together.completions for word in each.text.split("\n")[:2]}
    assert len(words) > 1, "turns of one episode have random numbers of their own"


def test_gradients_are_those_of_turn_after_turn(quickstart: Path):
    """The sum over an episode's steps, against each turn as a prompt of its own in the plain language model."""
    policy = walking(quickstart)
    segment = policy.sample(walk_prompts(2)).segments["text"]
    weights = [each for each in policy.module.parameters() if each.requires_grad]
    policy.log_prob("text", segment, slice(None)).log_probs.sum().backward()
    together = [each.grad.clone() for each in weights]
    policy.module.zero_grad()
    actor = text_policy(quickstart / "shapes_vla")
    for row in range(segment.num_rows):
        for inputs, tokens in zip(segment.actions["inputs"][row], segment.actions["tokens"][row], strict=True):
            one = actor.sample(walk_prompts(1, group_size=1)).segments["text"]
            turn = replace(one, actions={"inputs": [inputs], "tokens": [tokens]}, **matrices(len(tokens)))
            actor.log_prob("text", turn, slice(None)).log_probs.sum().backward()
    apart = [each.grad for each in actor.module.parameters() if each.requires_grad]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def matrices(length: int) -> dict[str, torch.Tensor]:
    return {
        "rollout_log_probs": torch.zeros(1, length),
        "loss_mask": torch.ones(1, length, dtype=torch.bool),
        "turn_ids": torch.zeros(1, length, dtype=torch.int64),
    }


def test_what_an_environment_says_reaches_rewards(quickstart: Path):
    actor = text_policy(quickstart / "shapes_vla")
    policy = ActionPolicy(actor, Countdown, block(3))
    prompts = [
        Prompt(text="go", images=(), columns={"turns": turns}, group_id=turns, seed=turns) for turns in (1, 2, 3, 4)
    ]
    trajectory = policy.sample(prompts)
    ends = [(each.truncated, each.measured["success"], each.measured["num_turns"]) for each in trajectory.completions]
    assert ends == [(False, 1.0, 1.0), (False, 1.0, 2.0), (False, 1.0, 3.0), (True, 0.0, 3.0)]
    said = [sum(map(len, each.measured["actions"])) for each in trajectory.completions]
    assert [each.text.split("\n") for each in trajectory.completions] == [
        each.measured["actions"] for each in trajectory.completions
    ]
    rewards = [reward_of(success, name="success"), reward_of(episode_return, name="return", weight=0.5)]
    scores = score(rewards, prompts, trajectory.completions)
    assert scores.breakdown["return"].tolist() == said
    assert scores.total.tolist() == [end[1] + 0.5 * sum_ for end, sum_ in zip(ends, said, strict=True)]


class Faulty(Countdown):
    """Fails as its task says: in `reset`, or on an action."""

    open = 0

    def __init__(self) -> None:
        super().__init__()
        Faulty.open += 1

    def reset(self, task: Any, seed: int) -> Any:
        if task.get("fault") == "reset":
            raise OSError("no simulator")
        return (super().reset(task, seed),) if task.get("fault") == "tuple" else super().reset(task, seed)

    def step(self, action: str) -> Any:
        turn, fault = super().step(action), self.task.get("fault")
        if fault == "raise" and self.left < 3:
            raise ZeroDivisionError("a joint broke")
        if fault == "hang":
            time.sleep(60)
        return (turn.observation, 0.0, False, {}) if fault == "gymnasium" else turn

    def close(self) -> None:
        Faulty.open -= 1


def tasks(*faults: str | None, **columns: Any) -> list[Prompt]:
    return [
        Prompt(text="go", images=(), columns={"turns": 4, "fault": fault, **columns}, group_id=0, seed=seed)
        for seed, fault in enumerate(faults)
    ]


@pytest.mark.parametrize("fault", ["raise", "hang"])
def test_an_environment_that_fails_costs_its_episode_only(quickstart: Path, fault: str):
    actor = text_policy(quickstart / "shapes_vla")
    policy = ActionPolicy(actor, Faulty, block(6, timeout=1.0, max_failures=0.25))
    trajectory = policy.sample(tasks(None, fault, None, None))
    assert Faulty.open == 0
    others = [each.measured["num_turns"] for row, each in enumerate(trajectory.completions) if row != 1]
    failed = trajectory.completions[1].measured
    assert others == [4.0] * 3 and failed["num_turns"] == {"raise": 2.0, "hang": 1.0}[fault]
    assert (failed["failed"], failed["success"], failed["episode_return"]) == (1.0, None, None)
    scores = score([reward_of(success, name="success")], tasks(None, fault, None, None), trajectory.completions)
    assert scores.total.isnan().tolist() == [False, True, False, False], "left out, not a zero"
    segment = trajectory.segments["text"]
    with torch.no_grad():
        gap = policy.log_prob("text", segment, slice(None)).log_probs - segment.rollout_log_probs
    assert gap[segment.loss_mask].abs().max() <= 1e-5
    policy = ActionPolicy(actor, Faulty, block(6, timeout=1.0, max_failures=0.2))
    reason = {"raise": "ZeroDivisionError: a joint broke", "hang": r"TimeoutError: no answer within 1 s"}[fault]
    with pytest.raises(EnvironmentFailedError, match=rf"my\.py:World failed in 1 of 4 episodes.*'go': {reason}; more"):
        policy.sample(tasks(None, fault, None, None))
    assert Faulty.open == 0


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("reset", EnvironmentFailedError, r"my\.py:World cannot begin the task 'go': OSError: no simulator"),
        ("tuple", RecipeError, r"policy\.environment\.name: reset must return an Observation, not tuple"),
        ("gymnasium", RecipeError, r"policy\.environment\.name: step must return a Turn with an Obs.*, not tuple"),
    ],
)
def test_an_environment_that_breaks_its_contract_is_named(
    quickstart: Path, fault: str, error: type[Exception], message: str
):
    policy = ActionPolicy(text_policy(quickstart / "shapes_vla"), Faulty, block(6))
    with pytest.raises(error, match=message):
        policy.sample(tasks(None, fault))
    with pytest.raises(RecipeError, match="data: the column success is what an episode is found to have; rename it"):
        policy.sample(tasks(None, success=1.0))


def test_an_observation_holds_pictures():
    with pytest.raises(TypeError, match="PIL pictures, not ndarray"):
        Observation(text="go", images=(np.zeros((8, 8, 3), dtype=np.uint8),))


def test_a_critic_values_every_token_of_an_episode(quickstart: Path):
    policy = walking(quickstart)
    segment = policy.sample(walk_prompts(2)).segments["text"]
    critic = CriticPolicy(policy, {"text": Critic(level="turn")}, {"text": segment})
    torch.nn.init.normal_(critic.module["critics"]["text"].out.weight)
    values = critic.log_prob("text", segment, slice(None)).values
    mask = segment.loss_mask
    assert values.shape == mask.shape and values[mask].std() > 1e-3
    torch.testing.assert_close(values[mask], critic.values("text", segment, slice(None))[mask])
    # The same picture and the same text so far: an agent that stays sees what it saw.
    per_turn = [critic.values("text", segment.rows([row]), slice(None))[0] for row in range(segment.num_rows)]
    for row, alone in enumerate(per_turn):
        torch.testing.assert_close(values[row][mask[row]], alone[mask[row]], atol=1e-5, rtol=1e-5)

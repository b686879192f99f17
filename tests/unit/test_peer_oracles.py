"""The compatibility presets give the numbers of the projects that they are named after: advantages, losses, gradients,
and generalised advantage estimation. Where the numbers are from: tests/oracles/peer_objectives.json."""

import json
from typing import Any

import pytest
import torch
from oracle_files import FOLDER, load
from torch import Tensor

from unified_rl.advantages import PromptStatistics, group_advantages
from unified_rl.objectives import aggregate
from unified_rl.objectives.kl import estimate
from unified_rl.objectives.policy_gradient import policy_loss
from unified_rl.objectives.value import gae, value_loss
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.presets import PRESETS
from unified_rl.types import Segment
from unified_rl.valuation import valued_advantages

CASES, ARRAYS = load("peer_objectives")
BY_NAME = {case["name"]: case for case in CASES["cases"]}
INPUTS = {key.removeprefix("inputs_"): value for key, value in ARRAYS.items() if key.startswith("inputs_")}
MASK = INPUTS["loss_mask"].bool()
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def preset(name: str) -> Objective:
    return Objective(**PRESETS[name][1])


def advantages_of(objective: Objective, rewards: Tensor, group_ids: Tensor) -> Tensor:
    return group_advantages(
        rewards,
        group_ids,
        normalise=objective.advantage,  # type: ignore[arg-type]
        clip=objective.advantage_clip,
        std_eps=objective.std_eps,
        population_std=objective.population_std,
    )


def loss_of(objective: Objective, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    per_step = policy_loss(
        log_probs,
        old,
        advantages[:, None].expand(log_probs.shape),
        mask,
        loss=objective.loss,
        ratio_level=objective.ratio,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        delta=objective.delta,
    ).per_step
    num_steps, num_sequences = aggregate.counts(mask)
    weights = aggregate.weights(
        mask,
        objective.aggregation,
        num_steps=num_steps,
        num_sequences=num_sequences,
        max_length=mask.shape[1],
        dtype=torch.float64,
    )
    return (per_step * weights).sum()


def check_loss(case: str, objective: Objective, inputs: str, old: Tensor, advantages: Tensor, mask: Tensor) -> None:
    log_probs = ARRAYS[inputs].clone().requires_grad_()
    loss = loss_of(objective, log_probs, old, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert float(loss) == pytest.approx(BY_NAME[case]["loss"], rel=1e-12)
    torch.testing.assert_close(gradient, ARRAYS[f"{case}_grad"], **EXACT)
    assert gradient.abs().max() > 1e-3


def test_every_case_of_the_oracle_is_used():
    used = {"gae0", "gae1", "gae2", "gae3", "value0", "value1", "verl_grpo", "verl_rloo", "verl_reinforce_baseline"}
    used |= {"verl_loss", "trl_rloo0", "trl_rloo1", "trl_rloo2", "trl_rloo_kl", "trl_rloo_loss"}
    assert set(BY_NAME) == used | {"flow_grpo", "flow_grpo_loss"}


def test_grpo_advantages_of_verl():
    got = advantages_of(preset("verl_grpo"), INPUTS["rewards"], INPUTS["group_ids"])
    torch.testing.assert_close(got, ARRAYS["verl_grpo_advantages"], **EXACT)


def test_rloo_advantages_of_verl():
    got = advantages_of(preset("rloo"), INPUTS["rewards"], INPUTS["group_ids"])
    torch.testing.assert_close(got, ARRAYS["verl_rloo_advantages"], **EXACT)


def test_baseline_advantages_of_verl():
    """verl adds 1e-8 to the variance, we add to the std."""
    objective = preset("reinforce++_baseline").model_copy(update={"std_eps": 1e-12})
    got = advantages_of(objective, INPUTS["rewards"], INPUTS["group_ids"])
    torch.testing.assert_close(got, ARRAYS["verl_reinforce_baseline_advantages"], rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("case", ["trl_rloo0", "trl_rloo2"])
def test_rloo_advantages_of_trl(case: str):
    """Without and with an excluded sample."""
    got = advantages_of(preset("trl_rloo"), INPUTS[BY_NAME[case]["rewards"]], INPUTS["group_ids"])
    torch.testing.assert_close(got, ARRAYS[f"{case}_advantages"], **EXACT)


def test_normalised_rloo_advantages_of_trl():
    """Whitened over the batch they are REINFORCE++'s with a baseline: G / (G - 1) cancels, but for the 1e-4."""
    objective = preset("reinforce++_baseline").model_copy(update={"std_eps": 1e-4 * 3 / 4})
    got = advantages_of(objective, INPUTS["rewards"], INPUTS["group_ids"])
    torch.testing.assert_close(got, ARRAYS["trl_rloo1_advantages"], **EXACT)


def test_rloo_advantages_of_trl_with_a_divergence_in_the_reward():
    objective = preset("trl_rloo")
    kl = estimate(INPUTS["old_log_probs"], INPUTS["ref_log_probs"], objective.kl.estimator).masked_fill(~MASK, 0.0)  # type: ignore[arg-type]
    rewards = INPUTS["rewards_of_six"] - objective.kl.coef * kl.sum(1)
    got = advantages_of(objective, rewards, torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(got, ARRAYS["trl_rloo_kl_advantages"], **EXACT)


def test_rloo_loss_of_trl():
    check_loss(
        "trl_rloo_loss",
        preset("trl_rloo"),
        "inputs_near_log_probs",
        INPUTS["old_log_probs"],
        INPUTS["advantages"],
        MASK,
    )


def test_loss_of_verl_with_its_dual_clip():
    inputs = (INPUTS["old_log_probs"], INPUTS["advantages"], MASK)
    check_loss("verl_loss", preset("verl_grpo"), "inputs_log_probs", *inputs)
    check_loss("verl_loss", preset("verl_ppo"), "inputs_log_probs", *inputs)
    single = preset("verl_grpo").model_copy(update={"dual_clip": None})
    assert float(loss_of(single, INPUTS["log_probs"], *inputs)) != pytest.approx(BY_NAME["verl_loss"]["loss"], rel=1e-3)


def test_prompt_statistics_of_ddpo():
    """Four rollouts: prompts with too short a past, and pasts that are longer than the buffer."""
    objective = preset("ddpo")
    oracle = json.loads((FOLDER / "ddpo_prompt_statistics.json").read_text())
    tracker = PromptStatistics(7, 4, std_eps=objective.std_eps, population_std=objective.population_std)
    for rollout in oracle["rollouts"]:
        got = tracker.advantages(torch.tensor(rollout["rewards"], dtype=torch.float64), rollout["prompts"])
        torch.testing.assert_close(got, torch.tensor(rollout["advantages"], dtype=torch.float64), **EXACT)


def test_advantages_and_loss_of_flow_grpo():
    objective = preset("flow_grpo_code")
    raw = objective.model_copy(update={"advantage_clip": None})
    got = advantages_of(raw, INPUTS["rewards"], INPUTS["group_ids"])
    torch.testing.assert_close(got, ARRAYS["flow_grpo_advantages"], **EXACT)
    unclipped, limit = ARRAYS["flow_grpo_loss_advantages"], objective.advantage_clip
    assert limit is not None and unclipped.abs().max() > limit
    log_probs = ARRAYS["flow_grpo_loss_log_probs"][:, None].requires_grad_()
    old = ARRAYS["flow_grpo_loss_old_log_probs"][:, None]
    loss = loss_of(objective, log_probs, old, unclipped.clamp(-limit, limit), torch.ones(8, 1, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert float(loss) == pytest.approx(BY_NAME["flow_grpo_loss"]["loss"], rel=1e-12)
    torch.testing.assert_close(gradient[:, 0], ARRAYS["flow_grpo_loss_grad"], **EXACT)
    assert 0 < (gradient == 0).sum() < 8, "some are clipped"


def valued(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The whitened advantages and returns of a case of verl's, by the code that a run goes through, and the mask."""
    mask = INPUTS[case["mask"]].bool()
    critic = {"gamma": case["gamma"], "gae_lambda": case["gae_lambda"]}
    objective = Objective(**{**PRESETS["verl_ppo"][1], "critic": {**PRESETS["verl_ppo"][1]["critic"], **critic}})
    segment = Segment(
        actions={},
        rollout_log_probs=torch.zeros(mask.shape),
        loss_mask=mask,
        turn_ids=torch.zeros(mask.shape, dtype=torch.int64),
    )
    # Rewards of single steps come in as penalties with the other sign.
    advantages, trained = valued_advantages(
        objective, segment, INPUTS["values"], torch.zeros(len(mask)), -INPUTS["step_rewards"]
    )
    return advantages, trained.returns, mask


@pytest.mark.parametrize("case", ["gae0", "gae1", "gae2", "gae3"])
def test_generalised_advantages_of_verl(case: str):
    """The last two with gaps between decisions. verl adds 1e-8 to the variance, we to the std."""
    advantages, returns, mask = valued(BY_NAME[case])
    torch.testing.assert_close(returns, ARRAYS[f"{case}_returns"], **EXACT)
    torch.testing.assert_close(advantages, ARRAYS[f"{case}_advantages"], rtol=1e-7, atol=1e-12)
    plain = gae(
        INPUTS["step_rewards"],
        INPUTS["values"],
        mask,
        gamma=BY_NAME[case]["gamma"],
        gae_lambda=BY_NAME[case]["gae_lambda"],
    )
    torch.testing.assert_close(plain, (ARRAYS[f"{case}_returns"] - INPUTS["values"]).masked_fill(~mask, 0.0), **EXACT)


@pytest.mark.parametrize("case", ["value0", "value1"])
def test_value_loss_of_verl(case: str):
    values = INPUTS["new_values"].clone().requires_grad_()
    losses, bounded = value_loss(values, INPUTS["values"], INPUTS["returns"], BY_NAME[case]["clip"])
    loss = (losses * MASK).sum() / MASK.sum()
    (gradient,) = torch.autograd.grad(loss, values)
    assert float(loss) == pytest.approx(BY_NAME[case]["loss"], rel=1e-12)
    assert float(bounded[MASK].double().mean()) == pytest.approx(BY_NAME[case]["clip_fraction"])
    torch.testing.assert_close(gradient, ARRAYS[f"{case}_grad"], **EXACT)

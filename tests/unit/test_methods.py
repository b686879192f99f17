"""Methods that are no policy gradients: toy policies through the real trainer, and the numbers by hand."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_objective_wiring import BEGIN, DOCS, rows_of
from torch import Tensor
from toys import Bandit, Walker, again, build_parts

from unified_rl.errors import RecipeError
from unified_rl.methods import PLANS
from unified_rl.metrics import StepMetrics
from unified_rl.objectives.forward_process import FORWARD_LOSSES
from unified_rl.objectives.preference import SCORE_LOSSES, pair_losses
from unified_rl.objectives.sample_weights import SAMPLE_WEIGHTS, contrast
from unified_rl.recipe.method_rules import METHOD_KINDS
from unified_rl.train import StopSignal, collect, plan_update, run_loop, start
from unified_rl.types import Denoised, Segment

OLD = {"snapshots": {"old": {"decay": 0.0, "clock": "rollout"}}}


class Denoiser(Walker):
    """The walk's end is the clean sample; predicted is the end that the drift alone would reach."""

    seeds: list[tuple[int, list[int]]] = []

    def num_levels(self, name: str, segment: Segment) -> int:
        return self.max_steps["image"]

    def predict(self, name: str, segment: Segment, step: int, seeds: Sequence[int]) -> Denoised:
        states = segment.actions["states"]
        assert isinstance(states, Tensor)
        self.seeds.append((step, list(seeds)))
        noise = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        target = states[:, -1]
        output = self.max_steps["image"] * self._now.expand(target.shape) + 0.01 * noise
        level = torch.tensor((step + 1) / self.max_steps["image"])
        return Denoised(output=output, target=target, clean_scale=torch.tensor(1.0), level=level)


def gradient(parts: Any, index: int = 0) -> Tensor:
    """Of the first update's loss."""
    _, prepared, _ = collect(parts, index)
    for window in plan_update(parts, prepared, index, 0):
        window.loss(parts.policy, window, StepMetrics(), first_update=True).backward()
    return parts.policy.module.weight.grad


TEXT_PRESETS = ["best_of_n", "rwr", "dpo"]
IMAGE_PRESETS = ["best_of_n", "rwr", "diffusion_dpo", "diffusion_nft", "awm", "dgpo"]


@pytest.mark.parametrize(
    ("preset", "kind"), [(name, Bandit) for name in TEXT_PRESETS] + [(name, Denoiser) for name in IMAGE_PRESETS]
)
def test_every_preset_raises_the_reward(tmp_path: Path, preset: str, kind: Any):
    policy = kind([0.0, 0.0, 0.0] if kind is Bandit else [0.0, 0.0])
    before = policy.module.weight.detach().clone()
    # Rewards and errors of the toys have a scale of their own.
    scale: dict[str, Any] = {"rwr": {"temperature": 0.3}, "diffusion_dpo": {"pair_coef": 2.0}}
    objective = {"preset": preset, **scale.get(preset, {})}
    parts = build_parts(tmp_path, policy, objective=objective, num_steps=24)
    assert run_loop(parts, BEGIN, StopSignal()) == 0
    gain = (policy.module.weight.detach() - before).tolist()
    assert (gain[0] - max(gain[1:]) > 0.1) if kind is Bandit else (min(gain) > 0.05), gain
    rows = rows_of(parts)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (Bandit, {"preset": "dpo"}),
    (Bandit, {"preset": "best_of_n", "aggregation": "sequence_mean"}),
    (Denoiser, {"preset": "diffusion_dpo", "pair_coef": 5.0, "kl": {"coef": 0.1, "estimator": "prediction"}}),
    (Denoiser, {"preset": "dgpo", "pair_coef": 2.0}),
    (Denoiser, {"preset": "diffusion_nft", "train_steps": 2}),
    (Denoiser, {"preset": "awm", "beside": "policy_gradient", "beside_coef": 0.5, "kl": {"coef": 0.0}}),
]


@pytest.mark.parametrize(("kind", "objective"), SETTINGS)
def test_windows_do_not_change_an_update(tmp_path: Path, kind: Any, objective: dict[str, Any]):
    """Pairs and groups of 8 whole, in windows of 3 rows, and of single rows."""
    found, losses = [], []
    for micro_batch in (16, 3, 1):
        parts = build_parts(
            tmp_path / str(micro_batch), kind([0.3, 0.1]), objective=objective, engine={"micro_batch": micro_batch},
            num_steps=1,
        )  # fmt: skip
        with torch.no_grad():
            parts.policy._start += 0.2  # a reference that is not the policy
        found.append(gradient(parts))
        run_loop(parts, BEGIN, StopSignal())
        losses.append(rows_of(parts)[0]["loss"])
    for other, loss in zip(found[1:], losses[1:], strict=True):
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
        assert loss == pytest.approx(losses[0], rel=1e-5, abs=1e-7)
    assert found[0].abs().max() > 1e-3


def test_dpo_is_its_formula(tmp_path: Path):
    parts = build_parts(tmp_path, Bandit([0.4, 0.0, -0.3]), objective={"preset": "dpo", "pair_coef": 0.7})
    with torch.no_grad():
        parts.policy._start += torch.tensor([0.5, 0.0, 0.0])
    got = gradient(parts)
    _, (prepared,), _ = collect(parts, 0)
    tokens, rewards = prepared.segment.actions["tokens"], parts_rewards(prepared)
    logits = torch.tensor([0.4, 0.0, -0.3], requires_grad=True)
    gain = (logits.log_softmax(0)[tokens] - parts.policy._start.log_softmax(0)[tokens]).sum(1)
    losses = []
    for rows in (range(8), range(8, 16)):
        best = max(rows, key=lambda row: float(rewards[row]))
        worst = min(reversed(rows), key=lambda row: float(rewards[row]))
        losses.append(-torch.nn.functional.logsigmoid(0.7 * (gain[best] - gain[worst])))
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(got, logits.grad)


def parts_rewards(prepared: Any) -> Tensor:
    return (prepared.segment.actions["tokens"] == 0).float().mean(1)


def test_dgpo_is_its_formula(tmp_path: Path):
    objective = {"preset": "dgpo", "pair_coef": 3.0, "kl": {"coef": 0.0}, "train_steps": 1}
    parts = build_parts(tmp_path, Denoiser([0.3, 0.1]), objective=objective)
    with torch.no_grad():
        parts.policy._start += 0.2
    got = gradient(parts)
    _, (prepared,), _ = collect(parts, 0)
    window = plan_update(parts, prepared and [prepared], 0, 0)[0]
    assert window.steps.stop - window.steps.start == 1
    drift = torch.tensor([0.3, 0.1], requires_grad=True)
    states, advantages = prepared.segment.actions["states"], prepared.advantages.float()
    step, _ = Denoiser.seeds[-1]
    noise = noise_of(parts, prepared, step)
    error = (3 * drift + 0.01 * noise - states[:, -1]).square().mean(1)
    ref_error = (3 * parts.policy._start + 0.01 * noise - states[:, -1]).square().mean(1)
    weighted = (advantages * 3.0 * (error - ref_error)).detach().view(2, 8).mean(1).sigmoid().repeat_interleave(8)
    (weighted * advantages * error).mean().backward()
    torch.testing.assert_close(got, drift.grad)


def noise_of(parts: Any, prepared: Any, step: int) -> Tensor:
    from unified_rl.methods.planning import Planned, noise_seeds

    planned = Planned(method="dgpo", coef=1.0, index=0, number=0)
    seeds = noise_seeds(parts.recipe, planned, step, [prompt.group_id for prompt in prepared.prompts])
    assert len(set(seeds[:8])) == 1 and seeds[0] != seeds[8]  # one noise for a group
    return torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def test_imitation_is_weighted_likelihood(tmp_path: Path):
    objective = {"preset": "rwr", "temperature": 0.5, "aggregation": "token_mean"}
    parts = build_parts(tmp_path, Bandit([0.4, 0.0, -0.3]), objective=objective)
    got = gradient(parts)
    _, (prepared,), _ = collect(parts, 0)
    weights = (parts_rewards(prepared) / 0.5).view(2, 8).softmax(1).flatten() * 8
    logits = torch.tensor([0.4, 0.0, -0.3], requires_grad=True)
    (-(logits.log_softmax(0)[prepared.segment.actions["tokens"]] * weights[:, None]).mean()).backward()
    torch.testing.assert_close(got, logits.grad)


def test_errors_of_scores_are_weighted_by_their_level(tmp_path: Path):
    """Levels 1/3, 2/3 and 1; the toy's prediction is the same at all of them, but for its noise."""
    found = {}
    for weight in (None, "uniform", "t2"):
        objective = {"preset": "best_of_n", "error_weight": weight, "train_steps": 3}
        found[weight] = gradient(build_parts(tmp_path / str(weight), Denoiser([0.3, 0.1]), objective=objective))
    assert torch.equal(found[None], found["uniform"]) and found[None].abs().max() > 0.2
    torch.testing.assert_close(found["t2"], found["uniform"] * (1 / 9 + 4 / 9 + 1) / 3, rtol=0.05, atol=0.02)


def test_imitated_samples_have_noises_of_their_own(tmp_path: Path):
    Denoiser.seeds.clear()
    gradient(build_parts(tmp_path, Denoiser([0.3, 0.1]), objective={"preset": "rwr"}))
    seeds = [seed for _, row_seeds in Denoiser.seeds for seed in row_seeds]
    assert len(seeds) == 16 * 3 == len(set(seeds))  # samples x noise levels


def test_the_old_policy_is_the_snapshot(tmp_path: Path):
    """The snapshot stays at the start while the drift is moved: nft's gradient at the mirror image of the old one."""
    keys: dict[str, Any] = {**OLD, "epochs": 2}
    objective = {"preset": "diffusion_nft", "mix_coef": 0.5, "old_weights": "old", "kl": {"coef": 0.0}}
    parts = build_parts(tmp_path, Denoiser([0.3, 0.1]), objective=objective, **keys)
    _, (prepared,), _ = collect(parts, 0)
    weight = parts.policy.module.weight
    with torch.no_grad():
        weight += 0.2
    Denoiser.seeds.clear()
    for window in plan_update(parts, [prepared], 0, 0):
        window.loss(parts.policy, window, StepMetrics(), first_update=True).backward()
    drift = torch.tensor([0.5, 0.3], requires_grad=True)
    clean, advantages = prepared.segment.actions["states"][:, -1], prepared.advantages.float()
    rewards = (advantages / 5).clamp(-1, 1) / 2 + 0.5
    total = torch.zeros(())
    for (step, _), (_, seeds) in zip(Denoiser.seeds[::2], Denoiser.seeds[1::2], strict=True):
        noise = 0.01 * torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        rows = slice(0, 8) if Denoiser.seeds.index((step, seeds)) % 4 < 2 else slice(8, 16)
        old, change = 3 * torch.tensor([0.3, 0.1]) + noise, 1.5 * (drift - torch.tensor([0.3, 0.1]))
        for r, error in ((rewards, old + change - clean[rows]), (1 - rewards, old - change - clean[rows])):
            scale = error.detach().abs().mean(1, keepdim=True)
            total = total + 5.0 * (r[rows] * (error.square() / scale).mean(1)).sum() / 0.5 / 16 / 3
    total.backward()
    torch.testing.assert_close(weight.grad, drift.grad, rtol=1e-4, atol=1e-6)


def test_the_preset_of_nft_brings_its_old_policy_with_it(tmp_path: Path):
    filled = build_parts(tmp_path / "a", Denoiser([0.0]), objective={"preset": "diffusion_nft"}).recipe
    assert filled.rollout_weights == "old" and filled.objective["all"].old_weights == "old"
    assert filled.snapshots["old"].model_dump(exclude={"delay", "every"}) == {
        "decay": 0.5, "warmup": "linear", "slope": 0.001, "clock": "rollout",
    }  # fmt: skip
    own = {"objective": {"preset": "diffusion_nft", "old_weights": "slow"}, "snapshots": {"slow": {"decay": 0.9}}}
    kept = build_parts(tmp_path / "b", Denoiser([0.0]), **own).recipe
    assert kept.rollout_weights == "trained" and list(kept.snapshots) == ["slow"]
    (tmp_path / "r.jsonl").write_text("")
    recorded = {"data": {"rollouts": str(tmp_path / "r.jsonl")}, "objective": {"preset": "diffusion_nft"}}
    offline = build_parts(tmp_path / "c", Denoiser([0.0]), **recorded).recipe
    assert offline.rollout_weights == "trained" and "old" in offline.snapshots


def test_a_resumed_run_goes_on_exactly(tmp_path: Path):
    keys: dict[str, Any] = {
        **OLD, "epochs": 2, "num_steps": 12, "checkpoint": {"every": 1, "keep": 99},
        "objective": {"preset": "diffusion_nft", "old_weights": "old", "train_steps": 2},
    }  # fmt: skip
    whole = Denoiser([0.2, 0.0])
    parts = build_parts(tmp_path, whole, **keys)
    run_loop(parts, BEGIN, StopSignal())
    fresh = Denoiser([0.2, 0.0])
    resumed = again(parts, tmp_path, fresh)
    at = start(resumed, str(parts.run.path / "checkpoints" / "step_000006"))
    assert at.step == 6
    run_loop(resumed, at, StopSignal())
    assert torch.equal(fresh.module.weight.detach(), whole.module.weight.detach())


def test_pair_losses_by_hand():
    margins = torch.tensor([0.0, 2.0]).double()
    got = {form: pair_losses(margins, 0.5, form).tolist() for form in ("sigmoid", "ipo", "hinge")}
    assert got["sigmoid"] == pytest.approx([math.log(2), math.log(1 + math.exp(-1))])
    assert got["ipo"] == [1.0, 1.0] and got["hinge"] == [1.0, 0.0]


def test_sample_weights_by_hand():
    rewards = torch.tensor([1.0, 3.0, 3.0, math.nan, 2.0, 2.0])
    groups = torch.tensor([0, 0, 0, 0, 7, 7])
    got = {name: weigh(rewards, groups, 2.0).tolist() for name, weigh in SAMPLE_WEIGHTS.items()}
    assert got["uniform"] == [1, 1, 1, 0, 1, 1]
    assert got["best"] == [0, 0.5, 0.5, 0, 0, 0] and got["best_worst"] == [-1, 1, 0, 0, 0, 0]
    low, high = math.exp(0.5), math.exp(1.5)
    mean = (low + 2 * high) / 3
    assert got["exponential"] == pytest.approx([low / mean, high / mean, high / mean, 0, 1, 1])


def test_what_a_group_has_in_common_can_be_taken_out(tmp_path: Path):
    rewards = torch.tensor([1.0, 3.0, 3.0, math.nan, 2.0, 2.0])
    groups = torch.tensor([0, 0, 0, 0, 7, 7])
    weights = SAMPLE_WEIGHTS["best"](rewards, groups, 1.0)
    assert contrast(weights, rewards, groups).tolist() == pytest.approx([-1 / 3, 1 / 6, 1 / 6, 0, 0, 0])
    found = {}
    for preset in ("rwr", "best_of_n"):
        objective = {"preset": preset, "subtract_mean": True, "train_steps": 1}
        parts = build_parts(tmp_path / preset, Denoiser([0.3, 0.1]), objective=objective)
        found[preset] = gradient(parts)
        _, (prepared,), _ = collect(parts, 0)
        assert prepared.advantages.view(2, 8).sum(1).tolist() == pytest.approx([0, 0], abs=1e-12)
        # Of half the error, a mean over 2 dims, (3 drift - end)^2: 3 (3 drift - end) / 2. The drift drops out.
        ends = prepared.segment.actions["states"][:, -1]
        expected = -1.5 * (prepared.advantages.float()[:, None] * ends).mean(0)
        torch.testing.assert_close(found[preset], expected, rtol=0.1, atol=0.02)
    assert all(float(grad.abs().max()) > 0.05 for grad in found.values())


@pytest.mark.parametrize(
    ("objective", "policy", "message"),
    [
        ({"preset": "diffusion_nft"}, Bandit, "all.method: nft noises finished samples"),
        ({"preset": "dgpo"}, Bandit, "all.method: dgpo weighs denoising errors"),
        ({"preset": "diffusion_dpo"}, Bandit, "all.pair_coef: 2000 is for denoising errors"),
        ({"preset": "dpo"}, Denoiser, "all.pair_coef: 0.1 is for texts"),
        ({"preset": "sft", "advantage": "group_std"}, Bandit, "all.advantage: group_std has negative values"),
        ({"preset": "dpo", "advantage": "rloo"}, Bandit, "all.advantage: rloo names no pairs"),
        ({"preset": "rwr", "subtract_mean": True}, Bandit, "all.subtract_mean: would push worse texts away"),
        ({"preset": "sft", "subtract_mean": True}, Denoiser, "all.subtract_mean: leaves nothing of uniform weights"),
        ({"advantage": "best"}, Bandit, "all.advantage: best is for sft and dpo; for policy_gradient use pass_k"),
        ({"preset": "diffusion_nft", "loss": "sapo"}, Denoiser, "all.loss: only policy gradients use it, not nft"),
        ({"preset": "awm", "kl": {"estimator": "k3"}}, Denoiser, "all.kl.estimator: k3 compares steps"),
        ({"preset": "dpo", "kl": {"coef": 0.1}}, Bandit, "all.kl: dpo has none for tokens"),
        ({"kl": {"coef": 0.1, "estimator": "prediction"}}, Denoiser, "all.kl.estimator: prediction is for methods"),
        ({"preset": "rwr", "old_weights": "old"}, Bandit, "all.old_weights: sft compares with no old policy"),
        ({"preset": "awm", "beside": "awm"}, Denoiser, "all.beside: awm is the method already"),
        ({"preset": "awm", "old_weights": "old"}, Denoiser, "old_weights: no snapshot 'old'; add it to snapshots"),
    ],
)
def test_nonsense_is_refused_with_the_alternative(tmp_path: Path, objective: Any, policy: Any, message: str):
    with pytest.raises(RecipeError) as caught:
        build_parts(tmp_path, policy([0.0, 0.0]), objective=objective)
    assert str(caught.value).startswith(f"objective.{message}")


@pytest.mark.parametrize(
    ("preset", "keys", "message"),
    [
        ("dpo", {"minibatches": 2}, "minibatches: dpo compares the members of a group"),
        ("awm", {"epochs": 2}, "objective.old_weights: 2 updates a rollout need the old policy"),
    ],
)
def test_what_a_method_needs_of_the_recipe(tmp_path: Path, preset: str, keys: dict[str, Any], message: str):
    policy: Any = Bandit([0.0, 0.0]) if preset == "dpo" else Denoiser([0.0, 0.0])
    with pytest.raises(RecipeError, match=message):
        build_parts(tmp_path, policy, objective={"preset": preset}, **keys)


def test_an_unknown_method_names_the_nearest(tmp_path: Path):
    with pytest.raises(RecipeError, match="no method 'ntf'; did you mean 'nft'"):
        build_parts(tmp_path, Bandit([0.0, 0.0]), objective={"method": "ntf"})


def test_the_table_of_methods_is_the_recipes():
    for kind, table in (("denoising", FORWARD_LOSSES), ("scores", SCORE_LOSSES)):
        assert list(table) == [name for name, known in METHOD_KINDS.items() if known == kind]
    assert set(METHOD_KINDS.values()) == set(PLANS)


def test_the_method_in_the_docs_trains(tmp_path: Path):
    text = DOCS.read_text(encoding="utf-8")
    code, recipe = re.findall(r"```(?:python|yaml)\n(.*?)```", text[text.index("## Your own method") :], re.DOTALL)[:2]
    (tmp_path / "contrast.py").write_text(code)
    policy = Denoiser([0.0, 0.0])
    assert run_loop(build_parts(tmp_path, policy, **yaml.safe_load(recipe), num_steps=24), BEGIN, StopSignal()) == 0
    assert float(policy.module.weight.detach().min()) > 0.05


def test_methods_from_a_file(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from unified_rl.objectives.forward_process import ForwardTerms, squared_error\n"
        "from unified_rl.objectives.preference import ScoreLoss, ScoreTerms\n\n\n"
        "def doubled(terms: ForwardTerms):\n"
        "    return 2.0 * terms.advantages * squared_error(terms.output, terms.target)\n\n\n"
        "def mean_score(terms: ScoreTerms):\n"
        "    return ScoreLoss(loss=-(terms.weights * terms.scores).sum(), metrics={'seen': 1.0})\n\n\n"
        "def vague(terms):\n    return 0.0\n"
    )
    own = {"method": f"{tmp_path}/mine.py:doubled"}
    got = gradient(build_parts(tmp_path / "a", Denoiser([0.3, 0.1]), objective=own))
    awm = {"method": "awm", "error_weight": "uniform", "clip_low": 1.0, "clip_high": 1.0}
    torch.testing.assert_close(got, 2.0 * gradient(build_parts(tmp_path / "b", Denoiser([0.3, 0.1]), objective=awm)))
    own = {"method": f"{tmp_path}/mine.py:mean_score", "advantage": "uniform"}
    parts = build_parts(tmp_path / "c", Bandit([0.3, 0.1]), objective=own, num_steps=1)
    sft = build_parts(tmp_path / "d", Bandit([0.3, 0.1]), objective={"preset": "sft"})
    torch.testing.assert_close(gradient(parts), gradient(sft))
    run_loop(parts, BEGIN, StopSignal())
    assert rows_of(parts)[0]["seen"] == pytest.approx(1.0)
    own = {"method": f"{tmp_path}/mine.py:vague"}
    with pytest.raises(RecipeError, match="annotate its parameter"):
        gradient(build_parts(tmp_path / "e", Bandit([0.3, 0.1]), objective=own))

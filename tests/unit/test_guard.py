"""Statistics of samples by hand, the alarms that they give, and what an alarm leads to."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.toys import Bandit, again, build_parts, zeros_chosen
from unified_rl import guard
from unified_rl.assemble import Parts
from unified_rl.data.prompts import evaluation_prompts
from unified_rl.errors import ExploitedError, RecipeError
from unified_rl.guard import statistics, within_groups
from unified_rl.rewards.scoring import reward_of
from unified_rl.run_folder.checkpoint import list_checkpoints
from unified_rl.run_folder.export import choose
from unified_rl.stopping import StopSignal
from unified_rl.train import run_loop, start
from unified_rl.types import Completion


def shown(*pictures: np.ndarray) -> list[Completion]:
    return [Completion(text=None, images=(Image.fromarray(picture.astype(np.uint8)),)) for picture in pictures]


def said(*texts: str) -> list[Completion]:
    return [Completion(text=text, images=()) for text in texts]


def test_pictures_by_hand() -> None:
    flat = np.full((16, 16, 3), 128)
    found = statistics(shown(flat, flat))
    assert found == {"entropy": 0.0, "edges": 0.0, "high_frequencies": 0.0, "saturation": 0.0, "diversity": 0.0}
    board = np.indices((16, 16)).sum(0) % 2 * 255
    found = statistics(shown(np.stack([board] * 3, -1)))
    assert found["entropy"] == pytest.approx(1.0), "two levels, each half the time"
    assert found["edges"] == 1.0 and found["high_frequencies"] == pytest.approx(1.0)
    red = np.zeros((16, 16, 3))
    red[..., 0] = 255
    assert statistics(shown(red))["saturation"] == pytest.approx(1.0)
    black, white = np.zeros((8, 8, 3)), np.full((8, 8, 3), 255)
    assert statistics(shown(black, white))["diversity"] == pytest.approx(1.0), "root mean square of their difference"
    ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
    assert statistics(shown(np.stack([ramp] * 3, -1)))["high_frequencies"] < 0.05


def test_pictures_of_one_prompt_by_hand() -> None:
    black, white = np.zeros((8, 8, 3)), np.full((8, 8, 3), 255)
    completions = [*shown(black, white, white, white, black), *said("a")]
    total, groups = within_groups(completions, [0, 1, 0, 1, 2, 2])
    assert (total, groups) == (pytest.approx(1.0), 2), "black and white differ, white and white do not, one is no group"


def test_all_samples_of_a_prompt_alike_give_an_alarm(tmp_path: Path) -> None:
    """Different prompts still differ, so only the rollouts show it; the first one is the base model's."""
    policy = Bandit([0.0, 0.0])
    parts = build_parts(tmp_path, policy, num_steps=2, evaluation={"every": 1})
    draw = policy.sample

    def sample(prompts: Sequence[Any], evaluation: bool = False) -> Any:
        trajectory = draw(prompts, evaluation=evaluation)
        levels = [0 if policy.rollout else 255 * (row % 2) for row in range(len(prompts))]
        return replace(trajectory, completions=shown(*(np.full((8, 8, 3), level) for level in levels)))

    policy.sample = sample  # type: ignore[method-assign]
    rewards = [reward_of(lambda completions, **_: [float(i % 2) for i in range(len(completions))], name="toy:r")]
    parts = replace(parts, rewards=rewards, exam=[replace(p, group_id=i) for i, p in enumerate(prompts_of(parts))])
    run_loop(parts, start(parts, "never"), StopSignal())
    rows = [json.loads(line) for line in (parts.run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["group_diversity"] > 0.5 and rows[1]["group_diversity"] == 0.0
    events = (parts.run.path / "events.jsonl").read_text()
    assert "step 2: the difference between samples of one prompt went from" in events
    assert "step 1: the difference between samples of one prompt" not in events


def prompts_of(parts: Parts) -> list[Any]:
    return list(parts.sampler.rollout(0, rank=0, world_size=1)[:2])


def test_texts_by_hand() -> None:
    found = statistics(said("a b c d", "A a a a"))
    # triples: abc bcd, and aaa twice; pairs: ab bc cd aa aa aa
    assert found == {"length": 4.0, "repetition": pytest.approx(0.25), "distinct": pytest.approx(4 / 6)}
    assert statistics([]) == {}


def row(**changes: float) -> dict[str, float | None]:
    start = {"reward": 0.2, "rewards/ocr/mean": 0.2, "rewards/judge/mean": 0.5, "rewards/judge/std": 0.5}
    keys = {name.replace("__", "/"): value for name, value in changes.items()}
    return {**start, "stats/entropy": 4.0, "stats/edges": 0.01, "num_samples": 100.0, **keys}


def alarms(*rows: dict[str, float | None]) -> list[str]:
    return guard.alarms([{"step": 10 * place, **row} for place, row in enumerate(rows)], ["ocr"])


def test_alarms() -> None:
    assert alarms(row(), row(reward=0.9, rewards__judge__mean=0.6, stats__entropy=2.1)) == []
    (flat,) = alarms(row(), row(stats__entropy=1.9))
    assert flat.startswith("the spread of grey levels went from 4 to 1.9")
    assert alarms(row(), row(stats__edges=0.04)) == [], "four times a very small number is no alarm"
    (fell,) = alarms(row(), row(reward=0.9, rewards__judge__mean=0.39))
    assert fell == "judge, which is not trained on, fell from 0.5 to 0.39 while the reward rose"
    assert alarms(row(), row(reward=0.9, rewards__judge__mean=0.41)) == [], "within two standard errors"
    assert alarms(row(), row(reward=0.1, rewards__judge__mean=0.3)) == [], "both fell: no exploit"


def test_a_judge_is_compared_with_its_best_evaluation() -> None:
    better = row(reward=0.5, rewards__judge__mean=0.8)
    (fell,) = alarms(row(), better, row(reward=0.9, rewards__judge__mean=0.6))
    assert fell == "judge, which is not trained on, fell from 0.8 (step 10) to 0.6 while the reward rose"
    assert alarms(row(), better, row(reward=0.4, rewards__judge__mean=0.6)) == [], "both fell since then"


def three_zeros(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """A judge that likes arm 0 in three of four tokens: 4 p^3 (1 - p) of a bandit, 0.25 at p = 1/2, most at 3/4."""
    return [float(text.split().count("0") == 3) for text in completions]


def exploiting_run(folder: Path, **block: Any) -> Parts:
    """A bandit that learns to answer nothing but arm 0, which its judge likes less and less after some steps."""
    parts = build_parts(
        folder,
        Bandit([0.0, 0.0], num_steps=4),
        num_steps=8,
        rewards=[{"name": "toy:reward"}, {"name": "toy:judge", "weight": 0.0}],
        data={"prompts": "toy:prompts", "evaluation": "toy:prompts"},
        optimizer={"lr": 0.2},
        evaluation={"every": 1, "num_saved": 0},
        checkpoint={"every": 1, "keep": 1},
        guard={"judge": "judge", **block},
    )
    exam = evaluation_prompts([{"prompt": "a"}] * 400, num=400, seed=0, rank=0, world_size=1)
    rewards = [reward_of(zeros_chosen, name="reward"), reward_of(three_zeros, name="judge", weight=0.0)]
    return replace(parts, exam=exam, rewards=rewards)


def judged(parts: Parts) -> list[float]:
    return [json.loads(line)["rewards/judge/mean"] for line in (parts.run.path / "eval.jsonl").read_text().splitlines()]


def test_an_exploited_reward_is_warned_of_stopped_or_rolled_back(tmp_path: Path) -> None:
    free = exploiting_run(tmp_path / "warn")
    assert run_loop(free, start(free, "never"), StopSignal()) == 0
    course = judged(free)
    peak = course.index(max(course))
    end = next(step for step in range(peak, 9) if course[step] < course[peak] - 2 * 0.5 / 20)
    assert 0 < peak < end < 7 and course[-1] < course[0], "it improves, then is exploited"

    stopped = exploiting_run(tmp_path / "stop", action="stop")
    with pytest.raises(ExploitedError, match=rf"^judge, .* fell .* Stopped at step {end}; step_{peak:06d} is the best"):
        run_loop(stopped, start(stopped, "never"), StopSignal())
    assert judged(stopped) == course[: end + 1]
    kept = [f"step_{peak:06d}", f"step_{end:06d}"]
    assert [path.name for path in list_checkpoints(stopped.run.path)] == kept, "the newest, and the judge's best"
    assert choose(stopped.run.path, "best", "judge").name == kept[0]
    assert choose(stopped.run.path, "best").name == kept[1]

    rolled = exploiting_run(tmp_path / "rollback", action="rollback", patience=2)
    assert run_loop(rolled, start(rolled, "never"), StopSignal()) == 0
    assert len(judged(rolled)) == end + 2, "the base, and one evaluation more than with patience 1"
    assert [path.name for path in list_checkpoints(rolled.run.path)] == kept[:1]
    events = (rolled.run.path / "events.jsonl").read_text()
    assert f"Rolled back from step {end + 1}: {kept[0]} is the best checkpoint by judge" in events
    resumed = again(rolled, tmp_path / "rollback", Bandit([0.0, 0.0], num_steps=4))
    assert start(resumed, "auto").step == peak


def test_nothing_is_rolled_back_to_where_the_base_model_is_best(tmp_path: Path) -> None:
    parts = exploiting_run(tmp_path, action="rollback")
    fewer = reward_of(lambda prompts, completions, **_: [float("1" in text) for text in completions], name="judge")
    parts = replace(parts, rewards=[parts.rewards[0], replace(fewer, weight=0.0)])
    with pytest.raises(ExploitedError, match="judge likes the base model best"):
        run_loop(parts, start(parts, "never"), StopSignal())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": {"action": "rollback"}}, "guard.judge: rollback needs to know whose word counts, .* judge;"),
        ({"guard": {"judge": "juge"}}, "guard.judge: no reward 'juge' with weight 0; did you mean 'judge'"),
        ({"guard": {"action": "stop"}, "data": {"prompts": "toy:prompts"}}, "guard.action: stop needs evaluations"),
        ({"guard": {"action": "stop"}, "rewards": [{"name": "toy:reward"}]}, "guard.alarms: judges: there is no"),
        ({"guard": {"action": "rollback", "judge": "judge"}, "checkpoint": {"every": 3}}, "checkpoint.every: 3 is no"),
    ],
)  # fmt: skip
def test_blocks_that_mean_nothing(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    known = {
        "rewards": [{"name": "toy:reward"}, {"name": "toy:judge", "weight": 0.0}],
        "data": {"prompts": "toy:prompts", "evaluation": "toy:prompts"},
        "evaluation": {"every": 2},
    }
    with pytest.raises(RecipeError, match=message):
        build_parts(tmp_path, Bandit([0.0, 0.0]), **{**known, **changes})

"""Rewards: names, arguments, TRL's calling convention, and what may come back."""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.answers import answer, answer_format
from unified_rl.assemble import build_sampler
from unified_rl.errors import RecipeError
from unified_rl.imports import load_import
from unified_rl.policies import build_policy
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.schema import RewardBlock
from unified_rl.rewards.scoring import (
    LoadedReward,
    RewardFailedError,
    check_reward,
    check_rewards,
    list_rewards,
    load_rewards,
    reward_of,
    score,
)
from unified_rl.types import Completion, Messages, Prompt


def prompt(text: str | Messages = "p", images: Sequence[Any] = (), **columns: Any) -> Prompt:
    return Prompt(text=text, images=tuple(images), columns=columns, group_id=0, seed=0)


def said(text: str) -> Completion:
    return Completion(text=text, images=())


def loaded(function: Callable, weight: float = 1.0, name: str = "x", **arguments: Any) -> LoadedReward:
    return reward_of(function, name=name, weight=weight, **arguments)


def threads(*names: str) -> list[RewardBlock]:
    return [RewardBlock(name=name, isolation="thread") for name in names]


def judge(function: Callable, prompts: Sequence[Prompt] = (prompt(), prompt()), **arguments: Any) -> list[float]:
    """What one reward says of as many texts "0", "1", ... as there are prompts."""
    completions = [said(str(index)) for index in range(len(prompts))]
    return score([loaded(function, **arguments)], prompts, completions).breakdown["x"].tolist()


def returning(value: Any) -> Callable:
    return lambda prompts, completions, **columns: value


# --- finding ---


def test_the_projects_rewards_are_listed_and_exist() -> None:
    known = list_rewards()
    assert {"shapes_strict", "shapes_graded", "answer", "answer_format"} <= set(known)
    assert known["shapes_strict"] == "unified_rl.worlds.shapes:shapes_strict"
    check_rewards([RewardBlock(name=name) for name in known])
    functions = [name for name, place in known.items() if not inspect.isclass(load_import(place))]
    assert [reward.name for reward in load_rewards(threads(*functions))] == functions


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        check_reward(RewardBlock(name="shapes_strct"), 0)
    assert str(caught.value) == "rewards.0.name: no reward 'shapes_strct'; did you mean 'shapes_strict'?"
    with pytest.raises(RecipeError, match=r"^rewards\.3\.name: .*did you mean 'answer_format'\?$"):
        check_reward(RewardBlock(name="reward_models.answers:answer_fromat"), 3)
    with pytest.raises(RecipeError, match=r"add the name of its function, as in mine\.py:reward"):
        check_reward(RewardBlock(name="mine.py"), 0)


def test_names_in_metrics_are_unique() -> None:
    blocks = [RewardBlock(name="answer"), RewardBlock(name="reward_models.answers:answer")]
    for function in (check_rewards, load_rewards):
        with pytest.raises(RecipeError, match=r"^rewards\.1\.name: another reward is shown as 'answer'"):
            function(blocks)


def test_a_file_with_arguments(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(prompts, completions, scale=1.0, **columns): return [scale * len(t) for t in completions]"
    )
    (reward,) = load_rewards([RewardBlock(name=f"{path}:length", weight=0.5, arguments={"scale": 2})])
    assert (reward.name, reward.weight) == ("length", 0.5)
    scores = score([reward], [prompt(scale=9)], [said("abc")])
    assert scores.breakdown["length"].tolist() == [6.0], "arguments win over columns"
    assert scores.total.tolist() == [3.0]


def test_what_is_no_reward(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "number = 3\nclass Kind: ...\ndef foreign(pictures): ...\ndef strict(prompts, completions, scale=1): ...\n"
    )
    for name, arguments, message in [
        ("number", {}, r"^rewards\.0\.name: .*:number is a int; name a function"),
        ("Kind", {}, r"^rewards\.0\.name: objects of .*:Kind cannot be called"),
        ("foreign", {}, r"^rewards\.0\.name: .*:foreign has no parameter 'completions'"),
        ("strict", {"scal": 2}, r"^rewards\.0\.arguments\.scal: .* no such argument; did you mean 'scale'\?$"),
        ("strict", {"prompts": 2}, r"^rewards\.0\.arguments\.prompts: .* no such argument"),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_rewards([RewardBlock(name=f"{path}:{name}", arguments=arguments, isolation="thread")])


# --- calling ---


def test_a_reward_gets_the_columns_that_it_names() -> None:
    seen: dict[str, Any] = {}

    def named(prompts: list, completions: list, target: list, other: str = "default") -> list[float]:
        seen.update(prompts=prompts, completions=completions, target=target, other=other)
        return [0.0] * len(completions)

    judge(named, [prompt("a", target=1, unasked=2), prompt("b", target=None)])
    assert seen == {"prompts": ["a", "b"], "completions": ["0", "1"], "target": [1, None], "other": "default"}


def test_a_reward_with_keywords_gets_every_column() -> None:
    seen: dict[str, Any] = {}

    def greedy(completions: list, **columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * len(completions)

    picture = Image.new("RGB", (2, 2))
    judge(greedy, [prompt("a", [picture], left=1), prompt("b", right=2)])
    assert seen == {"prompts": ["a", "b"], "left": [1, None], "right": [None, 2], "images": [[picture], []]}
    seen.clear()
    judge(greedy, [prompt("a")])
    assert seen == {"prompts": ["a"]}, "no images column without condition images"


def test_a_completion_is_its_picture_its_pictures_or_its_text() -> None:
    seen: list[Any] = []

    def look(completions: list, **columns: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    one, two = Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))
    chat = prompt([{"role": "user", "content": "hello"}])
    completions = [
        Completion(text=None, images=(one,)),
        Completion(text="a thought", images=(one, two)),
        said("text"),
        said("reply"),
    ]
    score([loaded(look)], [prompt(), prompt(), prompt(), chat], completions)
    assert seen == [one, [one, two], "text", [{"role": "assistant", "content": "reply"}]]


def test_a_missing_column_is_named() -> None:
    def needy(prompts: list, completions: list, spec: list) -> list[float]:
        raise AssertionError("must not be called")

    with pytest.raises(RecipeError, match=r"^reward 'x' needs the column 'spec'; the data have: answer$"):
        judge(needy, [prompt(answer="a")])


def test_callable_objects() -> None:
    class Judge:
        def __call__(self, prompts: list, completions: list, target: list) -> list[float]:
            return [float(value) for value in target]

    assert judge(Judge(), [prompt(target=1), prompt(target=2)]) == [1.0, 2.0]


def test_coroutines_run_together() -> None:
    begun = []

    async def slow(completions: list, **columns: Any) -> list[float]:
        begun.append(completions)
        for _ in range(1000):
            if len(begun) == 2:
                break
            await asyncio.sleep(0.01)
        assert len(begun) == 2, "the other one has begun meanwhile"
        return [1.0] * len(completions)

    rewards = [loaded(slow, name="a"), loaded(returning([2.0, 3.0]), name="b"), loaded(slow, name="c")]
    scores = score(rewards, [prompt(), prompt()], [said("0"), said("1")])
    assert list(scores.breakdown) == ["a", "b", "c"]
    assert scores.total.tolist() == [4.0, 5.0]


def test_coroutines_run_inside_a_notebooks_event_loop() -> None:
    async def reward(completions: list, **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    async def cell() -> list[float]:
        return judge(reward)

    assert asyncio.run(cell()) == [1.0, 1.0]


def test_failures_carry_the_rewards_name() -> None:
    def broken(completions: list, **columns: Any) -> list[float]:
        raise KeyError("two\nlines")

    async def broken_later(completions: list, **columns: Any) -> list[float]:
        raise TimeoutError("no answer")

    with pytest.raises(RewardFailedError, match=r"^reward 'x' failed: KeyError: ") as caught:
        judge(broken)
    assert "\n" not in str(caught.value)
    with pytest.raises(RewardFailedError, match=r"^reward 'x' failed: TimeoutError: no answer$") as caught:
        judge(broken_later)
    assert not isinstance(caught.value, RecipeError), "the command line exits with 1: the code is wrong, not the recipe"


# --- what comes back ---


@pytest.mark.parametrize(
    "scores",
    [
        [True, 3],
        (1.0, 3.0),
        [np.float32(1), np.int64(3)],
        [np.bool_(True), Fraction(3)],
        np.array([1, 3]),
        torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
        [torch.tensor(1), torch.tensor(3.0, requires_grad=True)],
    ],
)
def test_numbers_of_every_kind(scores: Any) -> None:
    assert judge(returning(scores)) == [1.0, 3.0]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, np.nan, torch.tensor(math.inf), 1e300, 10**400])
def test_none_and_non_finite_exclude_the_sample(value: Any) -> None:
    first, second = judge(returning([value, 0.5]))
    assert math.isnan(first) and second == 0.5


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "returned 1 scores for 2 completions; return one (a number, or None to exclude it) per completion"),
        ([], "returned 0 scores for 2 completions"),
        (np.zeros(3), "returned 3 scores for 2 completions"),
        (None, "returned a NoneType, not a list of scores"),
        (1.0, "returned a float, not a list of scores"),
        (torch.tensor(1.0), "returned a Tensor, not a list of scores"),
        ("ab", "returned a str, not a list of scores"),
        ({"a": 1, "b": 2}, "returned a dict, not a list of scores"),
        ({1.0, 2.0}, "returned a set, not a list of scores"),
        ((score for score in (1.0, 2.0)), "returned a generator, not a list of scores"),
        ([1.0, "good"], "returned 'good' for completion 1; return one (a number"),
        ([[1.0], [2.0]], "returned [1.0] for completion 0"),
        (np.zeros((2, 1)), "returned array([0.]) for completion 0"),
        ([1j, 0], "returned 1j for completion 0"),
    ],
)
def test_anything_else_is_refused(scores: Any, message: str) -> None:
    with pytest.raises(RewardFailedError) as caught:
        judge(returning(scores))
    assert str(caught.value).startswith(f"reward 'x' {message}")


def test_the_total_is_the_weighted_sum_of_what_is_trained_on() -> None:
    rewards = [
        loaded(returning([1.0, None, 3.0, 4.0]), weight=2.0, name="a"),
        loaded(returning([0.5, 0.5, 0.5, math.nan]), weight=-1.0, name="b"),
        loaded(returning([None, 7.0, None, 7.0]), weight=0.0, name="measured"),
    ]
    scores = score(rewards, [prompt()] * 4, [said("")] * 4)
    nan = math.nan
    expected = {"a": [1.0, nan, 3.0, 4.0], "b": [0.5, 0.5, 0.5, nan], "measured": [nan, 7.0, nan, 7.0]}
    torch.testing.assert_close(scores.total, torch.tensor([1.5, nan, 5.5, nan]), equal_nan=True)
    assert list(scores.breakdown) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(scores.breakdown[name], torch.tensor(values), equal_nan=True)
    assert {scores.total.dtype, *(values.dtype for values in scores.breakdown.values())} == {torch.float32}


def test_no_completions_no_calls() -> None:
    scores = score([loaded(returning("never seen"))], [], [])
    assert scores.total.shape == scores.breakdown["x"].shape == (0,)


# --- answers ---


def test_answer_by_hand() -> None:
    replies = {
        "<answer>red</answer>": (1.0, 1.0),
        "<answer> Red\n</answer>\n": (1.0, 1.0),
        "<think>is it blue? no</think> <answer>red</answer>": (1.0, 1.0),
        "<think></think><answer>red</answer>": (1.0, 1.0),
        "<answer>blue</answer>": (0.0, 1.0),
        "<answer>red square</answer>": (0.0, 1.0),
        "<answer> </answer>": (0.0, 0.0),
        "red": (0.0, 0.0),
        "": (0.0, 0.0),
        "<answer>red": (0.0, 0.0),
        "so: <answer>red</answer>": (0.0, 0.0),
        "<answer>red</answer> I think": (0.0, 0.0),
        "<answer>red</answer><answer>blue</answer>": (0.0, 0.0),
        "<answer><answer>red</answer></answer>": (0.0, 0.0),
    }
    prompts = ["what colour?"] * len(replies)
    assert answer(prompts, list(replies), answer=["red"] * len(replies)) == [right for right, _ in replies.values()]
    assert answer_format(prompts, list(replies)) == [formed for _, formed in replies.values()]


def test_rewards_get_the_tokens_that_a_language_model_wrote() -> None:
    recipe = load_recipe("quickstart_vlm")
    prompts = build_sampler(recipe).rollout(0, rank=0, world_size=1)[:3]
    trajectory = build_policy(recipe, torch.device("cpu")).sample(prompts)

    def length(completion_ids: list[list[int]]) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    scores = score([loaded(length, name="length")], prompts, trajectory.completions)
    assert scores.total.tolist() == trajectory.segments["text"].loss_mask.sum(1).tolist()

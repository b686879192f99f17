"""The same scores under each project's own calling convention, with functions written as that project's users do."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from PIL import Image

from unified_rl.errors import RecipeError
from unified_rl.rewards.conventions import UniformReward, make_reward
from unified_rl.rewards.scoring import reward_of, score
from unified_rl.rewards.types import Judged, RewardBatch, RewardError
from unified_rl.types import Completion, Prompt


def uniform(target: Any, **arguments: Any) -> UniformReward:
    return make_reward(target, arguments, shown="mine", where="rewards.0", device="cpu")


def texts(*replies: str, groups: tuple[int, ...] = (), **columns: list) -> RewardBatch:
    return RewardBatch(
        prompts=[f"p{index}" for index in range(len(replies))],
        texts=list(replies),
        pictures=[[] for _ in replies],
        columns=columns,
        group_ids=groups or tuple(range(len(replies))),
    )


def grey(*levels: int, **columns: list) -> RewardBatch:
    """Plain pictures of 3 x 2 px."""
    return RewardBatch(
        prompts=["p"] * len(levels),
        texts=[None] * len(levels),
        pictures=[[Image.new("RGB", (3, 2), (level,) * 3)] for level in levels],
        columns=columns,
        group_ids=tuple(range(len(levels))),
    )


def ask(target: Any, batch: RewardBatch, convention: str, **arguments: Any) -> Judged:
    reward = uniform(target, **arguments)
    assert reward.convention == convention
    return reward.judge(batch)


def test_trl_with_its_metric_log() -> None:
    def accuracy(completions: list, answer: list, log_metric: Callable, **kwargs: Any) -> list[float | None]:
        log_metric("length", sum(map(len, completions)) / len(completions))
        return [float(reply == right) for reply, right in zip(completions, answer, strict=True)]

    judged = ask(accuracy, texts("a", "bcd", answer=["a", "x"]), "TRL")
    assert judged.values == [1.0, 0.0] and judged.metrics == {"length": 2.0}


def test_trl_with_token_ids_and_what_only_its_trainer_has() -> None:
    """The first example of TRL's documentation."""

    def longer(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    prompts = [Prompt(text="p", images=(), columns={}, group_id=row, seed=0) for row in range(2)]
    said = [Completion(text="a", images=(), tokens=(5, 6, 7)), Completion(text="b", images=(), tokens=(8,))]
    assert score([reward_of(longer, name="longer")], prompts, said).total.tolist() == [3.0, 1.0]

    def curriculum(completions: list, trainer_state: Any) -> list[float]:
        raise AssertionError

    with pytest.raises(RewardError, match="needs TRL's 'trainer_state', which is not given here"):
        uniform(curriculum).judge(texts("a"))


def test_verl_one_call_a_completion() -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict:
        if solution_str == "boom":
            raise ValueError("no")
        return {"score": float(solution_str == ground_truth), "long": len(solution_str), "source": data_source}

    columns = {"data_source": ["gsm8k"] * 3, "reward_model": [{"style": "rule", "ground_truth": "7"}] * 3}
    judged = ask(compute_score, texts("7", "boom", "18", **columns), "verl")
    assert judged.values[::2] == [1.0, 0.0] and judged.values[1] != judged.values[1], "the one that raises is excluded"
    assert judged.failures == {1: "ValueError: no"} and judged.metrics == {"long": 1.5}


def test_coroutines_share_one_event_loop_from_call_to_call() -> None:
    """As in TRL: a client with open connections, made once, belongs to the loop it was made in."""
    loops = []

    async def judged(completions: list, **columns: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [float(not loops[0].is_closed() and loops[0] is loops[-1])] * len(completions)

    reward = uniform(judged)
    assert [reward.judge(texts("a")).values for _ in range(2)] == [[1.0], [1.0]]


def test_verl_async_plain_number_and_arguments() -> None:
    async def compute_score(data_source: str, solution_str: str, ground_truth: str, scale: float) -> float:
        return scale * (solution_str == ground_truth)

    assert ask(compute_score, texts("1", "2", ground_truth=["1", "1"]), "verl", scale=3.0).values == [3.0, 0.0]


def test_verl_omni_gets_a_tensor_of_the_picture() -> None:
    def compute_score(data_source: str, solution_image: torch.Tensor, ground_truth: Any, extra_info: Any) -> dict:
        assert solution_image.shape == (3, 2, 3) and solution_image.dtype == torch.float32
        return {"score": float(solution_image.mean())}

    judged = ask(compute_score, grey(0, 51, ground_truth=["", ""]), "verl-omni")
    assert judged.values == pytest.approx([0.0, 0.2])

    def of_the_picture_alone(solution_image: torch.Tensor, extra_info: Any = None) -> float:
        return float(solution_image.mean())

    assert ask(of_the_picture_alone, grey(0, 255), "verl-omni").values == [0.0, 1.0], "no truth asked for, none needed"


def test_easyr1_batch_and_sequential() -> None:
    def compute_score(reward_inputs: list[dict[str, Any]]) -> list[dict[str, float]]:
        return [
            {"overall": 0.9 * (each["response"] == each["ground_truth"]) + 0.1, "format": each["response_length"]}
            for each in reward_inputs
        ]

    def compute_one(reward_input: dict[str, Any]) -> dict[str, float]:
        return compute_score([reward_input])[0]

    batch = texts("yes", "oh no", answer=["yes", "no"])
    for function, name in ((compute_score, "EasyR1"), (compute_one, "EasyR1 sequential")):
        judged = ask(function, batch, name)
        assert judged.values == [1.0, 0.1] and judged.metrics == {"format": 1.5}
    batch = texts("yes", "oh no", answer=["yes", "no"], completion_ids=[[1, 2], [3, 4, 5, 6]])
    assert ask(compute_score, batch, "EasyR1").metrics == {"format": 3.0}, "lengths in tokens where they are known"


def test_openrlhf() -> None:
    def reward_func(queries: list[str], prompts: list[str], labels: list[str], **kwargs: Any) -> dict[str, Any]:
        rewards = torch.tensor([float(q == p + l) for q, p, l in zip(queries, prompts, labels, strict=True)])  # noqa: E741
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"right": rewards}}

    def without_prompts(queries: list[str]) -> list[float]:
        return [float(len(query)) for query in queries]

    chat = replace(texts("a"), prompts=[[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]])
    assert ask(without_prompts, chat, "OpenRLHF").values == [len("user: hi" + "a")]
    judged = ask(reward_func, texts("a", "b", label=["a", "c"]), "OpenRLHF")
    assert judged.values == [1.0, 0.0] and judged.metrics == {"right": 0.5}


def test_flow_grpo_factory_and_its_combined_form() -> None:
    def brightness(device: str) -> Callable:
        assert device == "cpu"

        def _fn(images: torch.Tensor, prompts: list, metadata: list[dict]) -> tuple[Any, dict]:
            assert images.shape == (2, 3, 2, 3) and metadata == [{"tag": 1}, {"tag": 2}]
            scores = images.mean((1, 2, 3))
            return {"avg": scores, "half": scores / 2}, {}

        return _fn

    judged = ask(brightness, grey(0, 255, tag=[1, 2]), "flow_grpo")
    assert judged.values == [0.0, 1.0] and judged.metrics == {"half": 0.25}

    def jpeg(quality: int = 95) -> Callable:
        def _fn(images: torch.Tensor, prompts: list, metadata: list[dict]) -> tuple[Any, dict]:
            return images.mean((1, 2, 3)).numpy() * quality, {}

        return _fn

    assert ask(jpeg, grey(0, 255), "flow_grpo").values == [0.0, 95.0], "a factory without a device, as for JPEG sizes"
    assert ask(jpeg, grey(0, 255), "flow_grpo", quality=50).values == [0.0, 50.0]
    with pytest.raises(RecipeError, match="mine has no parameter 'completions', and makes no reward either"):
        uniform(lambda: 3)


@dataclass
class RewardModelOutput:
    rewards: Any
    extra_info: Any = None


class BaseRewardModel:
    """As in Flow-Factory, whose users derive their rewards from the two classes below."""

    use_tensor_inputs = False

    def __init__(self, config: Any, accelerator: Any) -> None:
        self.scale = config.extra_kwargs["scale"]
        assert config.device == accelerator.device == torch.device("cpu")


class PointwiseRewardModel(BaseRewardModel): ...


class GroupwiseRewardModel(BaseRewardModel): ...


def test_flow_factory_pointwise_and_groupwise() -> None:
    class Bright(PointwiseRewardModel):
        required_fields = ("prompt", "image")

        def __call__(self, prompt: list[str], image: list[Image.Image], **kwargs: Any) -> RewardModelOutput:
            return RewardModelOutput(rewards=torch.tensor([self.scale * each.getpixel((0, 0))[0] for each in image]))

    class Rank(GroupwiseRewardModel):
        required_fields = ("image",)

        def __call__(self, image: list[Image.Image], **kwargs: Any) -> RewardModelOutput:
            levels = [each.getpixel((0, 0))[0] for each in image]
            return RewardModelOutput(rewards=[sorted(levels).index(level) * self.scale for level in levels])

    class Bare:
        """Without Flow-Factory's own classes, which are not installed."""

        required_fields = ("image",)

        def __init__(self, config: Any, accelerator: Any) -> None: ...

        def __call__(self, image: list[Image.Image], **kwargs: Any) -> RewardModelOutput:
            return RewardModelOutput(rewards=[1.0] * len(image))

    assert ask(Bare, grey(0, 4), "Flow-Factory").values == [1.0, 1.0]
    assert ask(Bright, grey(0, 4), "Flow-Factory", scale=0.5).values == [0.0, 2.0]
    reward = uniform(Rank, scale=1.0)
    assert reward.groupwise
    batch = grey(9, 7, 1, 2)
    grouped = RewardBatch(
        prompts=batch.prompts, texts=batch.texts, pictures=batch.pictures, columns={}, group_ids=(5, 5, 6, 6)
    )
    assert reward.judge(grouped).values == [1.0, 0.0, 0.0, 1.0], "each group has its own ranking"


def test_a_function_may_ask_for_whole_groups() -> None:
    def centred(completions: list, **columns: Any) -> list[float]:
        mean = sum(map(float, completions)) / len(completions)
        return [float(each) - mean for each in completions]

    centred.groupwise = True  # type: ignore[attr-defined]
    batch = texts("1", "10", "3", "20", groups=(0, 1, 0, 1))
    assert uniform(centred).judge(batch).values == [-1.0, -5.0, 1.0, 5.0]


def test_pairwise_is_the_mean_win_rate() -> None:
    calls = []

    async def longer(prompts: list, first: list, second: list, bonus: list) -> list[float | None]:
        calls.append(list(zip(first, second, strict=True)))
        return [None if "?" in a + b else (len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in calls[-1]]

    batch = texts("a", "bbb", "cc", "dd", "?", groups=(0, 0, 0, 0, 1), bonus=[1] * 5)
    values = uniform(longer).judge(batch).values
    # wins: a loses all; bbb beats three; cc and dd beat a, tie with each other, lose to bbb
    assert values[:4] == [0.0, 1.0, 0.5, 0.5] and values[4] != values[4], "alone in its group: excluded"
    assert len(calls) == 1 and len(calls[0]) == 6, "each pair once"
    assert sorted(sum(pair[0] == each for pair in calls[0]) for each in ("a", "bbb", "cc", "dd")) == [1, 1, 2, 2]


def test_a_class_is_set_up_once_and_placed() -> None:
    class Judge:
        built: list[tuple] = []

        def __init__(self, scale: float, device: str = "nowhere") -> None:
            self.built.append((scale, device))
            self.scale = scale

        def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
            return [self.scale * len(each) for each in completions]

    reward = uniform(Judge, scale=2.0)
    assert reward.judge(texts("a", "bb")).values == [2.0, 4.0]
    assert reward.judge(texts("a")).values == [2.0]
    assert Judge.built == [(2.0, "cpu")]
    with pytest.raises(RecipeError, match=r"^rewards\.0\.arguments\.scal: mine has no such argument; did you mean 'sc"):
        uniform(Judge, scal=2.0)


def test_a_differentiable_reward_gets_a_tensor() -> None:
    def bright(prompts: list, completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return completions.mean((1, 2, 3))

    bright.differentiable = True  # type: ignore[attr-defined]
    assert uniform(bright).differentiable
    assert uniform(bright).judge(grey(0, 255)).values == [0.0, 1.0]
    with pytest.raises(RewardError, match="needs pictures"):
        uniform(bright).judge(texts("a"))


def test_what_the_data_lack_is_named() -> None:
    def compute_score(solution_str: str, ground_truth: str) -> float:
        raise AssertionError("must not be called")

    with pytest.raises(RewardError, match="needs the column 'ground_truth'; the data have: spec"):
        uniform(compute_score).judge(texts("a", spec=[1]))
    with pytest.raises(RewardError, match="judges texts"):
        uniform(compute_score).judge(grey(1, answer=["a"]))

"""Rewards that a rule can check, by hand."""

import pytest

from reward_models.boxes import box_iou, intersection_over_union, numbers_of, point_in_box
from reward_models.maths import MathAnswer
from reward_models.text_rules import json_format, multiple_choice, numeric_answer, repetition, soft_length, think_format


def prompts(completions: list) -> list[str]:
    return ["?"] * len(completions)


def test_numbers_and_choices() -> None:
    replies = ["so 3 and then 1,234.50", "-2e3.", "none", [{"role": "assistant", "content": "it is 7"}]]
    assert numeric_answer(prompts(replies), replies, answer=["1234.5", -2000, "1", "8"]) == [1.0, 1.0, 0.0, 0.0]
    assert (
        numeric_answer(["?"] * 5, ["5-3", "x is .5", "1,2,3", "1,000.", "12,34"], answer=[3, 0.5, 3, 1000, 34])
        == [1.0] * 5
    )
    replies = ["I think A, no: (B)", "Because", "C.", "B, because I saw it", "(C) shows a cat. A dog is not there"]
    assert multiple_choice(prompts(replies), replies, answer=["B", "B", "C", "B", "C"]) == [1.0, 0.0, 1.0, 1.0, 1.0]
    replies = ["The answer is (B), as A and C are wrong", r"so \boxed{D}. E?", "<answer>A</answer> I hope", "A"]
    assert multiple_choice(prompts(replies), replies, answer=["B", "(D)", "A", "A"]) == [1.0] * 4


def test_formats() -> None:
    replies = ["<think>so</think> 4", "<think></think> 4", "4", "<think>a</think>", "<think>a<think>b</think> c"]
    assert think_format(prompts(replies), replies) == [1.0, 0.0, 0.0, 0.0, 0.0]
    replies = ['{"a": 1}', '```json\n{"a": 1, "b": 2}\n```', "[1]", "{a: 1}", "[" * 100_000]
    assert json_format(prompts(replies), replies) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert json_format(prompts(replies), replies, keys=["a", "b"]) == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_length_and_repetition() -> None:
    replies = ["w " * count for count in (6, 8, 10, 99)]
    assert soft_length(prompts(replies), replies, longest=10, margin=4) == [0.0, -0.5, -1.0, -1.0]
    replies = ["a b c d", "A a a a a", "a b"]
    # five words have three 3-grams, all the same: two of three occurred before
    assert repetition(prompts(replies), replies) == pytest.approx([0.0, -2 / 3, 0.0])


def test_boxes_and_points() -> None:
    assert intersection_over_union([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)
    assert intersection_over_union([0, 0, 0, 0], [0, 0, 0, 0]) == 0.0
    assert numbers_of("[1, 2] or (0.5, -3) and [1, 2, 3]", 2) == [0.5, -3.0]
    replies = ["the box is [0, 0, 2, 2]", "[5, 5, 6, 6]", "nothing", "[0, 0, 4, 2]"]
    box = [[0, 0, 2, 2]] * 4
    assert box_iou(prompts(replies), replies, box=box) == [1.0, 0.0, 0.0, 0.5]
    assert box_iou(prompts(replies), replies, box=box, at_least=0.6)[3] == 0.0
    assert point_in_box(["?"] * 2, ["click (1, 1)", "click (3, 1)"], box=box[:2]) == [1.0, 0.0]


def test_mathematics_in_a_child_that_is_killed_when_late() -> None:
    judge = MathAnswer(seconds=20.0)
    replies = [r"so $\frac{1}{2}$", "the answer is 0.5", r"$x=3$", "no idea"]
    assert judge(prompts(replies), replies, answer=["0.5", r"\frac{1}{2}", "$3$", "1"]) == [1.0, 1.0, 1.0, 0.0]
    first = judge._child
    judge.seconds = 1e-6  # so that every comparison is late
    assert judge(["?"], ["$2$"], answer=["2"]) == [None]
    assert first is not None and first.poll() is not None
    judge.seconds = 20.0
    assert judge(["?"], ["$2$"], answer=["2"]) == [1.0], "a new child where the old one was killed"
    assert judge._child is not None and judge._child is not first
    judge._child.kill()  # as the kernel does when memory runs out
    judge._child.wait()
    assert judge(["?"], ["$2$"], answer=["2"]) == [1.0], "and where it has ended by itself"
    judge.close()

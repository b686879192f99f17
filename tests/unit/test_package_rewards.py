"""Rewards whose weights come inside packages, run for real where these are installed; objects and programs by rule."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from reward_models.classes import ImageClass, ImageClassJudge
from reward_models.code_tests import CodeTests, program
from reward_models.objects import ObjectCheck, conditions, relations
from reward_models.safety import safe_for_work


def test_image_classes_of_two_photographs_and_their_gradients() -> None:
    reward, judge = ImageClass(), ImageClassJudge()
    temple, flower = (
        torch.from_numpy(image.astype("float32") / 255).permute(2, 0, 1)[None] for image in load_sample_images().images
    )
    bell_cote, daisy = 442, 985
    for picture, right, wrong in ((temple, bell_cote, daisy), (flower, daisy, bell_cote)):
        scores = reward(["p", "p"], picture.expand(2, -1, -1, -1), label=[right, wrong])
        assert float(scores[0]) > 0.1 and float(scores[1]) < 0.01
        judged = judge(["p", "p"], picture.expand(2, -1, -1, -1), label=[right, wrong])
        assert float(judged[0]) > 0.03 and float(judged[0]) > 100 * float(judged[1])
    flower.requires_grad_()
    ImageClass(label=daisy, logarithm=True)(["p"], flower).sum().backward()
    assert flower.grad is not None
    with torch.no_grad():
        better = (flower + 0.02 * flower.grad.sign()).clamp(0, 1)
        assert float(reward(["p"], better, label=[daisy])) > 2 * float(reward(["p"], flower, label=[daisy]))


def test_a_plain_picture_is_safe_for_work() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert all(score > 0.5 for score in safe_for_work(["p"] * 2, [Image.new("RGB", (64, 64), "blue"), noise]))


def test_meanings_that_are_near() -> None:
    from reward_models.meaning import SameMeaning

    replies = ["a crimson fruit", "the annual tax report", "a red apple"]
    near, far, same = SameMeaning(batch_size=2)(["?"] * 3, replies, answer=["a red apple"] * 3)
    assert same == pytest.approx(1.0, abs=1e-4) and near > far + 0.2 and far < 0.3


def test_where_boxes_lie() -> None:
    assert relations([0, 0, 10, 10], [30, 0, 40, 10]) == {"left of"}
    assert relations([30, 0, 40, 10], [0, 0, 10, 10]) == {"right of"}
    assert relations([0, 0, 10, 10], [0, 40, 10, 50]) == {"above"}
    assert relations([30, 30, 40, 40], [0, 0, 10, 10]) == {"right of", "below"}
    assert relations([0, 0, 10, 10], [1, 1, 11, 11]) == set(), "too near: one tenth of both sizes is slack"
    # centres 4 apart, 2 of them slack: half of the distance is not more than half of it
    assert relations([0, 0, 10, 10], [4, 0, 14, 10]) == set()
    assert relations([0, 0, 10, 10], [4.1, 0, 14.1, 10]) == {"left of"}


def thing(name: str, left: float, color: str = "red", score: float = 0.9) -> dict[str, Any]:
    return {"class": name, "score": score, "box": [left, 0, left + 10, 10], "color": color}


def test_conditions_of_geneval() -> None:
    seen = [thing("cat", 0), thing("cat", 50, "black"), thing("dog", 90)]
    two_cats, one_black = {"class": "cat", "count": 2}, {"class": "cat", "count": 1, "color": "black"}
    assert conditions(seen, [two_cats], [{"class": "cat", "count": 3}]) == [True, True]
    assert conditions(seen, [{"class": "cat", "count": 2, "color": "black"}], []) == [False]
    right = {"class": "dog", "count": 1, "position": ["right of", 0]}
    assert conditions(seen, [two_cats, right], [{"class": "dog", "count": 1}]) == [True, True, True, False]
    left = {"class": "dog", "count": 1, "position": ["left of", 0]}
    assert conditions(seen, [two_cats, left], []) == [True, True, False]
    # of the surest objects only, as many as are asked for, and of all of these
    assert conditions([thing("cat", 0), thing("cat", 50, "black", score=0.8)], [one_black], []) == [False]
    assert conditions([thing("cat", 0, score=0.8), thing("cat", 50, "black")], [one_black], []) == [True]
    between = {"class": "dog", "count": 1, "position": ["right of", 0]}
    assert conditions([*seen[:2], thing("dog", 25)], [two_cats, between], []) == [True, True, False]
    assert conditions(seen, [one_black, right], []) == [False, True, False], "no cat that it could be right of"


def test_a_detector_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_detector.py").write_text(
        "def detect(picture):\n"
        "    box = [0, 0, *picture.size]\n"
        "    return [{'class': 'cat', 'score': 0.5, 'box': box}, {'class': 'dog', 'score': 0.1, 'box': box}]\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    asked = [[{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]]
    picture = [Image.new("RGB", (8, 8))]
    assert ObjectCheck("my_detector:detect")(["p"], picture, include=asked) == [0.5]
    assert ObjectCheck("my_detector:detect", strict=True)(["p"], picture, include=asked) == [0.0]
    assert ObjectCheck("my_detector:detect", threshold=0.05, strict=True)(["p"], picture, include=asked) == [1.0]
    counting = ObjectCheck("my_detector:detect")(["p"] * 2, picture * 2, include=asked * 2, tag=["counting", "colors"])
    assert counting == [0.0, 0.5], "counts want surer detections"


def test_programs_are_off_and_then_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="allow_execution: true"):
        CodeTests()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert program("text ```python\na = 1\n``` and\n```\nb = 2\n```") == "b = 2\n"
    judge = CodeTests(allow_execution=True, seconds=2.0, memory_mib=256)
    programs = {
        "```python\ndef f(x): return x + 1\n```": 1.0,
        "def f(x): return x": 0.0,
        "def f(x: return": 0.0,
        "while True: pass": 0.0,
        "hoard = 'x' * 10**9\ndef f(x): return x + 1": 0.0,
        "while True: print('flood' * 1000)": 0.0,
        "import os\nos.fork() or __import__('time').sleep(60)\ndef f(x): return x + 1": 1.0,  # and its child is killed
        "import os\nassert 'HF_TOKEN' not in os.environ\ndef f(x): return x + 1": 1.0,
        "import sys\nsys.exit(0)": 0.0,  # before the tests
        "import os\nos._exit(0)": 0.0,
        "open('big', 'wb').write(b'x' * 10**8)\ndef f(x): return x + 1": 0.0,
    }
    began = time.perf_counter()
    assert judge(["?"] * len(programs), list(programs), tests=["assert f(1) == 2"] * len(programs)) == list(
        programs.values()
    )
    assert time.perf_counter() - began < 25.0

"""Statistics of samples by hand, and the alarms that they give."""

import numpy as np
import pytest
from PIL import Image

from unified_rl.guard import alarms, statistics
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


def test_texts_by_hand() -> None:
    found = statistics(said("a b c d", "A a a a"))
    # triples: abc bcd, and aaa twice; pairs: ab bc cd aa aa aa
    assert found == {"length": 4.0, "repetition": pytest.approx(0.25), "distinct": pytest.approx(4 / 6)}
    assert statistics([]) == {}


def row(**changes: float) -> dict[str, float | None]:
    start = {"reward": 0.2, "rewards/ocr/mean": 0.2, "rewards/judge/mean": 0.5, "rewards/judge/std": 0.5}
    keys = {name.replace("__", "/"): value for name, value in changes.items()}
    return {**start, "stats/entropy": 4.0, "stats/edges": 0.01, "num_samples": 100.0, **keys}


def test_alarms() -> None:
    assert alarms(row(), row(reward=0.9, rewards__judge__mean=0.6, stats__entropy=2.1), ["ocr"]) == []
    (flat,) = alarms(row(), row(stats__entropy=1.9), ["ocr"])
    assert flat.startswith("the spread of grey levels went from 4 to 1.9")
    assert alarms(row(), row(stats__edges=0.04), ["ocr"]) == [], "four times a very small number is no alarm"
    (fell,) = alarms(row(), row(reward=0.9, rewards__judge__mean=0.39), ["ocr"])
    assert fell == "judge, which is not trained on, fell from 0.5 to 0.39 while the reward rose"
    assert alarms(row(), row(reward=0.9, rewards__judge__mean=0.41), ["ocr"]) == [], "within two standard errors"
    assert alarms(row(), row(reward=0.1, rewards__judge__mean=0.3), ["ocr"]) == [], "both fell: no exploit"

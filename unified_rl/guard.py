"""Does a rising reward mean better samples? What samples look like, against the base model's, at every evaluation.

A policy that exploits its reward gives itself away by what the reward does not measure: pictures turn flat, noisy,
garish or all alike, texts grow longer or repeat themselves, and a held-out judge falls while the trained one rises.
These numbers cost nothing, so they are always taken (`stats/*` in eval.jsonl); alarms go to events.jsonl and the
report.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from unified_rl.recipe.guard import Guard

if TYPE_CHECKING:  # torch, which the report, in need of the names below, does not load
    from unified_rl.types import Completion

SIDE = 64
"""Pictures are compared at this size at most."""
THUMBNAIL = 8
EDGE = 0.1
"""Difference of neighbouring pixels, of 1, that makes an edge."""
FACTOR = 2.0
"""How many times higher or lower than the base model's a statistic may be."""
LEAST = {
    "entropy": 0.5,
    "edges": 0.05,
    "high_frequencies": 0.05,
    "saturation": 0.1,
    "diversity": 0.05,
    "within_groups": 0.03,
    "length": 5.0,
    "repetition": 0.1,
    "distinct": 0.1,
}
"""Changes below this are never alarming, whatever their factor."""
MEANINGS = {
    "entropy": "the spread of grey levels",
    "edges": "the share of edges",
    "high_frequencies": "the energy of fine detail",
    "saturation": "the saturation of colours",
    "diversity": "the difference between samples",
    "within_groups": "the difference between samples of one prompt",
    "length": "the number of words",
    "repetition": "the share of repeated word triples",
    "distinct": "the share of different word pairs",
}


def statistics(completions: Sequence[Completion]) -> dict[str, float]:
    """Means over samples, by name; empty if there are none.

    Of pictures: `entropy` of 32 grey levels in bits, `edges` (share of pixels), `high_frequencies` (share of the
    spectrum's energy above half the highest frequency, the mean level left out), `saturation` (0 to 1), and
    `diversity`, the root mean square distance between thumbnails of different samples (0 to 1).
    Of texts: `length` in words, `repetition` (share of word triples that occurred before in the same text), `distinct`
    (different word pairs by all pairs).
    """
    seen = [completion.images[0] for completion in completions if completion.images]
    pictures = [each for each in seen if isinstance(each, Image.Image)]  # sound is not measured
    texts = [completion.text for completion in completions if completion.text is not None and not completion.images]
    return {**(_of_pictures(pictures) if pictures else {}), **(_of_texts(texts) if texts else {})}


def within_groups(completions: Sequence[Completion], group_ids: Sequence[int]) -> tuple[float, int]:
    """The root mean square distance between thumbnails of different pictures of one prompt (0 to 1), summed over the
    groups that have two pictures or more, and how many these are."""
    groups: dict[int, list[Image.Image]] = {}
    for completion, group in zip(completions, group_ids, strict=True):
        pictures = [each for each in completion.images[:1] if isinstance(each, Image.Image)]
        groups.setdefault(group, []).extend(pictures)
    spreads = [_spread([_thumbnail(each) for each in group]) for group in groups.values() if len(group) > 1]
    return sum(spreads), len(spreads)


def alarms(history: Sequence[Mapping[str, float | None]], trained: Sequence[str]) -> list[str]:
    """What the last evaluation says against the earlier ones.

    Args:
        history: the rows of eval.jsonl, that of the base model first.
        trained: the rewards with a weight other than 0; the others judge.
    """
    return [*odd_looks(history[0], history[-1]), *fallen_judges(history, trained)]


def odd_looks(base: Mapping[str, float | None], now: Mapping[str, float | None]) -> list[str]:
    """The statistics that are far from the base model's."""
    found = []
    for name, meaning in MEANINGS.items():
        before, after = base.get(f"stats/{name}"), now.get(f"stats/{name}")
        if before is None or after is None or abs(after - before) < LEAST[name]:
            continue
        if not before / FACTOR <= after <= before * FACTOR:
            found.append(f"{meaning} went from {before:.3g} to {after:.3g}: look whether the reward is being exploited")
    return found


def fallen_judges(history: Sequence[Mapping[str, float | None]], trained: Sequence[str]) -> list[str]:
    """The rewards that are not trained on and are lower than at their best evaluation so far, by more than two standard
    errors, while the trained reward is higher than it was then."""
    now, found = history[-1], []
    for key, value in now.items():
        name = key.removeprefix("rewards/").removesuffix("/mean")
        if not key.endswith("/mean") or name in trained or value is None:
            continue
        known = [(was, row) for row in history[:-1] if (was := row.get(key)) is not None]
        if not known:
            continue
        was, best = max(known, key=lambda pair: pair[0])
        reward, before = now.get("reward"), best.get("reward")
        spread = best.get(f"rewards/{name}/std")
        if reward is None or before is None or spread is None or reward <= before:
            continue
        noise = 2.0 * spread / math.sqrt(max(now.get("num_samples") or 1.0, 1.0))
        if was - value > max(noise, 1e-9):
            since = f" (step {best['step']})" if best is not history[0] else ""
            found.append(
                f"{name}, which is not trained on, fell from {was:.3g}{since} to {value:.3g} while the reward rose"
            )
    return found


def exploited(history: Sequence[Mapping[str, float | None]], trained: Sequence[str], guard: Guard) -> str:
    """Why the run has to end, as its recipe's guard asks; "" if it may go on. A function of the evaluations alone, so
    that a resumed run decides as an unbroken one."""
    if guard.action == "warn" or len(history) <= guard.patience:
        return ""
    look = alarms if guard.alarms == "all" else fallen_judges
    recent = [look(history[: len(history) - earlier], trained) for earlier in range(guard.patience)]
    return "; ".join(recent[0]) if all(recent) else ""


def _of_pictures(pictures: Sequence[Image.Image]) -> dict[str, float]:
    greys, saturations, thumbnails = [], [], []
    for picture in pictures:
        small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        colours = np.asarray(small, dtype=np.float64) / 255.0
        greys.append(colours.mean(-1))
        highest = colours.max(-1)
        saturations.append(float(((highest - colours.min(-1)) / np.maximum(highest, 1e-6)).mean()))
        thumbnails.append(_thumbnail(picture))
    return {
        "entropy": float(np.mean([_entropy(grey) for grey in greys])),
        "edges": float(np.mean([_edges(grey) for grey in greys])),
        "high_frequencies": float(np.mean([_high_frequencies(grey) for grey in greys])),
        "saturation": float(np.mean(saturations)),
        "diversity": _spread(thumbnails),
    }


def _thumbnail(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL)), dtype=np.float64) / 255.0


def _spread(thumbnails: Sequence[np.ndarray]) -> float:
    """The root mean square difference of different ones; of one alone 0."""
    stack = np.stack(thumbnails).reshape(len(thumbnails), -1)
    # mean |a - b|^2 over different pairs is twice the unbiased variance
    return float(np.sqrt(2.0 * stack.var(axis=0, ddof=1).mean())) if len(stack) > 1 else 0.0


def _entropy(grey: np.ndarray) -> float:
    shares = np.histogram(grey, bins=32, range=(0.0, 1.0))[0] / grey.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _edges(grey: np.ndarray) -> float:
    steps = [np.abs(np.diff(grey, axis=axis)) > EDGE for axis in (0, 1)]
    return float(np.mean([step.mean() for step in steps if step.size]))


def _high_frequencies(grey: np.ndarray) -> float:
    energy = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    rows, columns = (np.abs(np.fft.fftfreq(length)) for length in grey.shape)
    total = energy.sum()
    return float(energy[np.maximum.outer(rows, columns) > 0.25].sum() / total) if total > 1e-9 else 0.0


def _of_texts(texts: Sequence[str]) -> dict[str, float]:
    words = [text.lower().split() for text in texts]
    triples = [list(zip(each, each[1:], each[2:], strict=False)) for each in words]
    repeated = [1.0 - len(set(each)) / len(each) for each in triples if each]
    pairs = [pair for each in words for pair in itertools.pairwise(each)]
    return {
        "length": float(np.mean([len(each) for each in words])),
        "repetition": float(np.mean(repeated)) if repeated else 0.0,
        "distinct": len(set(pairs)) / len(pairs) if pairs else 1.0,
    }

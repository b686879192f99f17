"""Preference pairs and scored samples in files, which `train-reward` fits on.

A row has a `prompt` and either two samples (`chosen` and `rejected`, or `chosen_image` and `rejected_image`) or one
(`text` or `image`) with its `reward`.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_rl.data.sources import ImageCell, Row, load_rows
from unified_rl.errors import RecipeError

PAIR = ("chosen", "rejected")
FEWEST_ROWS = 20
FEWEST_PROMPTS = 10
"""From so many on, whole prompts are held out, else rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgements:
    """What people, or another judge, said about samples."""

    prompts: list[Any]
    completions: list[str | ImageCell]
    """Each sample once, with its prompt at the same place."""
    rows: list[tuple[int, ...]]
    """The places of the samples of each row: (chosen, rejected), or one sample."""
    scores: list[float] | None
    """Of each row; None: pairs."""

    @property
    def pictures(self) -> bool:
        """Whether the samples are pictures."""
        return isinstance(self.completions[0], ImageCell)

    def split(self, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Rows to fit on and rows to measure on, about `share` of all. Where there are enough prompts, no prompt is on
        both sides, so that what is measured holds for new ones."""
        prompts = [json.dumps(self.prompts[row[0]], sort_keys=True) for row in self.rows]
        keys = sorted(set(prompts))
        if len(keys) < FEWEST_PROMPTS:
            prompts = [str(row) for row in range(len(self.rows))]
            keys = list(prompts)
        random.Random(seed).shuffle(keys)
        kept_back: set[str] = set()
        for key in keys:
            if sum(prompt in kept_back for prompt in prompts) >= share * len(prompts):
                break
            kept_back.add(key)
        held_out = [row for row, prompt in enumerate(prompts) if prompt in kept_back]
        return [row for row, prompt in enumerate(prompts) if prompt not in kept_back], held_out


def load_judgements(file: Path) -> Judgements:
    """Read a .jsonl of pairs, or of scored samples.

    Raises:
        RecipeError: naming file:row, if a row is neither, or unlike the first; if there are too few.
    """
    if file.suffix != ".jsonl":
        raise RecipeError(f"DATA: {file} is no .jsonl of pairs or scored samples")
    rows = load_rows(str(file), "DATA")
    if len(rows) < FEWEST_ROWS:
        raise RecipeError(f"DATA: {file} has {len(rows)} rows; at least {FEWEST_ROWS} are needed to fit and measure")
    places: dict[str, int] = {}
    prompts: list[Any] = []
    completions: list[str | ImageCell] = []
    found, scores = [], []
    kinds = set()
    for number, row in enumerate(rows, start=1):
        place = f"DATA: {file}:{number}"
        samples, score = _read(row, place)
        kinds.add((type(samples[0]), score is None))
        if len(kinds) > 1:
            raise RecipeError(
                f"{place}: unlike the rows before; all are pairs or all scored, all pictures or all texts"
            )
        key_of = [json.dumps([row["prompt"], _name(sample, place)], sort_keys=True) for sample in samples]
        for key, sample in zip(key_of, samples, strict=True):
            if key not in places:
                places[key] = len(prompts)
                prompts.append(row["prompt"])
                completions.append(sample)
        found.append(tuple(places[key] for key in key_of))
        scores.append(score)
    known = [score for score in scores if score is not None]
    return Judgements(prompts=prompts, completions=completions, rows=found, scores=known or None)


def _read(row: Row, place: str) -> tuple[Sequence[str | ImageCell], float | None]:
    for names in (PAIR, tuple(f"{name}_image" for name in PAIR)):
        if any(name in row for name in names):
            if not all(isinstance(row.get(name), str | ImageCell) for name in names):
                raise RecipeError(f"{place}: a pair is chosen and rejected, or chosen_image and rejected_image")
            return [row[name] for name in names], None
    pictures, text, score = row.get("images", []), row.get("text"), row.get("reward")
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise RecipeError(f"{place}: neither chosen and rejected (or ..._image) nor a sample with a number as reward")
    samples = [text] if isinstance(text, str) else pictures
    if len(samples) != 1:
        raise RecipeError(f"{place}: a scored sample is one text or one image")
    return samples, float(score)


def _name(sample: str | ImageCell, place: str) -> Any:
    """What tells a sample from others of its prompt."""
    if not isinstance(sample, ImageCell):
        return sample
    return str(sample.value) if isinstance(sample.value, Path | str) else place


def described(judgements: Judgements, rows: Sequence[int]) -> str:
    """For instance "80 pairs of 20 prompts"."""
    prompts = {json.dumps(judgements.prompts[judgements.rows[row][0]], sort_keys=True) for row in rows}
    return f"{len(rows)} {'scores' if judgements.scores else 'pairs'} of {len(prompts)} prompts"

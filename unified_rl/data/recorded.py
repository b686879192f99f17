"""Recorded samples in place of a policy's own: a .jsonl, or a run's folder with recorded rollouts (`recorder`) or, if
it has none, samples.

A line has a `prompt` (text or chat messages) and either one sample (`text` or `image`, with its `reward`, or with
`rewards` by name as a run's folder has them) or two (`chosen` and `rejected`, or `chosen_image` and `rejected_image`).
`token_ids` with `log_probs` say what the sampler drew and how likely that was. Other columns go to rewards.
"""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_rl.data.prompts import PromptSampler, stable
from unified_rl.data.sources import ImageCell, image_cells, media_cells, media_columns
from unified_rl.errors import RecipeError
from unified_rl.recipe.schema import Recipe
from unified_rl.types import Prompt

OWN = {"text", "image", "images", "reward", "rewards", "token_ids", "log_probs", "seed", "condition_images"}
PAIR = ("chosen", "rejected")
PAIRED = (*PAIR, *(f"{name}_image" for name in PAIR))
TAKEN = {*OWN, *PAIRED}
"""Names that no column of a prompt can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSample:
    """What was once answered to a prompt."""

    text: str | None
    picture: ImageCell | None
    reward: float | None
    """None: the recipe's rewards judge it."""
    token_ids: Sequence[int] | None
    log_probs: Sequence[float] | None
    """Of the tokens, by the policy that drew them, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedGroup:
    """The samples of one prompt."""

    row: dict[str, Any]
    """As `data.prompts` has them."""
    samples: list[RecordedSample]


def load_recorded(source: str, weights: Mapping[str, float], group_size: int) -> list[RecordedGroup]:
    """Read recorded samples, by prompt.

    Args:
        source: a .jsonl, or a run's folder.
        weights: of the recipe's rewards, for lines with `rewards` by name.
        group_size: samples of a prompt that a rollout takes.

    Raises:
        RecipeError: naming file:line, if a line is wrong; if a prompt has fewer samples than a group.
    """
    files = _files(Path(source))
    groups: dict[str, RecordedGroup] = {}
    places: dict[str, str] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                place = f"data.rollouts: {file.name}:{number}"
                row, samples = _read(line, place, file.parent, weights)
                key = json.dumps(row, sort_keys=True, default=stable)
                groups.setdefault(key, RecordedGroup(row=row, samples=[])).samples.extend(samples)
                places.setdefault(key, place)
    if not groups:
        raise RecipeError(f"data.rollouts: {source} holds no samples")
    for key, group in groups.items():
        if len(group.samples) < group_size:
            raise RecipeError(
                f"{places[key]}: this prompt has {len(group.samples)} samples, group_size is {group_size}; lower it"
            )
    samples = [sample for group in groups.values() for sample in group.samples]
    if len({sample.log_probs is not None for sample in samples}) > 1:
        raise RecipeError("data.rollouts: some samples have log_probs and some have none; drop either")
    if len({sample.reward is not None for sample in samples}) > 1:
        raise RecipeError("data.rollouts: some samples have a reward and some have none; drop either")
    return list(groups.values())


def has_log_probs(groups: Sequence[RecordedGroup]) -> bool:
    """Whether the samples tell their log-probs (all of them do, or none)."""
    return groups[0].samples[0].log_probs is not None


def weights_of(recipe: Recipe) -> dict[str, float]:
    """The recipe's rewards as a run's folder names them, with their weights."""
    return {reward.shown_name: reward.weight for reward in recipe.rewards}


def check_recorded(recipe: Recipe, groups: Sequence[RecordedGroup]) -> None:
    """Make sure that the samples hold what the recipe's objectives need.

    Raises:
        RecipeError: if they do not.
    """
    by_steps = any("steps" in objective.kinds for objective in recipe.objective.values())
    if by_steps and not has_log_probs(groups):
        raise RecipeError(
            "data.rollouts: no log_probs, so a policy gradient cannot tell how far the policy has moved; use"
            " objective.method sft or dpo, or record them"
        )
    sample, family = groups[0].samples[0], recipe.policy.family
    if sample.reward is not None and any(each.advantage == "gdpo" for each in recipe.objective.values()):
        raise RecipeError(
            "data.rollouts: tells one reward a sample, and objective.advantage: gdpo normalises each reward by itself;"
            " use group_std, or leave the rewards out of the file and have the recipe's judge the samples"
        )
    if (sample.picture is not None) != (family == "diffusion"):
        held = "pictures" if sample.picture is not None else "texts"
        raise RecipeError(f"data.rollouts: holds {held}, which {family} policies do not make")


class RecordedSampler(PromptSampler):
    """The recorded prompts and samples of every rollout: functions of (seed, index), as `PromptSampler`'s are."""

    def __init__(self, groups: Sequence[RecordedGroup], *, seed: int, group_size: int, prompts_per_step: int) -> None:
        rows = [group.row for group in groups]
        super().__init__(rows, seed=seed, group_size=group_size, prompts_per_step=prompts_per_step)
        self._groups = groups

    @property
    def fingerprint(self) -> str:
        """A hash of all samples, to notice on resume that they are others."""
        return hashlib.sha256(f"{super().fingerprint}/{self._groups!r}".encode()).hexdigest()

    def samples(self, prompts: Sequence[Prompt], first: int) -> list[RecordedSample]:
        """The samples of some prompts of a rollout; those of a group are drawn without repetition.

        Args:
            first: the place of the first of them in the rollout, over all processes.
        """
        found = []
        for place, prompt in enumerate(prompts, start=first):
            known = self._groups[self.row_at(prompt.group_id)].samples
            order = random.Random(f"{self._seed}/{prompt.group_id}/samples").sample(range(len(known)), self._group_size)
            found.append(known[order[place % self._group_size]])
        return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("rollouts/rollout_*.jsonl")) or sorted(path.glob("samples/step_*/samples.jsonl"))
        if not files:
            raise RecipeError(f"data.rollouts: {path} is no run's folder with rollouts or samples")
        return files
    if not path.is_file():
        raise RecipeError(f"data.rollouts: no file {path}")
    if path.suffix != ".jsonl":
        raise RecipeError(f"data.rollouts: {path.name} is no .jsonl")
    return [path]


def _read(
    line: str, place: str, folder: Path, weights: Mapping[str, float]
) -> tuple[dict[str, Any], list[RecordedSample]]:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{place}: not JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("prompt"), str | list):
        raise RecipeError(f"{place}: needs an object with a prompt (text, or chat messages)")
    paired = [name for name in PAIRED if name in raw]
    row = {name: value for name, value in raw.items() if name not in OWN and name not in paired}
    conditions = raw.get("condition_images") or []
    if conditions:
        row["images"] = image_cells({"images": conditions}, place, folder)
    for name in media_columns(row):
        row[name] = media_cells(name, row[name], place, folder)
    if not paired:
        return row, [_sample(raw, place, folder, _reward(raw, place, weights))]
    if paired not in (list(PAIR), [f"{name}_image" for name in PAIR]):
        raise RecipeError(f"{place}: a pair is chosen and rejected, or chosen_image and rejected_image")
    kind = "image" if paired[0].endswith("_image") else "text"
    return row, [
        _sample({kind: raw[name]}, place, folder, reward) for name, reward in zip(paired, (1.0, 0.0), strict=True)
    ]


def _sample(raw: Mapping[str, Any], place: str, folder: Path, reward: float | None) -> RecordedSample:
    text, cells = raw.get("text"), image_cells(raw, place, folder)
    if (text is None) == (not cells) or len(cells) > 1:
        raise RecipeError(f"{place}: a sample is one text or one image")
    tokens, log_probs = raw.get("token_ids"), raw.get("log_probs")
    if (tokens is None) != (log_probs is None) or (tokens is not None and len(tokens) != len(log_probs or [])):
        raise RecipeError(f"{place}: token_ids and log_probs go together, one log-prob a token")
    return RecordedSample(
        text=text, picture=cells[0] if cells else None, reward=reward, token_ids=tokens, log_probs=log_probs
    )


def _reward(raw: Mapping[str, Any], place: str, weights: Mapping[str, float]) -> float | None:
    if "reward" in raw:
        value = raw["reward"]
        if value is None:
            return math.nan
        if not isinstance(value, int | float):
            raise RecipeError(f"{place}: reward {value!r} is no number")
        return float(value)
    known = raw.get("rewards")
    if known is None:
        return None
    missing = [name for name, weight in weights.items() if weight and name not in known]
    if missing:
        raise RecipeError(
            f"{place}: has no reward {missing[0]!r}, which has a weight in the recipe; it has {list(known)}"
        )
    values = {name: math.nan if value is None else value for name, value in known.items()}
    return sum(weight * values[name] for name, weight in weights.items() if weight)

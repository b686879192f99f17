"""`unified-rl train-reward`: a small head on frozen features, fitted on preference pairs or scores, saved as a reward.

Pairs: the Bradley-Terry likelihood (Christiano et al. 2017, arXiv:1706.03741, eq. 1), loss -log sigmoid(s_c - s_r).
Scores: the squared error. Both with a penalty on the head's weights, whose strength is chosen on a part of the fitted
rows; the rows that are held out are looked at once, in the end.
"""

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reward_models.features import Encoder, apply_head
from reward_models.learned import DESCRIPTION, FORMAT, HEAD
from unified_rl.data.sources import ImageCell
from unified_rl.errors import RecipeError
from unified_rl.imports import one_line
from unified_rl.rewards.preferences import FEWEST_ROWS, Judgements, described, load_judgements

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INNER_SHARE = 0.2
"""Of the fitted rows, to choose the penalty on."""
CHUNK = 256
"""Pictures that are decoded at a time."""
MAX_ITERATIONS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows to fit or to measure on."""

    features: Tensor
    """[N, D] float64 of all samples."""
    rows: Tensor
    """[R, 2] places of chosen and rejected, or [R, 1]."""
    scores: Tensor | None
    """[R], None: pairs."""

    def of(self, rows: Sequence[int]) -> "Table":
        """The same of some rows."""
        index = torch.tensor(list(rows))
        scores = None if self.scores is None else self.scores[index]
        return Table(features=self.features, rows=self.rows[index], scores=scores)

    def loss(self, tensors: dict[str, Tensor]) -> Tensor:
        """The mean over rows, []: -log sigmoid of the margin, or half the squared error."""
        found = apply_head(self.features[self.rows.flatten()], tensors).reshape(self.rows.shape)
        if self.scores is None:
            return torch.nn.functional.softplus(found[:, 1] - found[:, 0]).mean()
        return 0.5 * (found[:, 0] - self.scores).square().mean()


def train_reward_command(
    data: Path,
    output: Path,
    *,
    encoder: str,
    revision: str | None,
    hidden: int,
    held_out: float,
    use_prompt: bool,
    seed: int,
    device: str,
) -> int:
    """Fit a reward on `data`, print how right it is on held-out rows, and write it to `output`; returns the exit code.

    Args:
        encoder: see `reward_models.features`.
        hidden: units of a hidden layer; 0: a linear head.
        held_out: share of the rows that is measured on and not fitted.
        use_prompt: show the head the prompt's features too, if the encoder reads.

    Raises:
        RecipeError: for what is wrong with the data or the encoder, or an output that exists.
    """
    if not 0.0 < held_out < 1.0:
        raise RecipeError(f"--held-out: {held_out} is no share between 0 and 1")
    if output.exists():
        raise RecipeError(f"--output: {output} exists; give a new folder")
    judgements = load_judgements(data)
    fitted, measured = judgements.split(held_out, seed)
    if len(fitted) < FEWEST_ROWS // 2:
        raise RecipeError(f"--held-out: {held_out} leaves {len(fitted)} rows to fit on")
    keys = {"name": _located(encoder), "revision": revision, "use_prompt": use_prompt}
    encoding = _load_encoder(keys, device, judgements)
    table = Table(
        features=encode(encoding, judgements),
        rows=torch.tensor(judgements.rows),
        scores=None if judgements.scores is None else torch.tensor(judgements.scores, dtype=torch.float64),
    )
    tensors, penalty = fit(table, judgements, fitted, hidden=hidden, seed=seed)
    sides = {"fitted": fitted, "held_out": measured}
    numbers = {name: measure(table.of(rows), tensors) for name, rows in sides.items()}
    about = {
        "format": FORMAT,
        "objective": "regression" if judgements.scores else "bradley_terry",
        "encoder": {**keys, "dtype": "float32", "batch_size": encoding.batch_size},
        "hidden": hidden,
        "penalty": penalty,
        "seed": seed,
        "data": {"sha256": hashlib.sha256(data.read_bytes()).hexdigest(), "rows": len(judgements.rows)},
        **numbers,
    }
    save(output, about, tensors)
    lines = [
        ("features", f"{table.features.shape[1]} a sample, by {encoder}"),
        *((name.replace("_", " "), f"{described(judgements, sides[name])}: {told(numbers[name])}") for name in sides),
        ("penalty", f"{penalty:g}, chosen on a part of the fitted rows"),
        ("saved", f"{output}; try: unified-rl score --reward {_as_name(output)} FILE..."),
    ]
    sys.stdout.write("".join(f"{name:<10}{text}\n" for name, text in lines))
    return 0


def _load_encoder(keys: dict[str, Any], device: str, judgements: Judgements) -> Encoder:
    name = keys["name"]
    try:
        encoder = Encoder(**keys, device=device)
    except (ValueError, OSError, ImportError) as error:
        raise RecipeError(f"--encoder: {name}: {one_line(error)}") from error
    if judgements.pictures != (encoder.kind != "texts"):
        held = "pictures" if judgements.pictures else "texts"
        raise RecipeError(f"--encoder: {name} is for {'texts' if judgements.pictures else 'pictures'}, DATA has {held}")
    return encoder


def encode(encoder: Encoder, judgements: Judgements) -> Tensor:
    """[N, D] float64 of all samples; pictures are decoded a few at a time."""
    found = []
    for start in range(0, len(judgements.prompts), CHUNK):
        part = judgements.completions[start : start + CHUNK]
        shown = [sample.open() if isinstance(sample, ImageCell) else sample for sample in part]
        found.append(encoder(judgements.prompts[start : start + CHUNK], shown).cpu().double())
    return torch.cat(found)


def fit(
    table: Table, judgements: Judgements, rows: Sequence[int], *, hidden: int, seed: int
) -> tuple[dict[str, Tensor], float]:
    """The head of some rows, and its penalty, which is the best of PENALTIES on a part of them."""
    inner = Judgements(
        prompts=judgements.prompts,
        completions=judgements.completions,
        rows=[judgements.rows[row] for row in rows],
        scores=None if judgements.scores is None else [judgements.scores[row] for row in rows],
    )
    part, rest = (table.of([rows[row] for row in side]) for side in inner.split(INNER_SHARE, seed))
    losses = {each: float(rest.loss(fit_head(part, hidden, each, seed))) for each in PENALTIES}
    penalty = min(losses, key=lambda each: losses[each])
    return fit_head(table.of(rows), hidden, penalty, seed), penalty


def fit_head(table: Table, hidden: int, penalty: float, seed: int) -> dict[str, Tensor]:
    """The tensors of `apply_head` that minimise the loss plus penalty / 2 x the sum of squared weights, by L-BFGS."""
    seen = table.features[table.rows.flatten()]
    offset, scale = (0.0, 1.0)
    if table.scores is not None:
        offset, scale = float(table.scores.mean()), max(float(table.scores.std()), 1e-12)
        table = Table(features=table.features, rows=table.rows, scores=(table.scores - offset) / scale)
    fixed = {"mean": seen.mean(0), "std": seen.std(0).clamp(min=1e-6)}
    sizes = [seen.shape[1], hidden, 1] if hidden else [seen.shape[1], 1]
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Tensor] = {}
    for number, (width, out) in enumerate(itertools.pairwise(sizes)):
        start = torch.randn(out, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
        layers[f"layers.{number}.weight"] = (start if hidden else start * 0.0).requires_grad_()
        layers[f"layers.{number}.bias"] = torch.zeros(out, dtype=torch.float64, requires_grad=True)
    weights = [tensor for name, tensor in layers.items() if name.endswith("weight")]
    search = torch.optim.LBFGS(
        list(layers.values()), max_iter=MAX_ITERATIONS, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = table.loss({**fixed, **layers})
        value = value + 0.5 * penalty * torch.stack([weight.square().sum() for weight in weights]).sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    found = {**fixed, **{name: tensor.detach() for name, tensor in layers.items()}}
    last = f"layers.{len(sizes) - 2}"
    if table.scores is None:  # pairs leave the level open: the fitted samples' mean is 0
        found[f"{last}.bias"] = found[f"{last}.bias"] - apply_head(seen, found).mean()
        return found
    found[f"{last}.weight"] = found[f"{last}.weight"] * scale
    found[f"{last}.bias"] = found[f"{last}.bias"] * scale + offset
    return found


def measure(table: Table, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Of pairs `accuracy` (equal scores count half), with the ends of its 95 % interval; of scores `correlation`
    (Pearson) and `explained`, the share of their variance (below 0: worse than their mean)."""
    found = apply_head(table.features[table.rows.flatten()], tensors).reshape(table.rows.shape)
    num = len(found)
    if table.scores is None:
        margin = found[:, 0] - found[:, 1]
        share = float(((margin > 0).double() + 0.5 * (margin == 0).double()).mean())
        low, high = wilson(share, num)
        return {"accuracy": share, "low": low, "high": high, "loss": float(table.loss(tensors)), "rows": float(num)}
    error = float((found[:, 0] - table.scores).square().mean())
    spread = float(table.scores.var(unbiased=False))
    return {
        "correlation": float(torch.corrcoef(torch.stack([found[:, 0], table.scores]))[0, 1]),
        "explained": 1.0 - error / spread if spread > 0 else math.nan,
        "rows": float(num),
    }


def wilson(share: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of `num` trials (Wilson 1927)."""
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return centre - half, centre + half


def told(measured: dict[str, float]) -> str:
    """The numbers of `measure` in words."""
    if "accuracy" in measured:
        share, low, high = (100 * measured[name] for name in ("accuracy", "low", "high"))
        return f"{share:.1f} % of pairs right (95 %: {low:.1f} to {high:.1f}; chance 50)"
    return f"correlation {measured['correlation']:.3f}, {100 * measured['explained']:.1f} % of the variance explained"


def save(output: Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a reward's folder."""
    output.mkdir(parents=True)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, output / HEAD)
    (output / DESCRIPTION).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _located(encoder: str) -> str:
    """A folder by its full path, so that the reward finds it from anywhere; other names unchanged."""
    return str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder


def _as_name(output: Path) -> str:
    """How a recipe names a reward's folder: with a slash, so that it is not taken for an entry point."""
    return str(output) if "/" in str(output) else f"./{output}"

"""A run as one static page: what got better, by how much, and what it looks like; no script, nothing from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from unified_rl.errors import RecipeError
from unified_rl.guard import MEANINGS
from unified_rl.plain_text import redact
from unified_rl.recipe.reward import RewardBlock
from unified_rl.report import elements as el
from unified_rl.report.charts import NUM_COLOURS, Point, Series
from unified_rl.report.elements import Row
from unified_rl.run_folder.tracking import read_jsonl, sample_folders

NUM_PAIRS = 12
NUM_EXTREMES = 4
NUM_EVENTS = 200

TRAINING_CHARTS = (
    ("Reward", ("reward",), "Mean of the rollout; the band is one standard deviation over samples."),
    ("Loss", ("loss",), "Near zero and noisy by design: it is not what should fall."),
    ("KL from the reference", ("kl",), "How far the policy has moved."),
    ("Entropy", ("entropy",), "A fall to zero means that samples stop differing."),
    ("Clipped ratios", ("clip_fraction/low", "clip_fraction/high"), "Share of steps outside the trust region."),
    ("Mean ratio", ("ratio/mean",), "Should stay near 1."),
    (
        "Replay gap",
        ("replay_gap",),
        "Largest |log-prob - rollout log-prob| before the first update; should be about 0.",
    ),
    ("Gradient norm", ("grad_norm",), "Before clipping."),
    ("Groups without signal", ("frac_reward_zero_std",), "Share of prompts whose samples all got the same reward."),
    (
        "Seconds",
        ("time/rollout", "time/reward_work", "time/reward", "time/update"),
        "Rewards work while more is sampled (time/reward_work); time/reward is what is waited for after it. A rollout "
        "serves all of its updates.",
    ),
    ("Learning rate", ("lr",), ""),
    ("Samples a second", ("samples_per_second",), ""),
    ("Peak memory, MiB", ("memory/peak_mib",), ""),
)
"""(title, keys of metrics.jsonl, what it tells)."""
ONCE_A_ROLLOUT = ("replay_gap", "time/rollout", "time/reward_work", "time/reward", "samples_per_second")
"""Keys that only the first update of a rollout measures."""


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what the run has written so far, and return its path.

    Raises:
        RecipeError: if `run` is not a run's folder.
    """
    if not run.is_dir():
        raise RecipeError(f"{run}: no such folder")
    if not any((run / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "eval.jsonl")):
        raise RecipeError(f"{run}: not a run's folder (it has no recipe.yaml, metrics.jsonl or eval.jsonl)")
    metrics, evaluations = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "eval.jsonl")
    samples = [(step, folder, read_jsonl(folder / "samples.jsonl")) for step, folder in sample_folders(run)]
    samples = [(step, folder, rows) for step, folder, rows in samples if rows]
    recipe_text = (run / "recipe.yaml").read_text(encoding="utf-8") if (run / "recipe.yaml").is_file() else ""
    recipe = yaml.safe_load(recipe_text) or {}
    name = run.resolve().name
    events = read_jsonl(run / "events.jsonl")
    body = [
        _headline(name, recipe, metrics, evaluations) + _alarm(events),
        el.section("Held-out prompts", _evaluation_charts(evaluations)),
        el.section("Training", _training_charts(metrics)),
        el.section("Before and after", _gallery(samples)),
        el.section("Best and worst", _extremes(samples, _weights(recipe))),
        *([el.section("What samples look like", looks)] if (looks := _looks(evaluations)) else []),
        el.section("Events", _events(events), anchor="events"),
        el.section(
            "Recipe",
            f"<pre>{el.text(redact(recipe_text))}</pre>" if recipe_text else el.note("No recipe.yaml."),
        ),
    ]
    page = run / "report.html"
    page.write_text(el.page(name, "\n".join(body)), encoding="utf-8")
    return page


def _headline(name: str, recipe: Row, metrics: Sequence[Row], evaluations: Sequence[Row]) -> str:
    planned, weights = recipe.get("num_steps"), _weights(recipe)
    steps = max((row["step"] for row in metrics), default=0)
    told = f"{steps} of {planned} optimiser steps" if planned else f"{steps} optimiser steps"
    if metrics and metrics[-1].get("samples_seen") is not None:
        told += f", {metrics[-1]['samples_seen']:,.0f} samples"
    hours = sum(row.get("time/total") or 0.0 for row in metrics) / 3600
    told += f", {hours:.1f} h" if hours >= 1 else f", {hours * 60:.1f} min"
    tiles = "".join(
        _tile(key, evaluations, trained=weights.get(el.reward_label(key)) != 0) for key in el.reward_keys(evaluations)
    )
    shown = f'<div class="tiles">{tiles}</div>' if tiles else ""
    return f'<header><h1>{el.text(name)}</h1><div class="soft">{el.text(told)}</div>{shown}</header>'


def _alarm(events: Sequence[Row]) -> str:
    """The newest warning or error, and where the others are."""
    loud = [event for event in events if event["level"] != "info"]
    if not loud:
        return ""
    others = f" and {len(loud) - 1} more" if len(loud) > 1 else ""
    return (
        f'<p class="alarm">{el.text(redact(first_line(loud[-1]["message"])))}'
        f' <a href="#events">{el.text(loud[-1]["level"])}{others}: events</a></p>'
    )


def first_line(message: str) -> str:
    """What a message says; of a traceback, the error."""
    lines = message.strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _weights(recipe: Row) -> dict[str, float]:
    """The weights of a recipe's rewards, by the names that samples show them under."""
    return {RewardBlock(name=block["name"]).shown_name: block["weight"] for block in recipe.get("rewards", [])}


def _tile(key: str, evaluations: Sequence[Row], *, trained: bool) -> str:
    """Numbers of one reward on held-out prompts: the base model's, the newest, and their difference."""
    known = [(row["step"], row[key]) for row in evaluations if row.get(key) is not None]
    if not known:
        return ""
    kind = "held out" if trained else "held out, not trained on"
    label = f'<div class="soft">{el.text(el.reward_label(key))}, {kind}</div>'
    (first_step, first), (last_step, last) = known[0], known[-1]
    if len(known) == 1:
        return (
            f'<div class="tile">{label}<div class="value">{el.number(first)}</div>'
            f'<div class="soft">step {first_step}; no later evaluation yet</div></div>'
        )
    best_step, best = max(known, key=lambda pair: pair[1])
    delta = last - first
    tone = "good" if delta > 0 else "bad" if delta < 0 else "soft"
    origin = "base" if first_step == 0 else f"step {first_step}"
    return (
        f'<div class="tile">{label}<div class="value"><span class="was">{el.number(first)} &rarr;</span> '
        f'{el.number(last)}</div><div><span class="{tone}">{delta:+.3f}</span> <span class="soft">'
        f"{origin} to step {last_step}; best {el.number(best)} at step {best_step}</span></div></div>"
    )


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    points = [(row["step"], row.get(key)) for row in rows]
    if key not in ONCE_A_ROLLOUT:
        return points
    # 0 seconds, or nothing, is written for a rollout's later updates: the line connects the measured ones
    return [(step, value) for step, value in points if value is not None and (value or key == "replay_gap")]


def _evaluation_charts(evaluations: Sequence[Row]) -> str:
    keys = [key for key in el.reward_keys(evaluations) if any(row.get(key) is not None for row in evaluations)]
    if not keys:
        return el.note("No evaluation yet: set data.evaluation in the recipe, or wait for the first one.")
    number = evaluations[-1].get("num_samples")
    what = f"the same {number:.0f} prompts and seeds" if number is not None else "the same prompts and seeds"
    charts = [
        el.figure(el.reward_label(key), [Series(label=key, points=_points(evaluations, key), markers=True)], "")
        for key in keys
    ]
    return el.note(f"Every point: {what}; step 0 is the base model.") + f'<div class="charts">{"".join(charts)}</div>'


def _looks(evaluations: Sequence[Row]) -> str:
    """The statistics that no reward asks for (see `guard`)."""
    charts = [
        el.figure(meaning.capitalize(), [Series(label=name, points=_points(evaluations, key), markers=True)], "")
        for name, meaning in MEANINGS.items()
        if (key := f"stats/{name}") and any(row.get(key) is not None for row in evaluations)
    ]
    told = el.note(
        "Of the held-out samples. No reward asks for them: a jump may mean that the reward is being exploited."
    )
    return f'{told}<div class="charts">{"".join(charts)}</div>' if charts else ""


def _training_charts(metrics: Sequence[Row]) -> str:
    if not metrics:
        return el.note("No optimiser step yet.")
    charts, flat = [], []
    for title, keys, caption in TRAINING_CHARTS:
        values = {row[key] for key in keys for row in metrics if row.get(key) is not None}
        if values <= {0}:
            flat += [title] if values else []
            continue
        series = [Series(label=key, points=_points(metrics, key), band=_band(metrics, key)) for key in keys]
        charts.append(el.figure(title, series, caption))
        if title == "Reward":
            charts += _reward_charts(metrics)
    note = el.note(f"Always zero in this run: {el.text(', '.join(flat))}.") if flat else ""
    return f'<div class="charts">{"".join(charts)}</div>{note}'


def _reward_charts(metrics: Sequence[Row]) -> list[str]:
    keys = [key for key in el.reward_keys(metrics) if key != "reward"]
    if len(keys) < 2:
        return []
    groups = [keys[start : start + NUM_COLOURS] for start in range(0, len(keys), NUM_COLOURS)]
    return [
        el.figure(
            "Each reward", [Series(label=el.reward_label(key), points=_points(metrics, key)) for key in group], ""
        )
        for group in groups
        if any(row.get(key) is not None for row in metrics for key in group)
    ]


def _band(metrics: Sequence[Row], key: str) -> Sequence[float | None]:
    return [row.get("reward_std") for row in metrics] if key == "reward" else ()


Samples = Sequence[tuple[int, Path, Sequence[Row]]]


def _gallery(samples: Samples) -> str:
    """The same prompts and seeds at the first and at the last saved step."""
    if not samples:
        return el.note("No samples were saved yet.")
    if len(samples) == 1:
        step, folder, rows = samples[0]
        return el.note(f"Only samples of step {step} so far.") + _single_cards(folder, rows[:NUM_PAIRS])
    (first_step, first_folder, first), (last_step, last_folder, last) = samples[0], samples[-1]
    after = {(row["prompt"], row["seed"]): row for row in last}
    pairs = [(row, after[row["prompt"], row["seed"]]) for row in first if (row["prompt"], row["seed"]) in after]
    if not pairs:
        return el.note(f"The samples of steps {first_step} and {last_step} have no prompt and seed in common.")
    note = el.note(
        f"The same prompts and seeds at step {first_step}{' (base)' if not first_step else ''} and {last_step}."
    )
    shown = pairs[:NUM_PAIRS]
    if not any(row["images"] for pair in shown for row in pair):
        cells = [_text_row([first_folder, last_folder], pair) for pair in shown]
        return note + el.table(["prompt", "given", f"step {first_step}", f"step {last_step}"], cells)
    cards = [
        f'<div class="card"><div class="prompt">{el.text(before["prompt"])}</div>'
        f"{el.pictures(first_folder, before, 'condition_images')}"
        f'<div class="pair">{_side(first_folder, before, f"step {first_step}")}'
        f"{_side(last_folder, trained, f'step {last_step}')}</div></div>"
        for before, trained in shown
    ]
    return f'{note}<div class="cards">{"".join(cards)}</div>'


def _extremes(samples: Samples, weights: Mapping[str, float]) -> str:
    """The samples of the last saved step with the highest and lowest weighted sum of rewards."""
    if not samples:
        return el.note("No samples were saved yet.")
    step, folder, rows = samples[-1]
    ranked = sorted(rows, key=lambda row: _total(row, weights), reverse=True)
    count = min(NUM_EXTREMES, math.ceil(len(ranked) / 2))
    best, worst = ranked[:count], ranked[max(count, len(ranked) - NUM_EXTREMES) :]
    shown = f"<h3>Best of step {step}</h3>{_single_cards(folder, best)}"
    return shown + (f"<h3>Worst of step {step}</h3>{_single_cards(folder, worst[::-1])}" if worst else "")


def _total(row: Row, weights: Mapping[str, float]) -> float:
    """What a sample counts; rewards that the recipe does not name count once. Held-out rewards may be missing."""
    return sum(value * weights.get(name, 1.0) for name, value in row["rewards"].items() if value is not None)


def _single_cards(folder: Path, rows: Sequence[Row]) -> str:
    if not any(row["images"] for row in rows):
        return el.table(["prompt", "given", "completion"], [_text_row([folder], (row,)) for row in rows])
    cards = [
        f'<div class="card"><div class="prompt">{el.text(row["prompt"])}</div>{_side(folder, row, "")}</div>'
        for row in rows
    ]
    return f'<div class="cards single">{"".join(cards)}</div>'


def _side(folder: Path, row: Row, title: str) -> str:
    head = f'<div class="soft">{title}</div>' if title else ""
    text = f'<div class="text">{el.text(row["text"])}</div>' if row["text"] else ""
    return f"<div>{head}{el.pictures(folder, row, 'images')}{text}{el.rewards(row)}</div>"


def _text_row(folders: Sequence[Path], rows: Sequence[Row]) -> str:
    cells = [f'<td class="text">{el.text(rows[0]["prompt"])}</td>']
    cells.append(f"<td>{el.pictures(folders[0], rows[0], 'condition_images')}</td>")
    cells += [f'<td class="text">{el.text(row["text"] or "")}{el.rewards(row)}</td>' for row in rows]
    return f"<tr>{''.join(cells)}</tr>"


def _events(events: Sequence[Row]) -> str:
    if not events:
        return el.note("None.")
    rows = [
        f'<tr class="{el.text(event["level"])}"><td class="soft">{el.text(event["time"])}</td>'
        f'<td class="level">{el.text(event["level"])}</td>'
        f'<td class="text">{el.text(redact(event["message"]))}</td></tr>'
        for event in events[-NUM_EVENTS:]
    ]
    left_out = el.note(f"The newest {NUM_EVENTS} of {len(events)}.") if len(events) > NUM_EVENTS else ""
    return left_out + el.table(["time", "level", "message"], rows)

"""Several runs on one page: held-out curves over the samples that were drawn, what differs between the recipes, and
what the same prompts and seeds became. Runs that differ by nothing but their seed are one line with a band."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from unified_rl.errors import RecipeError
from unified_rl.recipe.file import load_recipe
from unified_rl.report import elements as el
from unified_rl.report.charts import NUM_COLOURS, Series
from unified_rl.report.elements import Row
from unified_rl.run_folder.tracking import read_jsonl, sample_folders

NUM_PROMPTS = 8
MAX_NAMED_KEYS = 2
"""With more differing keys than these, a line is called by its run's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a comparison needs of a run's folder."""

    path: Path
    seed: int
    keys: Mapping[str, Any]
    """Every key of the recipe but the seed, as "a.b.0.c"."""
    evaluations: Sequence[Row]
    samples_at: Mapping[int, float]
    """Samples that had been drawn at each optimiser step."""
    minutes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one recipe."""

    label: str
    runs: Sequence[Run]


def write_comparison(folders: Sequence[Path], page: Path) -> Path:
    """Write a page that compares the runs in `folders`, and return its path.

    Raises:
        RecipeError: if a folder is not that of a run with evaluations, or there are too many recipes to tell apart.
    """
    groups = group_runs([read_run(folder) for folder in folders])
    keys = el.reward_keys(row for group in groups for run in group.runs for row in run.evaluations)
    body = [
        f'<header><h1>{len(folders)} runs</h1><div class="soft">{el.text(", ".join(map(str, folders)))}</div></header>',
        el.section("Held-out prompts", _charts(groups, keys)),
        el.section("Base and trained", "".join(_numbers(groups, key) for key in keys)),
        el.section("What differs", _differences(groups)),
        el.section("The same prompts and seeds", _gallery(groups)),
    ]
    page.write_text(el.page("Comparison", "\n".join(body)), encoding="utf-8")
    return page


def read_run(folder: Path) -> Run:
    """
    Raises:
        RecipeError: if it is not a run's folder, or holds no evaluation.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder}: not a run's folder (it has no recipe.yaml)")
    evaluations, metrics = read_jsonl(folder / "eval.jsonl"), read_jsonl(folder / "metrics.jsonl")
    if not evaluations:
        raise RecipeError(f"{folder}: nothing to compare: it has no evaluation (data.evaluation in its recipe)")
    recipe = _recipe(folder / "recipe.yaml")
    return Run(
        path=folder,
        seed=recipe.pop("seed"),
        keys=flat(recipe),
        evaluations=evaluations,
        samples_at={0: 0.0} | {row["step"]: row["samples_seen"] for row in metrics},
        minutes=sum(row["time/total"] or 0.0 for row in metrics) / 60,
    )


def _recipe(file: Path) -> dict[str, Any]:
    """With the defaults of keys that did not exist when the run began; as it is written, if this version cannot read
    it."""
    try:
        return load_recipe(str(file)).model_dump(mode="json")
    except RecipeError:
        return yaml.safe_load(file.read_text(encoding="utf-8"))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by their path: {"a": [{"b": 1}]} is {"a.0.b": 1}."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, inner in items for key, leaf in flat(inner, f"{path}.{name}".lstrip(".")).items()}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs of the same recipe together, in the order in which they are given.

    Raises:
        RecipeError: if there are more recipes than colours.
    """
    together: list[list[Run]] = []
    for run in runs:
        mates = next((others for others in together if others[0].keys == run.keys), None)
        if mates is None:
            together.append([run])
        else:
            mates.append(run)
    if len(together) > NUM_COLOURS:
        raise RecipeError(f"{len(together)} different recipes: at most {NUM_COLOURS} can be told apart on one page")
    varied = differing_keys([mates[0] for mates in together])
    labels = [_label(mates[0], varied) for mates in together]
    if len(set(labels)) < len(labels):
        labels = [mates[0].path.name for mates in together]
    return [Group(label=label, runs=mates) for label, mates in zip(labels, together, strict=True)]


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys of the recipes that are not the same in all runs, in the order of the recipes."""
    every = {key: None for run in runs for key in run.keys}
    return [key for key in every if len({repr(run.keys.get(key)) for run in runs}) > 1]


def _label(run: Run, varied: Sequence[str]) -> str:
    if not 0 < len(varied) <= MAX_NAMED_KEYS:
        return run.path.name
    shown = [f"{key.rpartition('.')[2]}={str(run.keys.get(key)).rpartition('/')[2]}" for key in varied]
    return ", ".join(shown)


def _curve(run: Run, key: str) -> dict[float, float]:
    """The held-out value by the number of samples that were drawn before."""
    known = [(row["step"], row.get(key)) for row in run.evaluations]
    return {run.samples_at[step]: value for step, value in known if value is not None and step in run.samples_at}


def _charts(groups: Sequence[Group], keys: Sequence[str]) -> str:
    figures = []
    for key in keys:
        series = [_series(group, key) for group in groups]
        if any(one.points for one in series):
            figures.append(el.figure(el.reward_label(key), series, "", x_label="samples"))
    told = "Over the samples that were drawn; 0 is the base model. A band is one standard deviation over seeds."
    return el.note(told) + f'<div class="charts">{"".join(figures)}</div>'


def _series(group: Group, key: str) -> Series:
    curves = [_curve(run, key) for run in group.runs]
    shared = sorted(set.intersection(*map(set, curves)))
    values = [[curve[samples] for curve in curves] for samples in shared]
    return Series(
        label=group.label,
        points=[(samples, mean(row)) for samples, row in zip(shared, values, strict=True)],
        band=[stdev(row) for row in values] if len(curves) > 1 else (),
        markers=True,
    )


def _numbers(groups: Sequence[Group], key: str) -> str:
    rows = []
    for group in groups:
        curves = [list(_curve(run, key).values()) for run in group.runs]
        if not all(curves):
            continue
        gains = [curve[-1] - curve[0] for curve in curves]
        spread = f" &plusmn; {stdev(gains):.3f}" if len(gains) > 1 else ""
        tone = "good" if mean(gains) > 0 else "bad" if mean(gains) < 0 else "soft"
        cells = [
            ", ".join(str(run.seed) for run in group.runs),
            el.number(mean(curve[0] for curve in curves)),
            ", ".join(el.number(curve[-1]) for curve in curves),
            f'<span class="{tone}">{mean(gains):+.3f}</span>{spread}',
            el.number(mean(max(curve) for curve in curves)),
            f"{mean(max(run.samples_at.values()) for run in group.runs):,.0f}",
            f"{mean(run.minutes for run in group.runs):.1f}",
        ]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f'<tr><td class="text">{el.text(group.label)}</td>{numbers}</tr>')
    seeds = "seeds" if any(len(group.runs) > 1 for group in groups) else "seed"  # "seeds 0" would read as none
    titles = ["", seeds, "base", "last", "gain", "best", "samples", "minutes"]
    return f"<h3>{el.text(el.reward_label(key))}</h3>{el.table(titles, rows, numeric=True)}" if rows else ""


def _differences(groups: Sequence[Group]) -> str:
    varied = differing_keys([group.runs[0] for group in groups])
    if not varied:
        return el.note("Nothing but the seed.")
    rows = []
    for key in varied:
        values = "".join(f'<td class="text">{el.text(group.runs[0].keys.get(key, "-"))}</td>' for group in groups)
        rows.append(f'<tr><td class="text">{el.text(key)}</td>{values}</tr>')
    return el.table(["key", *(group.label for group in groups)], rows)


def _gallery(groups: Sequence[Group]) -> str:
    """What the first run of each group made of the prompts and seeds that all have in common."""
    columns = []
    for group in groups:
        saved = sample_folders(group.runs[0].path)
        columns += [(group.label, saved[0]), (group.label, saved[-1])] if saved else []
    by_prompt = [
        {(row["prompt"], row["seed"]): row for row in read_jsonl(folder / "samples.jsonl")}
        for _, (_, folder) in columns
    ]
    shared = [key for key in by_prompt[0] if all(key in rows for rows in by_prompt)] if by_prompt else []
    if not shared:
        return el.note("The runs saved no samples of the same prompts and seeds.")
    rows = []
    for key in shared[:NUM_PROMPTS]:
        cells = [
            f'<td class="text">{el.pictures(folder, row[key], "images")}{el.text(row[key]["text"] or "")}'
            f"{el.rewards(row[key])}</td>"
            for (_, (_, folder)), row in zip(columns, by_prompt, strict=True)
        ]
        rows.append(f'<tr><td class="text">{el.text(key[0])}</td>{"".join(cells)}</tr>')
    return el.table(["prompt", *(f"{label}, step {step}" for label, (step, _) in columns)], rows)

"""`unified-rl score`: what rewards say of pictures and texts that exist already."""

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from unified_rl.data.sources import ImageCell, Row, image_cells, load_rows
from unified_rl.errors import RecipeError
from unified_rl.imports import one_line
from unified_rl.recipe.reward import RewardBlock
from unified_rl.rewards.scoring import load_rewards, score
from unified_rl.types import Completion, Prompt

NOT_COLUMNS = ("prompt", "text", "completion", "images", "condition_images")


def score_command(names: Sequence[str], files: Sequence[Path], *, prompt: str, arguments: str) -> int:
    """Print one line a sample with the score of each reward, then their means; returns the exit code.

    Args:
        names: rewards, as in a recipe.
        files: pictures, or .jsonl files of rows with `prompt`, `text` (or `completion`) or generated `images`, the
            prompt's own pictures as `condition_images`, and the columns that the rewards need. The samples.jsonl of a
            run's folder is such a file.
        prompt: of the pictures.
        arguments: YAML of the keyword arguments, given to every reward.

    Raises:
        RecipeError: for what is wrong with a name, a file or an argument, or a reward that fails.
    """
    try:
        given = yaml.safe_load(arguments)
    except yaml.YAMLError as error:
        raise RecipeError(f"--arguments: {one_line(error)}") from error
    if not isinstance(given, dict):
        raise RecipeError(f"--arguments: {arguments!r} is no mapping; write '{{name: value}}'")
    samples = [sample for file in files for sample in _samples(file, prompt)]
    rewards = load_rewards([RewardBlock(name=name, arguments=given) for name in names])
    try:
        scores = score(
            rewards,
            [_prompt(row, index) for index, (_, row) in enumerate(samples)],
            [_completion(row, place) for place, row in samples],
        )
    finally:
        for reward in rewards:
            reward.runner.close()
    lines = ["\t".join([*scores.breakdown, "sample"])]
    for index, (place, _) in enumerate(samples):
        lines.append("\t".join([*(f"{values[index]:.4f}" for values in scores.breakdown.values()), place]))
    means = [f"{float(values.nanmean()):.4f}" for values in scores.breakdown.values()]
    lines.append("\t".join([*means, f"mean of {len(samples)}"]))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _samples(file: Path, prompt: str) -> list[tuple[str, Row]]:
    if file.suffix == ".jsonl":
        rows = enumerate(load_rows(str(file), "FILE"), start=1)
        return [(f"{file}:{number}", _with_conditions(row, f"{file}:{number}", file.parent)) for number, row in rows]
    if not file.is_file():
        raise RecipeError(f"{file}: no such file; give pictures, or .jsonl rows")
    return [(str(file), {"prompt": prompt, "images": [ImageCell(file, str(file))]})]


def _with_conditions(row: Row, place: str, folder: Path) -> Row:
    return {**row, "condition_images": image_cells({"images": row.get("condition_images")}, place, folder)}


def _prompt(row: Row, index: int) -> Prompt:
    columns = {name: value for name, value in row.items() if name not in NOT_COLUMNS}
    conditions = tuple(cell.open() for cell in row.get("condition_images", []))
    return Prompt(text=row["prompt"], images=conditions, columns=columns, group_id=index, seed=0)


def _completion(row: Row, place: str) -> Completion:
    text = row.get("text", row.get("completion"))
    pictures = tuple(cell.open() for cell in row.get("images", []))
    if text is None and not pictures:
        raise RecipeError(f"{place}: neither text (or completion) nor images in this row")
    return Completion(text=text, images=pictures)

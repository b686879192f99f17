"""Plans of scenes in words: where each object goes, cell by cell ("b2 red circle d4 blue square"). Prompts that ask for
one, and rewards that draw what a text plans and check the picture."""

from collections.abc import Sequence

from unified_rl.worlds import shapes

CELLS = tuple(f"{row}{col + 1}" for row in "abcd" for col in range(shapes.GRID))
"""Names of the grid's cells, row by row."""


def plan_of(things: Sequence[shapes.Thing]) -> str:
    """The plan of a scene."""
    placed = sorted(things, key=lambda thing: (thing.row, thing.col))
    return " ".join(f"{CELLS[thing.row * shapes.GRID + thing.col]} {thing.colour} {thing.shape}" for thing in placed)


def read_plan(text: str) -> list[shapes.Thing]:
    """The objects that a plan names, as far as it can be read."""
    words, things = text.split(), []
    for cell, colour, shape in zip(words[::3], words[1::3], words[2::3], strict=False):
        if cell in CELLS and colour in shapes.COLOURS and shape in shapes.SHAPES:
            row, col = divmod(CELLS.index(cell), shapes.GRID)
            things.append(shapes.Thing(shape=shape, colour=colour, row=row, col=col))
    return things


def _rows(split: shapes.Split) -> list[dict]:
    return [{**row, "prompt": f"{row['prompt']} :"} for row in shapes.drawing_prompts(split)]


def train() -> list[dict]:
    """Prompts to train on: columns `prompt`, `kind`, `spec`."""
    return _rows("train")


def heldout() -> list[dict]:
    """Prompts whose combinations never occur in `train`."""
    return _rows("heldout")


def strict(prompts: Sequence, completions: Sequence[str], *, spec: Sequence[shapes.Spec], **_) -> list[float]:
    """1 where the scene that a text plans is exactly what was asked, else 0."""
    return [shapes.strict(asked, shapes.render(read_plan(text))) for asked, text in zip(spec, completions, strict=True)]


def graded(prompts: Sequence, completions: Sequence[str], *, spec: Sequence[shapes.Spec], **_) -> list[float]:
    """The share of what was asked that the planned scene meets, 0 to 1."""
    return [shapes.graded(asked, shapes.render(read_plan(text))) for asked, text in zip(spec, completions, strict=True)]

"""Edits of the embedded world's pictures: recolour, reshape or move one object and leave everything else as it is.

A row holds the picture and either the mask of the cells that may change with a prompt that describes the picture asked
for, as inpainting pipelines want it, or an instruction, as editing models want it. Because the scene is known, the edit
is verified exactly: the asked object must be there, at an asked place, the kept objects where they were, and nothing
else. The unchanged picture never meets a row.
"""

import random
from collections.abc import Sequence

from PIL import Image

from unified_rl.worlds import shapes
from unified_rl.worlds.shapes import CANVAS, CELL, COLOURS, GRID, RELATIONS, SHAPES, Found, Split, Thing

Edit = dict
"""JSON-able: {"keep": [{"shape", "colour", "row", "col"}], "shape", "colour", "cells": [[row, col]]}."""
KINDS = ("recolour", "reshape", "move")
NUM_TRAIN = 2000
NUM_HELDOUT = 400
_CELLS = tuple((row, col) for row in range(GRID) for col in range(GRID))


def _cell(found: Found) -> tuple[int, int]:
    return int(found.y // CELL), int(found.x // CELL)


def conditions(edit: Edit, image: Image.Image) -> list[bool]:
    """What an edit asks for, condition by condition: the number of objects, the kept objects unchanged, then colour,
    shape and place of the edited object, which must be the only other one."""
    found = shapes.find_objects(image)
    kept = [(thing["shape"], thing["colour"], (thing["row"], thing["col"])) for thing in edit["keep"]]
    others = [thing for thing in found if (thing.shape, thing.colour, _cell(thing)) not in kept]
    alone = others[0] if len(others) == 1 else None
    cells = [tuple(cell) for cell in edit["cells"]]
    return [
        len(found) == len(kept) + 1,
        len(found) - len(others) == len(kept),
        alone is not None and alone.colour == edit["colour"],
        alone is not None and alone.shape == edit["shape"],
        alone is not None and _cell(alone) in cells,
    ]


def strict(edit: Edit, image: Image.Image) -> float:
    """1.0 if the edit is made and nothing else has changed, else 0.0."""
    return float(all(conditions(edit, image)))


def graded(edit: Edit, image: Image.Image) -> float:
    """Share of the conditions that are met, 0.0 to 1.0."""
    met = conditions(edit, image)
    return sum(met) / len(met)


def _mask(cells: Sequence[tuple[int, int]]) -> Image.Image:
    """White where the picture may change, black elsewhere; RGB, as pictures of a dataset are."""
    mask = Image.new("RGB", (CANVAS, CANVAS), "black")
    for row, col in cells:
        mask.paste("white", (col * CELL, row * CELL, (col + 1) * CELL, (row + 1) * CELL))
    return mask


def _related(first: tuple[int, int], second: tuple[int, int], relation: str) -> bool:
    return {
        "left of": first[1] < second[1],
        "right of": first[1] > second[1],
        "above": first[0] < second[0],
        "below": first[0] > second[0],
    }[relation]


def _draw(kind: str, rng: random.Random) -> dict:
    """One row of a kind, whatever its split."""
    (row, col), place = rng.sample(_CELLS, 2)
    looks = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    (shape, colour), other = rng.sample(looks, 2)
    kept = Thing(shape=other[0], colour=other[1], row=place[0], col=place[1])
    before, cells, relation = (shape, colour), [(row, col)], None
    if kind == "recolour":
        before = (shape, rng.choice([name for name in COLOURS if name != colour]))
    elif kind == "reshape":
        before = (rng.choice([name for name in SHAPES if name != shape]), colour)
    else:
        relation = rng.choice([name for name in RELATIONS if any(_related(cell, place, name) for cell in _CELLS)])
        cells = [cell for cell in _CELLS if _related(cell, place, relation)]
        row, col = rng.choice([cell for cell in _CELLS if cell not in (*cells, place)])
    target = {"colour": colour, "shape": shape, "count": 1}
    spec = {
        "objects": [target, {"colour": kept.colour, "shape": kept.shape, "count": 1}],
        "position": None,
        "relation": relation,
    }
    first = Thing(shape=before[0], colour=before[1], row=row, col=col)
    free = [cell for cell in _CELLS if cell != place] if kind == "move" else cells
    keep = [{"shape": kept.shape, "colour": kept.colour, "row": kept.row, "col": kept.col}]
    name = f"the {before[1]} {before[0]}"
    if kind == "recolour":
        instruction = f"make {name} {colour}"
    elif kind == "reshape":
        instruction = f"turn {name} into a {colour} {shape}"
    else:
        instruction = f"move {name} {relation} the {kept.colour} {kept.shape}"
    return {
        "prompt": shapes.caption(spec),
        "instruction": instruction,
        "image": shapes.render([first, kept]),
        "mask_image": _mask(free),
        "kind": kind,
        "edit": {"keep": keep, "shape": shape, "colour": colour, "cells": [list(cell) for cell in cells]},
    }


def edits(split: Split, num: int, *, seed: int = 0) -> list[dict]:
    """Rows of a split, kinds interleaved: columns `prompt`, `instruction`, `image`, `mask_image` (PIL), `kind`, `edit`.

    The split is by the prompt: held-out rows ask for combinations that no training row asks for.
    """
    rng = random.Random(f"{split}-{seed}")
    rows: list[dict] = []
    while len(rows) < num:
        row = _draw(KINDS[len(rows) % len(KINDS)], rng)
        if shapes.split_of(row["prompt"]) == split:
            rows.append(row)
    return rows


def instructions(split: Split, num: int, *, size: int = 512) -> list[dict]:
    """The same edits as instructions: columns `prompt`, `image` (PIL, `size` px, a multiple of 32), `kind`, `edit`."""
    return [
        {
            "prompt": row["instruction"],
            "image": row["image"].resize((size, size), Image.Resampling.NEAREST),
            "kind": row["kind"],
            "edit": row["edit"],
        }
        for row in edits(split, num)
    ]


def train_instructions() -> list[dict]:
    """Instructions to train editing models on."""
    return instructions("train", 600)


def heldout_instructions() -> list[dict]:
    """Instructions whose edits never occur in `train_instructions`."""
    return instructions("heldout", 120)


def train_edits() -> list[dict]:
    """Edits to train on."""
    return edits("train", NUM_TRAIN)


def heldout_edits() -> list[dict]:
    """Edits whose prompts never occur in `train_edits`."""
    return edits("heldout", NUM_HELDOUT)


def edit_strict(prompts: Sequence, completions: Sequence[Image.Image], *, edit: Sequence[Edit], **_) -> list[float]:
    """Reward: 1.0 where the asked edit is made and nothing else has changed, else 0.0."""
    return [strict(asked, image) for asked, image in zip(edit, completions, strict=True)]


def edit_graded(prompts: Sequence, completions: Sequence[Image.Image], *, edit: Sequence[Edit], **_) -> list[float]:
    """Reward: the share of the edit's conditions that a picture meets, 0.0 to 1.0."""
    return [graded(asked, image) for asked, image in zip(edit, completions, strict=True)]

"""The embedded world's edits: rows, masks and the exact check, on drawn pictures."""

import numpy as np
import pytest

from unified_rl.worlds import edits, shapes
from unified_rl.worlds.shapes import Thing

KEPT = {"shape": "square", "colour": "blue", "row": 0, "col": 3}
EDIT = {"keep": [KEPT], "shape": "circle", "colour": "red", "cells": [[2, 1], [3, 1]]}


def picture(*things: tuple[str, str, int, int]):
    return shapes.render([Thing(shape=shape, colour=colour, row=row, col=col) for shape, colour, row, col in things])


@pytest.mark.parametrize(
    ("things", "graded"),
    [
        ([("square", "blue", 0, 3), ("circle", "red", 2, 1)], 1.0),
        ([("square", "blue", 0, 3), ("circle", "red", 3, 1)], 1.0),
        ([("square", "blue", 0, 3), ("circle", "red", 0, 0)], 0.8),  # another place
        ([("square", "blue", 0, 3), ("circle", "green", 2, 1)], 0.8),
        ([("square", "blue", 0, 3), ("triangle", "green", 2, 1)], 0.6),
        ([("square", "blue", 0, 3)], 0.2),  # only the kept object is as it was
        ([("square", "blue", 0, 3), ("circle", "red", 2, 1), ("circle", "red", 0, 0)], 0.2),
        ([("square", "blue", 1, 3), ("circle", "red", 2, 1)], 0.2),  # the kept object moved
        ([], 0.0),
    ],
)
def test_conditions_of_an_edit(things: list, graded: float):
    assert edits.graded(EDIT, picture(*things)) == pytest.approx(graded)
    assert edits.strict(EDIT, picture(*things)) == float(graded == 1.0)


def test_rows_ask_for_what_they_verify():
    rows = edits.edits("train", 60)
    assert {row["kind"] for row in rows} == set(edits.KINDS)
    for row in rows:
        edit, mask = row["edit"], np.asarray(row["mask_image"])[:, :, 0] // 255
        assert edits.strict(edit, row["image"]) == 0.0, "the unchanged picture must not pass"
        for cell in edit["cells"]:
            thing = Thing(shape=edit["shape"], colour=edit["colour"], row=cell[0], col=cell[1])
            after = shapes.render([*(Thing(**kept) for kept in edit["keep"]), thing])
            assert edits.strict(edit, after) == 1.0
            changed = (np.asarray(after) != np.asarray(row["image"])).any(-1)
            assert not (changed & (mask == 0)).any(), "what must change lies inside the mask"
        if row["kind"] == "move":  # the prompt's relation holds wherever the object may go
            assert all(word in row["prompt"] for word in (edit["colour"], edit["shape"]))


def test_splits_share_no_prompt():
    train = {row["prompt"] for row in edits.train_edits()}
    assert not train & {row["prompt"] for row in edits.heldout_edits()}


def test_instructions_name_what_is_there_and_what_is_wanted():
    for row, full in zip(edits.instructions("heldout", 9, size=64), edits.edits("heldout", 9), strict=True):
        assert row["image"].size == (64, 64) and row["edit"] == full["edit"]
        words = {"recolour": "make the", "reshape": "turn the", "move": "move the"}[row["kind"]]
        assert row["prompt"].startswith(words)
        moved = [
            thing for thing in shapes.find_objects(full["image"]) if f"{thing.colour} {thing.shape}" in row["prompt"]
        ]
        assert moved, "the instruction names an object of the picture"


def test_rewards_over_a_batch():
    good, bad = picture(("square", "blue", 0, 3), ("circle", "red", 2, 1)), picture()
    assert edits.edit_strict(["p", "p"], [good, bad], edit=[EDIT, EDIT]) == [1.0, 0.0]
    assert edits.edit_graded(["p", "p"], [good, bad], edit=[EDIT, EDIT]) == [1.0, 0.0]

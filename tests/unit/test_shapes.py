"""The embedded world: its verifier, its splits and its questions, against ground truth."""

import itertools
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from unified_rl.worlds import shapes
from unified_rl.worlds.shapes import COLOURS, GRID, KINDS, NUMBERS, SHAPES, Spec, Thing

Wrong = Callable[[Spec, list[Thing], random.Random], list[Thing] | None]


def scenes(num: int, *, seed: int = 0) -> list[tuple[Spec, list[Thing]]]:
    """`num` specs of all kinds in turn, each with a scene that meets it."""
    rng = random.Random(seed)
    by_kind = {kind: shapes.specs(kind) for kind in KINDS}
    drawn = [rng.choice(by_kind[kind]) for kind in itertools.islice(itertools.cycle(KINDS), num)]
    return [(spec, shapes.scene_for(spec, rng)) for spec in drawn]


def changed(thing: Thing, **fields: object) -> Thing:
    """A copy of a thing with some fields replaced."""
    return Thing(**{"shape": thing.shape, "colour": thing.colour, "row": thing.row, "col": thing.col, **fields})


def wrong_colour(spec: Spec, things: list[Thing], rng: random.Random) -> list[Thing]:
    others = [colour for colour in COLOURS if colour != things[0].colour]
    return [changed(things[0], colour=rng.choice(others)), *things[1:]]


def wrong_shape(spec: Spec, things: list[Thing], rng: random.Random) -> list[Thing]:
    others = [shape for shape in SHAPES if shape != things[0].shape]
    return [changed(things[0], shape=rng.choice(others)), *things[1:]]


def one_less(spec: Spec, things: list[Thing], rng: random.Random) -> list[Thing]:
    return things[1:]


def one_more(spec: Spec, things: list[Thing], rng: random.Random) -> list[Thing]:
    taken = {(thing.row, thing.col) for thing in things}
    row, col = rng.choice([cell for cell in itertools.product(range(GRID), range(GRID)) if cell not in taken])
    return [*things, changed(rng.choice(things), row=row, col=col)]


def wrong_position(spec: Spec, things: list[Thing], rng: random.Random) -> list[Thing] | None:
    if spec["position"] is None:
        return None
    last = GRID - 1
    mirrored = {"col": last - things[0].col} if spec["position"] in ("left", "right") else {"row": last - things[0].row}
    return [changed(things[0], **mirrored)]


def wrong_relation(spec: Spec, things: list[Thing], rng: random.Random) -> list[Thing] | None:
    if spec["relation"] is None:
        return None
    first, second = things
    return [changed(first, row=second.row, col=second.col), changed(second, row=first.row, col=first.col)]


def test_verifier_accepts_ground_truth() -> None:
    verdicts = [shapes.strict(spec, shapes.render(things)) for spec, things in scenes(2000)]
    assert np.mean(verdicts) >= 0.995


def test_graded_is_one_on_ground_truth() -> None:
    assert np.mean([shapes.graded(spec, shapes.render(things)) for spec, things in scenes(200)]) == 1.0


@pytest.mark.parametrize("wrong", [wrong_colour, wrong_shape, one_less, one_more, wrong_position, wrong_relation])
def test_verifier_refuses_one_wrong_attribute(wrong: Wrong) -> None:
    rng = random.Random(1)
    pairs = [(spec, wrong(spec, things, rng)) for spec, things in scenes(1500, seed=1)]
    kept = [(spec, things) for spec, things in pairs if things is not None][:300]
    judged = [(spec, shapes.render(things)) for spec, things in kept]
    assert len(judged) == 300
    assert np.mean([shapes.strict(spec, image) == 0.0 for spec, image in judged]) >= 0.99
    assert all(shapes.graded(spec, image) < 1.0 for spec, image in judged)


def test_verdict_survives_noise() -> None:
    noise = np.random.default_rng(0)
    verdicts = []
    for spec, things in scenes(500, seed=2):
        pixels = np.asarray(shapes.render(things), dtype=np.float64)
        noisy = (pixels + noise.normal(0.0, 10.0, pixels.shape)).clip(0, 255).astype(np.uint8)
        verdicts.append(shapes.strict(spec, Image.fromarray(noisy)))
    assert np.mean(verdicts) >= 0.99


@pytest.mark.parametrize("size", [64, 128])
def test_other_sizes(size: int) -> None:
    for spec, things in scenes(100, seed=3):
        image = shapes.render(things, size=size)
        assert image.size == (size, size)
        assert shapes.strict(spec, image) == 1.0
        assert shapes.strict(spec, shapes.render(one_less(spec, things, random.Random(0)), size=size)) == 0.0


def test_sizes_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        shapes.render([], size=48)


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_blank_picture_earns_nothing(grey: int) -> None:
    blank = Image.new("RGB", (32, 32), (grey,) * 3)
    specs = [shapes.specs(kind)[0] for kind in KINDS]
    assert [shapes.strict(spec, blank) for spec in specs] == [0.0] * len(KINDS)
    assert [shapes.graded(spec, blank) for spec in specs] == [0.0] * len(KINDS)


def test_graded_counts_the_conditions_met() -> None:
    spec = {"objects": [{"colour": "red", "shape": "circle", "count": 2}], "position": None, "relation": None}
    one = [Thing(shape="circle", colour="red", row=0, col=0)]
    blue = [Thing(shape="circle", colour="blue", row=0, col=0), Thing(shape="circle", colour="blue", row=2, col=2)]
    # number of objects, their colours, their shapes, number of each kind
    assert shapes.conditions(spec, shapes.render(one)) == [False, True, True, False]
    assert shapes.conditions(spec, shapes.render(blue)) == [True, False, True, False]
    assert shapes.graded(spec, shapes.render(one)) == 2 / 4


def test_drawing_everything_earns_little() -> None:
    cells = [(row, col) for row in range(4) for col in range(4)]
    kinds = [(colour, shape) for colour in shapes.COLOURS for shape in shapes.SHAPES]
    crowd = [
        Thing(shape=shape, colour=colour, row=row, col=col)
        for (colour, shape), (row, col) in zip(kinds, cells, strict=False)
    ]
    for kind in ("single", "position", "count"):
        assert all(shapes.graded(spec, shapes.render(crowd)) <= 1 / 4 for spec in shapes.specs(kind))


def test_captions() -> None:
    red = {"colour": "red", "shape": "circle", "count": 1}
    blue = {"colour": "blue", "shape": "square", "count": 1}
    three = {"colour": "green", "shape": "triangle", "count": 3}
    said = [
        shapes.caption({"objects": [red], "position": "top", "relation": None}),
        shapes.caption({"objects": [three], "position": None, "relation": None}),
        shapes.caption({"objects": [red, blue], "position": None, "relation": None}),
        shapes.caption({"objects": [red, blue], "position": None, "relation": "left of"}),
    ]
    assert said == [
        "a red circle at the top",
        "three green triangles",
        "a red circle and a blue square",
        "a red circle left of a blue square",
    ]


def test_one_combination_however_worded() -> None:
    red = {"colour": "red", "shape": "circle", "count": 1}
    blue = {"colour": "blue", "shape": "square", "count": 1}
    for relation, inverse in (("left of", "right of"), ("above", "below")):
        said = {"objects": [red, blue], "position": None, "relation": relation}
        turned = {"objects": [blue, red], "position": None, "relation": inverse}
        assert shapes.combination(said) == shapes.combination(turned)
        assert shapes.combination(said) != shapes.combination({**said, "relation": inverse})
    pair = {"objects": [red, blue], "position": None, "relation": None}
    assert shapes.combination(pair) == shapes.combination({**pair, "objects": [blue, red]})


def test_drawing_splits_are_disjoint_and_cover_all_kinds() -> None:
    train, heldout = shapes.train_drawing(), shapes.heldout_drawing()
    combinations = [{shapes.combination(row["spec"]) for row in rows} for rows in (train, heldout)]
    assert not combinations[0] & combinations[1]
    assert combinations[0] | combinations[1] == {shapes.combination(s) for kind in KINDS for s in shapes.specs(kind)}
    assert {row["kind"] for row in train} == {row["kind"] for row in heldout} == set(KINDS)
    for rows in (train, heldout):
        assert set(Counter(row["kind"] for row in rows).values()) == {len(rows) // len(KINDS)}


def test_everything_is_deterministic() -> None:
    assert shapes.train_drawing() == shapes.train_drawing()
    first, second = shapes.questions("train", 20, seed=3), shapes.questions("train", 20, seed=3)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert [row["image"].tobytes() for row in first] == [row["image"].tobytes() for row in second]
    other = shapes.questions("train", 20, seed=4)
    assert [row["image"].tobytes() for row in first] != [row["image"].tobytes() for row in other]


def answer_from_picture(question: str, image: Image.Image) -> str:
    """The answer to a question as the verifier sees the picture."""
    found = shapes.find_objects(image)
    if question.startswith("how many"):
        return NUMBERS[len(found)]
    words = question.split()
    if question.startswith("what colour"):
        (thing,) = [thing for thing in found if thing.shape == words[4]]
        return str(thing.colour)
    if question.startswith("what shape"):
        (thing,) = [thing for thing in found if thing.colour == words[3]]
        return str(thing.shape)
    (thing,) = found
    assert thing.shape == words[2]
    if words[3] == "left":
        return "left" if thing.x < shapes.CANVAS / 2 else "right"
    return "top" if thing.y < shapes.CANVAS / 2 else "bottom"


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("size", [32, 64])
def test_answers_are_right(split: shapes.Split, size: int) -> None:
    rows = shapes.questions(split, 300, size=size)
    assert {row["kind"] for row in rows} == {"count", "colour", "shape", "side"}
    for row in rows:
        assert row["image"].size == (size, size)
        assert answer_from_picture(row["prompt"], row["image"]) == row["answer"]


def test_question_splits_never_share_a_question_on_the_same_objects() -> None:
    def asked(row: dict) -> str:
        found = sorted((thing.shape, thing.colour) for thing in shapes.find_objects(row["image"]))
        return f"{row['prompt']} {found}"

    train = {asked(row) for row in shapes.train_questions(1500)}
    heldout = {asked(row) for row in shapes.heldout_questions(256)}
    assert not train & heldout


def test_rewards_judge_each_picture_by_its_own_spec() -> None:
    (first, things), (second, _) = scenes(2, seed=5)
    image = shapes.render(things)
    prompts = [shapes.caption(first), shapes.caption(second)]
    assert shapes.shapes_strict(prompts, [image, image], spec=[first, second]) == [1.0, 0.0]
    graded = shapes.shapes_graded(prompts, [image, image], spec=[first, second], kind=["single", "position"])
    assert graded[0] == 1.0 and graded[1] < 1.0

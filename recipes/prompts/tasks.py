"""Small tasks with exact answers, to try the recipes for language models with: a recipe names a function as its data.

Each row has a `prompt`, its picture if the task has one, and the column that the recipe's reward compares with.
"""

import random

from PIL import Image, ImageDraw

from unified_rl.worlds import shapes

THINK = "First think within <think> </think> tags, then give the final answer"
TRIPLES = ((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29), (9, 40, 41))
SIDE = 336


def train_triangles() -> list[dict]:
    """Right triangles to train on; columns `image`, `answer`."""
    return _triangles(64, seed=0)


def heldout_triangles() -> list[dict]:
    """Other ones."""
    return _triangles(32, seed=1)


def train_boxes() -> list[dict]:
    """Objects to be found in scenes; columns `image`, `box` [x0, y0, x1, y1] in pixels."""
    return _boxes(64, seed=0)


def heldout_boxes() -> list[dict]:
    """Other scenes."""
    return _boxes(32, seed=1)


def train_sums() -> list[dict]:
    """Word problems; column `answer`."""
    return _sums(64, seed=0)


def heldout_sums() -> list[dict]:
    """Other ones."""
    return _sums(32, seed=1)


def _triangles(num: int, seed: int) -> list[dict]:
    rng, rows = random.Random(seed), []
    for _ in range(num):
        factor = rng.randint(1, 9)
        sides = [side * factor for side in rng.choice(TRIPLES)]
        hidden = rng.randrange(3)
        image = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(image)
        draw.polygon([(48, 48), (48, 288), (288, 288)], outline="black", width=3)
        for index, place in enumerate(((16, 160), (160, 300), (176, 150))):
            draw.text(place, "x" if index == hidden else str(sides[index]), fill="black", font_size=20)
        asked = rf"Find x in the right triangle. {THINK} in \boxed{{}}."
        rows.append({"prompt": asked, "image": image, "answer": str(sides[hidden])})
    return rows


def _boxes(num: int, seed: int) -> list[dict]:
    rows: list[dict] = []
    scale = SIDE // shapes.CANVAS
    for row in shapes.questions("train", 4 * num, seed=100 + seed, size=scale * shapes.CANVAS):
        found = shapes.find_objects(row["image"])
        names = [f"{thing.colour} {thing.shape}" for thing in found]
        alone = [thing for thing, name in zip(found, names, strict=True) if names.count(name) == 1]
        if alone and len(rows) < num:
            half = shapes.CELL / 2
            thing = alone[0]
            box = [round(scale * edge) for edge in (thing.x - half, thing.y - half, thing.x + half, thing.y + half)]
            asked = f"Where is the {thing.colour} {thing.shape}? {THINK} as a box in pixels, [x0, y0, x1, y1]."
            rows.append({"prompt": asked, "image": row["image"], "box": box})
    return rows


def _sums(num: int, seed: int) -> list[dict]:
    rng, rows = random.Random(seed), []
    for _ in range(num):
        boxes, each, eaten = rng.randint(2, 12), rng.randint(3, 20), rng.randint(1, 6)
        asked = f"There are {boxes} boxes of {each} apples; {eaten} apples are eaten. How many are left?"
        rows.append({"prompt": rf"{asked} {THINK} in \boxed{{}}.", "answer": str(boxes * each - eaten)})
    return rows

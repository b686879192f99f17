"""The embedded world: coloured shapes on a black 4 x 4 grid, with exact answers.

From one scene come a text-to-image prompt with a programmatic verifier and visual questions with their answers, so that
image generators and vision-language models are trained offline on verifiable rewards without any labels.

Left out on purpose: anti-aliasing, overlaps and sub-pixel positions. Objects sit in integer-aligned boxes, which makes
the verifier exact on ground truth. Prompts and questions are split into `train` and `heldout` by a hash of the asked
*combination* (shapes, colours, count, position, relation), so that the two splits never share one.
"""

import hashlib
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "heldout"]
Spec = dict  # JSON-able: {"objects": [{"colour", "shape", "count"}], "position": str | None, "relation": str | None}

CANVAS = 32
GRID = 4
CELL = CANVAS // GRID
BOX = CELL - 1  # one blank pixel keeps neighbours of the same colour apart
COLOURS = {
    "red": (235, 45, 45),
    "green": (45, 205, 60),
    "blue": (50, 80, 245),
    "yellow": (240, 220, 40),
    "purple": (190, 50, 215),
}
SHAPES = ("circle", "square", "triangle")
POSITIONS = ("left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("single", "position", "count", "pair", "relation")
MIN_AREA = 9
"""Components below this number of pixels are specks of noise, not objects."""
MIN_IOU = 0.7
MIN_BRIGHTNESS = 90
MIN_COSINE = 0.93


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object. `row` and `col` are grid cells, 0 to 3, counted from the top left."""

    shape: str
    colour: str
    row: int
    col: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One object that the verifier saw. `shape` or `colour` is None if it is none of the world's."""

    shape: str | None
    colour: str | None
    x: float
    """Centre of the bounding box in pixels of the 32 px canvas."""
    y: float


def _template(shape: str, height: int, width: int) -> np.ndarray:
    """Boolean mask [height, width] of a shape that fills its box."""
    ys = (np.arange(height) + 0.5) / height
    xs = (np.arange(width) + 0.5) / width
    if shape == "square":
        return np.ones((height, width), dtype=bool)
    if shape == "circle":
        return ((ys[:, None] - 0.5) ** 2 + (xs[None] - 0.5) ** 2) <= 0.25
    return np.abs(xs[None] - 0.5) <= ys[:, None] / 2


def render(things: Sequence[Thing], *, size: int = CANVAS) -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels.

    Raises:
        ValueError: if `size` is not a multiple of 32, since boxes would no longer be integer-aligned.
    """
    if size % CANVAS:
        raise ValueError(f"size must be a multiple of {CANVAS}, got {size}")
    canvas = np.zeros((CANVAS, CANVAS, 3), dtype=np.uint8)
    for thing in things:
        y, x = thing.row * CELL, thing.col * CELL
        canvas[y : y + BOX, x : x + BOX][_template(thing.shape, BOX, BOX)] = COLOURS[thing.colour]
    return Image.fromarray(canvas).resize((size, size), Image.Resampling.NEAREST)


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected components of a boolean mask [H, W], each as pixel coordinates [num_pixels, 2]."""
    todo = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while todo:
        queue = deque([todo.pop()])
        pixels = [queue[0]]
        while queue:
            y, x = queue.popleft()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in todo:
                    todo.remove(near)
                    queue.append(near)
                    pixels.append(near)
        found.append(np.array(pixels))
    return found


def _shape_of(pixels: np.ndarray) -> str | None:
    top_left = pixels.min(0)
    height, width = pixels.max(0) - top_left + 1
    if max(height, width) > CELL + 1 or min(height, width) < BOX - 2:
        return None
    mask = np.zeros((height, width), dtype=bool)
    mask[tuple((pixels - top_left).T)] = True
    overlaps = {}
    for shape in SHAPES:
        template = _template(shape, height, width)
        overlaps[shape] = (mask & template).sum() / (mask | template).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= MIN_IOU else None


def find_objects(image: Image.Image) -> list[Found]:
    """Objects in a picture of any size (it is scaled to the 32 px canvas). Colour is judged by hue, not brightness."""
    if image.size != (CANVAS, CANVAS):
        image = image.resize((CANVAS, CANVAS), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    bright = pixels.max(-1) >= MIN_BRIGHTNESS
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    cosine = pixels @ palette.T
    cosine /= np.linalg.norm(pixels, axis=-1, keepdims=True).clip(1e-6) * np.linalg.norm(palette, axis=-1)
    nearest = np.where(cosine.max(-1) >= MIN_COSINE, cosine.argmax(-1), len(COLOURS))
    found = []
    for index, colour in enumerate([*COLOURS, None]):
        for component in _components(bright & (nearest == index)):
            if len(component) < MIN_AREA:
                continue
            y, x = (component.min(0) + component.max(0) + 1) / 2
            found.append(Found(shape=_shape_of(component), colour=colour, x=float(x), y=float(y)))
    return found


def _is_kind(found: Found, asked: dict) -> bool:
    return found.shape == asked["shape"] and found.colour == asked["colour"]


def _at(found: Found, position: str) -> bool:
    middle = CANVAS / 2
    return {
        "left": found.x < middle,
        "right": found.x > middle,
        "top": found.y < middle,
        "bottom": found.y > middle,
    }[position]


def _related(first: Found, second: Found, relation: str) -> bool:
    gap = CELL / 2
    return {
        "left of": first.x + gap <= second.x,
        "right of": first.x >= second.x + gap,
        "above": first.y + gap <= second.y,
        "below": first.y >= second.y + gap,
    }[relation]


def conditions(spec: Spec, image: Image.Image) -> list[bool]:
    """What a prompt asks for, condition by condition: the number of objects, their colours, their shapes, the number of
    each kind, then the position and the relation.

    Colours and shapes must be just the asked ones, so that the share of conditions met is not raised by drawing more.
    """
    found = find_objects(image)
    kinds = spec["objects"]
    matches = [[thing for thing in found if _is_kind(thing, asked)] for asked in kinds]
    met = [
        len(found) == sum(asked["count"] for asked in kinds) and all(thing.shape is not None for thing in found),
        {thing.colour for thing in found} == {asked["colour"] for asked in kinds},
        {thing.shape for thing in found} == {asked["shape"] for asked in kinds},
        *(len(same) == asked["count"] for same, asked in zip(matches, kinds, strict=True)),
    ]
    if spec["position"] is not None:
        met.append(bool(found) and all(_at(thing, spec["position"]) for thing in found))
    if spec["relation"] is not None:
        pairs = itertools.product(*matches)
        met.append(any(_related(first, second, spec["relation"]) for first, second in pairs))
    return met


def strict(spec: Spec, image: Image.Image) -> float:
    """1.0 if everything asked for is there and nothing else, else 0.0."""
    return float(all(conditions(spec, image)))


def graded(spec: Spec, image: Image.Image) -> float:
    """Share of the conditions that are met, 0.0 to 1.0."""
    met = conditions(spec, image)
    return sum(met) / len(met)


def caption(spec: Spec) -> str:
    """The prompt in words, for instance "a red circle left of a blue square" or "two green triangles"."""
    words = []
    for asked in spec["objects"]:
        name = f"{asked['colour']} {asked['shape']}"
        words.append(f"a {name}" if asked["count"] == 1 else f"{NUMBERS[asked['count']]} {name}s")
    if spec["relation"] is not None:
        return f"{words[0]} {spec['relation']} {words[1]}"
    text = " and ".join(words)
    if spec["position"] is not None:
        where = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
        text += f" {where[spec['position']]}"
    return text


def combination(spec: Spec) -> str:
    """What a prompt asks for, however it is worded: "a left of b" and "b right of a" are one combination."""
    names = [f"{asked['count']} {asked['colour']} {asked['shape']}" for asked in spec["objects"]]
    relation = spec["relation"]
    if relation in ("right of", "below"):
        names.reverse()
        relation = "left of" if relation == "right of" else "above"
    elif relation is None:
        names.sort()
    return f"{names} {spec['position']} {relation}"


def split_of(combination: str) -> Split:
    """The split that a combination belongs to: one in five is held out."""
    return "heldout" if hashlib.sha256(combination.encode()).digest()[0] % 5 == 0 else "train"


def specs(kind: str) -> list[Spec]:
    """Every combination that prompts of one kind can ask for, in a fixed order."""
    names = [{"colour": colour, "shape": shape, "count": 1} for colour in COLOURS for shape in SHAPES]
    if kind == "single":
        return [{"objects": [name], "position": None, "relation": None} for name in names]
    if kind == "position":
        return [{"objects": [name], "position": at, "relation": None} for name in names for at in POSITIONS]
    if kind == "count":
        many = [{**name, "count": count} for name in names for count in (2, 3, 4)]
        return [{"objects": [name], "position": None, "relation": None} for name in many]
    pairs = [list(pair) for pair in itertools.permutations(names, 2)]
    if kind == "pair":
        return [{"objects": pair, "position": None, "relation": None} for pair in pairs]
    return [{"objects": pair, "position": None, "relation": relation} for pair in pairs for relation in RELATIONS]


def scene_for(spec: Spec, rng: random.Random) -> list[Thing]:
    """A random scene that meets `spec` exactly. Cells are drawn until position and relation hold."""
    names = [asked for asked in spec["objects"] for _ in range(asked["count"])]
    while True:
        cells = rng.sample([(row, col) for row in range(GRID) for col in range(GRID)], len(names))
        things = [
            Thing(shape=name["shape"], colour=name["colour"], row=row, col=col)
            for name, (row, col) in zip(names, cells, strict=True)
        ]
        seen = [
            Found(shape=thing.shape, colour=thing.colour, x=(thing.col + 0.5) * CELL, y=(thing.row + 0.5) * CELL)
            for thing in things
        ]
        at = spec["position"] is None or all(_at(found, spec["position"]) for found in seen)
        if at and (spec["relation"] is None or _related(seen[0], seen[1], spec["relation"])):
            return things


def drawing_prompts(split: Split) -> list[dict]:
    """Text-to-image rows of a split, kinds interleaved: columns `prompt`, `kind` and `spec` (what verifiers need)."""
    rng = random.Random(0)
    by_kind = []
    for kind in KINDS:
        asked = [spec for spec in specs(kind) if split_of(combination(spec)) == split]
        rows = [{"prompt": caption(spec), "kind": kind, "spec": spec} for spec in asked]
        rng.shuffle(rows)
        by_kind.append(rows)
    longest = max(len(rows) for rows in by_kind)
    return [rows[index % len(rows)] for index in range(longest) for rows in by_kind]


def train_drawing() -> list[dict]:
    """Prompts to train text-to-image models on."""
    return drawing_prompts("train")


def heldout_drawing() -> list[dict]:
    """Prompts whose combinations never occur in `train_drawing`. Kinds take turns, as in training: there are many more
    combinations of two related objects than of one object, so prompts of the small kinds come back."""
    return drawing_prompts("heldout")


def _ask(things: Sequence[Thing], rng: random.Random) -> tuple[str, str, str]:
    """One answerable question on a scene: (kind, question, answer)."""
    asks = [("count", "how many shapes are there ?", NUMBERS[len(things)])]
    for thing in things:
        if sum(other.shape == thing.shape for other in things) == 1:
            asks.append(("colour", f"what colour is the {thing.shape} ?", thing.colour))
        if sum(other.colour == thing.colour for other in things) == 1:
            asks.append(("shape", f"what shape is {thing.colour} ?", thing.shape))
        if len(things) == 1:
            side = rng.choice([("left", "right"), ("top", "bottom")])
            first = thing.col < GRID // 2 if side[0] == "left" else thing.row < GRID // 2
            asks.append(("side", f"is the {thing.shape} {side[0]} or {side[1]} ?", side[0] if first else side[1]))
    kind = rng.choice(sorted({ask[0] for ask in asks}))
    return rng.choice([ask for ask in asks if ask[0] == kind])


def questions(split: Split, num: int, *, seed: int = 0, size: int = CANVAS) -> list[dict]:
    """Visual questions of a split: columns `prompt`, `image` (PIL, `size` px), `answer` and `kind`.

    The split is by the combination of question and multiset of objects: held-out rows ask about sets of objects that
    training rows never ask the same question about.
    """
    rng = random.Random(f"{split}-{seed}")
    cells = [(row, col) for row in range(GRID) for col in range(GRID)]
    rows: list[dict] = []
    while len(rows) < num:
        places = rng.sample(cells, rng.randint(1, 4))
        things = [
            Thing(shape=rng.choice(SHAPES), colour=rng.choice(list(COLOURS)), row=row, col=col) for row, col in places
        ]
        kind, question, answer = _ask(things, rng)
        asked = f"{question} {sorted((thing.shape, thing.colour) for thing in things)}"
        if split_of(asked) == split:
            rows.append({"prompt": question, "image": render(things, size=size), "answer": answer, "kind": kind})
    return rows


def train_questions(num: int = 2000, size: int = CANVAS) -> list[dict]:
    """Visual questions to train vision-language models on."""
    return questions("train", num, size=size)


def heldout_questions(num: int = 256, size: int = CANVAS) -> list[dict]:
    """Visual questions about combinations that never occur in `train_questions`."""
    return questions("heldout", num, size=size)


def shapes_strict(prompts: Sequence, completions: Sequence[Image.Image], *, spec: Sequence[Spec], **_) -> list[float]:
    """Reward: 1.0 where a picture shows exactly what its prompt asks for, else 0.0."""
    return [strict(asked, image) for asked, image in zip(spec, completions, strict=True)]


def shapes_graded(prompts: Sequence, completions: Sequence[Image.Image], *, spec: Sequence[Spec], **_) -> list[float]:
    """Reward: the share of the prompt's conditions that a picture meets, 0.0 to 1.0."""
    return [graded(asked, image) for asked, image in zip(spec, completions, strict=True)]

"""Walks on the embedded world's grid: an environment in which an agent that sees the picture goes to a named object.

The agent is a white cross. Each turn it says one word of `ACTIONS`; at the edge it stays where it is, and so it does
after any other word. The episode ends when it enters an object's cell, and the task is done if that is the object asked
for. Start, goal and colours are split into `train` and `heldout`: held-out tasks never occur in training.
"""

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from unified_rl.data.environments import Observation, Turn
from unified_rl.worlds.shapes import BOX, CANVAS, CELL, COLOURS, GRID, SHAPES, Split, Thing, render, split_of

ACTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
NUM_TRAIN = 4000
NUM_HELDOUT = 512
MOST_THINGS = 2
_CELLS = tuple((row, col) for row in range(GRID) for col in range(GRID))
Cell = tuple[int, int]


class Walk:
    """See the module. A task has the columns `prompt`, `things` [{"shape", "colour", "row", "col"}], of which the first
    is the goal, and `start` [row, col]. Nothing is random."""

    def __init__(self, *, size: int = CANVAS) -> None:
        """
        Args:
            size: pixels of a side of the pictures, a multiple of 32.
        """
        self._size = size
        self._asked = ""
        self._things: list[Thing] = []
        self._at: Cell = (0, 0)

    def reset(self, task: Mapping[str, Any], seed: int) -> Observation:
        """Put the agent to the task's start."""
        self._asked = task["prompt"]
        self._things = [Thing(**thing) for thing in task["things"]]
        self._at = (task["start"][0], task["start"][1])
        return self._seen()

    def step(self, action: str) -> Turn:
        """Go one cell, or stay. The reward is 1 for the task done, else 0."""
        self._at = moved(self._at, action)
        met = [thing for thing in self._things if (thing.row, thing.col) == self._at]
        success = bool(met) and met[0] is self._things[0]
        return Turn(observation=self._seen(), reward=float(success), ended=bool(met), success=success)

    def _seen(self) -> Observation:
        return Observation(text=self._asked, images=(picture(self._things, self._at, size=self._size),))


def moved(at: Cell, action: str) -> Cell:
    """Where an action leads from a cell."""
    down, right = ACTIONS.get(action.strip(), (0, 0))
    row, col = at[0] + down, at[1] + right
    return (row, col) if 0 <= row < GRID and 0 <= col < GRID else at


def picture(things: list[Thing], at: Cell, *, size: int = CANVAS) -> Image.Image:
    """The scene with the agent, over what is in its cell."""
    canvas = np.asarray(render(things)).copy()
    y, x = at[0] * CELL, at[1] * CELL
    middle = BOX // 2
    canvas[y + middle, x : x + BOX] = canvas[y : y + BOX, x + middle] = 255
    return Image.fromarray(canvas).resize((size, size), Image.Resampling.NEAREST)


def shortest(task: Mapping[str, Any], at: Cell | None = None) -> list[str]:
    """The actions that begin a shortest way to the goal which meets no other object; empty if there is none."""
    goal, *others = [(thing["row"], thing["col"]) for thing in task["things"]]
    distance = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for action in ACTIONS:
            near = moved(cell, action)
            if near not in distance and near not in others:
                distance[near] = distance[cell] + 1
                queue.append(near)
    here = tuple(task["start"]) if at is None else at
    far = len(_CELLS)
    return [action for action in ACTIONS if distance.get(moved(here, action), far) < distance.get(here, far)]


def tasks(split: Split, num: int, *, seed: int = 0) -> list[dict]:
    """Tasks of a split that can be done: columns `prompt`, `things` (of different colours) and `start`."""
    rng = random.Random(f"walk-{split}-{seed}")
    rows: list[dict] = []
    while len(rows) < num:
        num_things = rng.randint(1, MOST_THINGS)
        start, *cells = rng.sample(_CELLS, num_things + 1)
        colours = rng.sample(list(COLOURS), num_things)
        things: list[dict] = [
            {"shape": rng.choice(SHAPES), "colour": colour, "row": row, "col": col}
            for colour, (row, col) in zip(colours, cells, strict=True)
        ]
        goal = things[0]
        task = {"prompt": f"go to the {goal['colour']} {goal['shape']}", "things": things, "start": list(start)}
        if split_of(f"{task['prompt']} at {cells[0]} from {start}") == split and shortest(task):
            rows.append(task)
    return rows


def train_walks() -> list[dict]:
    """Tasks to train on."""
    return tasks("train", NUM_TRAIN)


def heldout_walks() -> list[dict]:
    """Tasks that never occur in training: another start or goal for this object."""
    return tasks("heldout", NUM_HELDOUT)

"""What the scripts that pre-train on picture tokens share: scenes of the embedded world, and how a VQ autoencoder
learns to write each of them as 4 x 4 codes, one a grid cell."""

import random
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from recipes.quickstart import script
from recipes.quickstart.make_shapes_sd3 import KIND_WEIGHTS, learning_rate_at
from unified_rl.worlds import shapes

Things = list[shapes.Thing]
NUM_CODES = 1 + len(shapes.COLOURS) * len(shapes.SHAPES)
"""An empty cell, and one for each colour and shape."""


def train_specs() -> dict[str, list[shapes.Spec]]:
    """What prompts of the train split ask for, by kind."""
    return {
        kind: [spec for spec in shapes.specs(kind) if shapes.split_of(shapes.combination(spec)) == "train"]
        for kind in shapes.KINDS
    }


def draw_specs(specs: dict[str, list[shapes.Spec]], rng: random.Random, num: int) -> list[shapes.Spec]:
    """Random specs, kinds weighted by how hard they are."""
    kinds = rng.choices(list(KIND_WEIGHTS), weights=list(KIND_WEIGHTS.values()), k=num)
    return [rng.choice(specs[kind]) for kind in kinds]


class Canvas:
    """Draws scenes as tensors, much faster than Pillow but equal to it."""

    def __init__(self) -> None:
        self.looks = [(colour, shape) for colour in shapes.COLOURS for shape in shapes.SHAPES]
        cells = [torch.full((3, shapes.CELL, shapes.CELL), -1.0)]
        for colour, shape in self.looks:
            picture = np.asarray(shapes.render([shapes.Thing(shape=shape, colour=colour, row=0, col=0)]))
            cell = torch.from_numpy(picture[: shapes.CELL, : shapes.CELL].copy())
            cells.append(cell.permute(2, 0, 1) / 127.5 - 1)
        self.cells = torch.stack(cells)

    def codes(self, scenes: list[Things]) -> Tensor:
        """[num, 4, 4] what is in each cell: 0 if it is empty, else a number for its colour and shape."""
        codes = torch.zeros(len(scenes), shapes.GRID, shapes.GRID, dtype=torch.long)
        for index, scene in enumerate(scenes):
            for thing in scene:
                codes[index, thing.row, thing.col] = 1 + self.looks.index((thing.colour, thing.shape))
        return codes

    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures [num, 3, 32, 32] in [-1, 1]."""
        tiles = self.cells[codes]  # [num, row, col, channel, y, x]
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(codes), 3, shapes.CANVAS, shapes.CANVAS)


def crowded_scene(rng: random.Random) -> Things:
    """Up to eight random objects: an autoencoder learns faster from full pictures than from the world's sparse ones."""
    cells = [(row, col) for row in range(shapes.GRID) for col in range(shapes.GRID)]
    return [
        shapes.Thing(shape=rng.choice(shapes.SHAPES), colour=rng.choice(list(shapes.COLOURS)), row=row, col=col)
        for row, col in rng.sample(cells, rng.randint(0, 8))
    ]


def train_autoencoder(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    codebook: Tensor,
    weights: list[nn.Parameter],
    *,
    steps: int,
    rng: random.Random,
    batch: int = 12,
    peak: float = 2e-3,
) -> None:
    """Teach the decoder what each code looks like, and the encoder which code each look has.

    A cell has 16 looks and the codebook 16 entries, so what a code means is given: far quicker than finding it. Small
    batches do, as each picture holds 16 cells.

    Args:
        encode: pictures [B, 3, 32, 32] to latents [B, width, 4, 4].
        decode: codes [B, 4, 4] to pictures.
        codebook: [16, width], what latents should be.
    """
    canvas = Canvas()
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=1e-4)
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate_at(step / steps, step)
        codes = canvas.codes([crowded_scene(rng) for _ in range(batch)])
        pictures = canvas.pictures(codes)
        with script.autocast():
            loss = drawn = nn.functional.huber_loss(decode(codes).float(), pictures, delta=0.3)
            if step % 4 == 0:  # the encoder has the easier task
                seen = (encode(pictures).float() - codebook[codes].movedim(-1, 1)).square().mean()
                loss = drawn + seen
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 100 == 96:
            spent = time.monotonic() - start
            losses = f"drawn {drawn.item():.5f} seen {seen.item():.5f}"
            print(f"autoencoder step {step + 1} {losses}, {spent:.0f} s", flush=True)

"""Which prompts each rollout and each evaluation gets: a pure function of (seed, index), so that a resumed run goes on
with exactly the prompts that an uninterrupted one would have seen, whatever the number of processes."""

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from unified_rl.data.sources import ImageCell, Row, check_source, image_cells, load_rows, media_columns
from unified_rl.engine import distributed
from unified_rl.errors import RecipeError
from unified_rl.types import Prompt

__all__ = ["PromptSampler", "check_source", "evaluation_prompts", "load_rows"]


class PromptSampler:
    """The prompts of every rollout. It has no position of its own: rollouts are numbered.

    Epochs are permutations of all rows; laid end to end they are one endless stream, of which rollout `index` takes the
    next `prompts_per_step` rows, across the end of an epoch too.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        seed: int,
        group_size: int,
        prompts_per_step: int,
        max_skipped: float | None = None,
    ) -> None:
        """
        Args:
            rows: as from `load_rows`.
            seed: of the permutations and of the trajectories' own seeds.
            group_size: trajectories of one prompt.
            prompts_per_step: groups of one rollout, over all processes.
            max_skipped: the share of the rows that may be skipped because of their pictures, or because `check` refuses
                them; None: none.

        Raises:
            RecipeError: if there are no rows.
        """
        if not rows:
            raise RecipeError("data.prompts: holds no prompts; give at least one")
        self._rows = rows
        self._seed = seed
        self._group_size = group_size
        self._prompts_per_step = prompts_per_step
        self._max_skipped = max_skipped
        self.check: Callable[[Prompt], None] | None = None
        """The policy's, once it is loaded, see `unified_rl.protocols.ChecksPrompts`."""
        self.skipped: dict[int, str] = {}
        """Rows that cannot be read or are refused, as far as they are known, and what is wrong with them."""
        self._told: set[int] = set()

    def rollout(self, index: int, *, rank: int, world_size: int) -> list[Prompt]:
        """The N = prompts_per_step * group_size / world_size prompts of one rank in rollout `index` (from 0).

        The members of a group follow each other; a rank's share is contiguous and may cut a group. Seeds (63 bits)
        depend on the run's seed, the rollout and the row, not on the number of processes.

        Raises:
            RecipeError: if the samples cannot be shared out equally, or a picture cannot be read.
        """
        num_samples = self._prompts_per_step * self._group_size
        if num_samples % world_size:
            raise RecipeError(
                f"prompts_per_step: {self._prompts_per_step} prompts x group_size {self._group_size} = {num_samples} "
                f"samples cannot be shared out over {world_size} processes; make it a multiple"
            )
        share = num_samples // world_size
        opened: dict[int, Row] = {}
        prompts = []
        for member in range(rank * share, (rank + 1) * share):
            group = index * self._prompts_per_step + member // self._group_size
            row = self.row_at(group)
            if row not in opened:
                opened[row] = self._readable(row)
            seed = _hashed_seed("rollout", self._seed, index, member)
            prompts.append(_prompt(opened[row], group_id=group, seed=seed))
        return prompts

    def every_prompt(self) -> Iterator[Prompt]:
        """Each row once, in no rollout."""
        for index in range(len(self._rows)):
            yield _prompt(self._readable(index), group_id=index, seed=0)

    def share_skipped(self) -> list[str]:
        """Let all processes know the rows that one of them skipped; returns what is wrong with those that are new."""
        found = dict(distributed.gather_objects(list(self.skipped.items())))
        new = [why for row, why in sorted(found.items()) if row not in self._told]
        self.skipped.update(found)
        self._told.update(found)
        return new

    def _readable(self, row: int) -> Row:
        """The row with its pictures decoded, or the first after it that can be used, if rows may be skipped.

        Which one depends on the files and the model alone, so that processes and resumed runs agree without talking.

        Raises:
            RecipeError: if its pictures cannot be read and it may not be skipped.
        """
        while True:
            if row not in self.skipped:
                try:
                    opened = _opened(self._rows[row], row)
                    if self.check is not None and self._max_skipped is not None:  # else sampling says so itself
                        self.check(_prompt(opened, group_id=row, seed=0))
                    return opened
                except RecipeError as error:
                    if self._max_skipped is None:
                        raise
                    self.skipped[row] = f"row {row}: {error}"
                    if len(self.skipped) > max(1.0, self._max_skipped * len(self._rows)):
                        raise RecipeError(
                            f"data.max_bad_images: {len(self.skipped)} of {len(self._rows)} rows cannot be used, more"
                            f" than {self._max_skipped:g} of them; the last: {error}"
                        ) from error
            row = (row + 1) % len(self._rows)

    @property
    def fingerprint(self) -> str:
        """A hash of all rows, to notice on resume that they are others."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps(row, sort_keys=True, default=stable).encode())
        return digest.hexdigest()

    def row_at(self, position: int) -> int:
        """The row at a position of the endless stream."""
        epoch, offset = divmod(position, len(self._rows))
        return _permutation(len(self._rows), self._seed, epoch)[offset]


def evaluation_prompts(rows: Sequence[Row], *, num: int, seed: int, rank: int, world_size: int) -> list[Prompt]:
    """One rank's share of the fixed exam: of the first `num` rows (all, if there are fewer) every `world_size`-th from
    `rank` on. Shares may differ by one prompt. A prompt's `group_id` is the index of its row, its seed a hash of `seed`
    and this index.

    Raises:
        RecipeError: if a picture cannot be read.
    """
    prompts = []
    for index in range(rank, min(num, len(rows)), world_size):
        own_seed = _hashed_seed("evaluation", seed, index)
        prompts.append(_prompt(_opened(rows[index], index), group_id=index, seed=own_seed))
    return prompts


@functools.lru_cache(maxsize=2)  # a rollout needs at most the end of one epoch and the start of the next, as a rule
def _permutation(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def stable(value: object) -> str:
    """What JSON does not know, as text that is the same in every process (of pictures in memory, their size)."""
    if isinstance(value, ImageCell):
        value = value.value.encode() if isinstance(value.value, str) else value.value
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size}"
    return str(value) if isinstance(value, Path) else type(value).__name__


def _hashed_seed(*parts: str | int) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _opened(row: Row, index: int) -> Row:
    """The row with its pictures decoded, those of `image` and `images` under `images`."""
    opened = {name: value for name, value in row.items() if name not in ("image", "images")}
    for name in media_columns(row):
        cells = row[name]
        opened[name] = [cell.open() for cell in cells] if isinstance(cells, list) else cells.open()
    pictures: tuple[Image.Image, ...] = tuple(cell.open() for cell in image_cells(row, f"row {index}", Path.cwd()))
    return {**opened, "images": pictures}


def _prompt(row: Row, *, group_id: int, seed: int) -> Prompt:
    columns = {name: value for name, value in row.items() if name not in ("prompt", "images")}
    return Prompt(text=row["prompt"], images=row["images"], columns=columns, group_id=group_id, seed=seed)

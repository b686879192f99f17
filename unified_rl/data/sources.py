"""Where prompts come from: files and import references, read and checked without torch, so that `validate` is quick.

A row is a dictionary with `prompt` (text, or chat messages), optionally `image` (one) or `images` (a list), and any
further columns, which rewards receive by name. Columns named `..._image` hold one picture, `video` and `..._video` a
list of frames. Pictures stay encoded until a prompt is made of their row.
"""

import base64
import csv
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unified_rl.errors import RecipeError
from unified_rl.imports import check_import, load_import, one_line

Row = dict[str, Any]

FORMATS = ("PNG", "JPEG", "WEBP")
"""The only decoders that ever see a picture: few, and none that runs a script or opens another file."""
MAX_PIXELS = 2**26
"""Larger pictures (8192 x 8192) are refused before they are decoded: a few kB can hold gigabytes."""
MAX_SIDE = 16_384
"""Pixels; processors that cut pictures into patches allocate for the longer side."""
RESERVED = ("prompts", "completions")
"""Columns of these names would collide with the arguments that every reward gets."""
_DATA_URI = re.compile(r"data:image/[a-z]+;base64,")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class ImageCell:
    """A picture of a row, not yet decoded."""

    value: Image.Image | Path | bytes | str
    """A str is base64."""
    place: str
    """The row that it belongs to; errors begin with it."""

    def open(self) -> Image.Image:
        """Decode the picture: its first frame, turned as its EXIF says, as an RGB copy.

        Raises:
            RecipeError: if it is missing, no PNG, JPEG or WEBP, damaged, or larger than MAX_PIXELS.
        """
        name = f"image {self.value}" if isinstance(self.value, Path) else "its image"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return _to_rgb(self._encoded_or_picture())
        except Exception as error:  # decoders fail on damaged data with nearly every type there is
            raise RecipeError(f"{self.place}: {name} cannot be read ({one_line(error)}); replace it") from error

    def _encoded_or_picture(self) -> Image.Image:
        if isinstance(self.value, Image.Image):
            return self.value
        if isinstance(self.value, Path):
            encoded = self.value.read_bytes()
        else:
            encoded = base64.b64decode(self.value, validate=True) if isinstance(self.value, str) else self.value
        try:
            return Image.open(io.BytesIO(encoded), formats=FORMATS)
        except UnidentifiedImageError as error:  # names an object in memory
            raise ValueError(f"no {', '.join(FORMATS)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is more than the {MAX_PIXELS} pixels allowed")
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels; sides are limited to {MAX_SIDE}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def image_cells(row: Mapping[str, Any], place: str, folder: Path) -> list[ImageCell]:
    """The pictures of a row's `image` or `images`, none decoded; relative paths are looked up in `folder`.

    Raises:
        RecipeError: if a cell is no picture, path, {"bytes" or "path"} or data-URI, is a remote address, or its file is
            missing.
    """
    one, several = row.get("image"), row.get("images")
    if one not in (None, "") and several is not None:
        raise RecipeError(f"{place}: has both image and images; keep one of them")
    if several is None:
        several = [] if one in (None, "") else [one]
    if not isinstance(several, list | tuple):
        raise RecipeError(f"{place}: images must be a list, not {type(several).__name__}; for one picture say image")
    return [cell if isinstance(cell, ImageCell) else _image_cell(cell, place, folder) for cell in several]


def media_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns beside `image` and `images` that hold a picture or the frames of a video."""
    return [str(name) for name in row if str(name).endswith("_image") or re.search(r"(^|_)video$", str(name))]


def media_cells(name: str, value: Any, place: str, folder: Path) -> ImageCell | list[ImageCell]:
    """A `..._image` column's picture, or the frames of a video, none decoded."""
    if name.endswith("_image"):
        return value if isinstance(value, ImageCell) else _image_cell(value, place, folder)
    if not isinstance(value, list | tuple) or not value:
        raise RecipeError(f"{place}: {name} must be a list of its frames (pictures), not {type(value).__name__}")
    return [cell if isinstance(cell, ImageCell) else _image_cell(cell, place, folder) for cell in value]


def _image_cell(cell: Any, place: str, folder: Path) -> ImageCell:
    if isinstance(cell, Mapping):
        encoded = cell.get("bytes")
        if isinstance(encoded, bytes | str):
            return ImageCell(encoded, place)
        cell = cell.get("path")
    if isinstance(cell, Image.Image | bytes):
        return ImageCell(cell, place)
    if not isinstance(cell, str | Path) or not str(cell):
        raise RecipeError(f"{place}: an image is a path, a data-URI or {{'bytes' or 'path': ...}}, not {cell!r}")
    text = str(cell)
    if uri := _DATA_URI.match(text):
        return ImageCell(text[uri.end() :], place)
    if _URL.match(text) or text.startswith("data:"):
        raise RecipeError(f"{place}: image {text[:60]!r} is not fetched; download it and give its path")
    path = folder / text
    if not os.path.isfile(path):  # unlike Path.is_file, False for names that are no valid path at all
        raise RecipeError(f"{place}: no image file {str(path)[:200]}; paths are relative to the folder of the prompts")
    return ImageCell(path, place)


def check_source(source: str, where: str) -> int | None:
    """Check prompts without importing or running anything: every row of a file, or that a reference exists.

    Args:
        source: a .jsonl, .csv or .txt file, `package.module:name` or `path/to/file.py:name`.
        where: the recipe key, for instance "data.prompts"; errors begin with it.

    Returns:
        The number of rows of a file; None for a reference, whose rows exist only once it runs.

    Raises:
        RecipeError: naming `file:line`, if a file is missing, empty, not UTF-8, or has a bad row.
    """
    if _is_file(source, where):
        return sum(1 for _ in _file_rows(Path(source), where))
    check_import(source, where)
    return None


def load_rows(source: str, where: str) -> list[Row]:
    """Read prompts: the rows of a file, or of what a reference names (a list of dictionaries, or a function that
    returns one). Pictures are replaced by undecoded `ImageCell`s under `images`.

    Args:
        source, where: as in `check_source`.

    Raises:
        RecipeError: as in `check_source`; and if a reference fails or does not give rows.
    """
    if _is_file(source, where):
        return list(_file_rows(Path(source), where))
    value = load_import(source, where)
    if callable(value):
        try:
            value = value()
        except Exception as error:  # the user's code
            raise RecipeError(f"{where}: {source}() failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise RecipeError(f"{where}: {source} gives a {type(value).__name__}; it must give a list of dictionaries")
    target = source.rpartition(":")[0]
    folder = Path(target).parent if target.endswith(".py") else Path.cwd()
    rows = [_checked(row, f"{where}: {source} row {number}", folder) for number, row in enumerate(value)]
    if not rows:
        raise RecipeError(f"{where}: {source} gives no rows; give at least one prompt")
    return rows


def _is_file(source: str, where: str) -> bool:
    """Whether a source is a file of prompts and not a reference."""
    path = Path(source)
    if path.suffix.lower() not in _READERS:
        if ":" in source:
            return False
        raise RecipeError(f"{where}: {source!r} is no {', '.join(_READERS)} file and no package.module:name")
    if not path.is_file():
        raise RecipeError(f"{where}: no file {source}; paths are relative to the recipe or the working directory")
    return True


def _file_rows(path: Path, where: str) -> Iterator[Row]:
    place = f"{where}: {path}"
    empty = True
    for line, row in _READERS[path.suffix.lower()](path, place):
        yield _checked(row, f"{place}:{line}", path.parent)
        empty = False
    if empty:
        raise RecipeError(f"{place}: holds no prompts; give at least one")


def _checked(row: Any, place: str, folder: Path) -> Row:
    """A row whose pictures are `ImageCell`s: those of `image` and `images` under `images`, others where they were."""
    if not isinstance(row, Mapping):
        raise RecipeError(f'{place}: a row is an object with a "prompt", not {type(row).__name__}')
    if "prompt" not in row:
        raise RecipeError(f'{place}: no "prompt" in this row; its columns are {", ".join(map(str, row))}')
    _check_prompt(row["prompt"], place)
    for name in RESERVED:
        if name in row:
            raise RecipeError(f"{place}: a column cannot be called {name!r}, rewards get this already; rename it")
    cells = image_cells(row, place, folder)
    checked = {str(name): value for name, value in row.items() if name not in ("image", "images")}
    for name in media_columns(checked):
        checked[name] = media_cells(name, checked[name], place, folder)
    return {**checked, "images": cells} if cells else checked


def _check_prompt(prompt: Any, place: str) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RecipeError(f"{place}: the prompt is empty; write one or remove the row")
        return
    if not isinstance(prompt, list):
        raise RecipeError(f"{place}: the prompt is {prompt!r}; it must be text or a list of chat messages")
    if not prompt:
        raise RecipeError(f"{place}: the prompt has no messages; write one or remove the row")
    for message in prompt:
        ok = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not ok or not isinstance(message.get("content"), str | list):
            raise RecipeError(f'{place}: a chat message needs a "role" and a "content" (text or parts): {message!r}')


def _lines(path: Path, place: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1. Only \n and \r\n end a line, as editors count."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise RecipeError(f"{place}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _full_lines(path: Path, place: str) -> Iterator[tuple[int, str]]:
    for number, line in _lines(path, place):
        if not line.strip():
            raise RecipeError(f"{place}:{number}: empty line; remove it")
        yield number, line


def _read_txt(path: Path, place: str) -> Iterator[tuple[int, Any]]:
    for number, line in _full_lines(path, place):
        yield number, {"prompt": line}


def _read_jsonl(path: Path, place: str) -> Iterator[tuple[int, Any]]:
    for number, line in _full_lines(path, place):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise RecipeError(f"{place}:{number}: not JSON: {error}; write one object a line") from error


def _read_csv(path: Path, place: str) -> Iterator[tuple[int, Any]]:
    # Line ends are kept for cells that span lines; a row is reported at its last line.
    reader = csv.reader((line + "\n" for _, line in _lines(path, place)), strict=True)
    try:
        header = next(reader, [])
        if header and ("prompt" not in header or len(set(header)) < len(header)):
            raise RecipeError(f"{place}:1: the header must have a column prompt, and no name twice; it has {header}")
        for cells in reader:
            at = f"{place}:{reader.line_num}"
            if not cells:
                raise RecipeError(f"{at}: empty line; remove it")
            if len(cells) != len(header):
                raise RecipeError(f"{at}: {len(cells)} cells for {len(header)} columns; quote cells that hold commas")
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise RecipeError(f"{place}:{reader.line_num}: not CSV: {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".txt": _read_txt,
}

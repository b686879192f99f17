"""Text in pictures, read by Tesseract (Apache-2.0), a program of its own: `apt install tesseract-ocr`.

Its network has nothing in common with RapidOCR's, which makes it a judge for runs that are rewarded by RapidOCR.
"""

import io
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count, environ
from typing import Any

from PIL import Image

from reward_models.edit_distance import plain, text_score, wanted_text

SECONDS = 20
SMALLEST_HEIGHT = 64
"""Lower pictures are enlarged: Tesseract wants letters of 20 px and more."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def tesseract(
    prompts: Sequence[Any], completions: Sequence[Image.Image], *, letters: str = LETTERS, **_: Any
) -> list[float]:
    """How well the line of text in each picture agrees with the quoted text of its prompt, 0 to 1.

    Args:
        prompts: each with the wanted text in double quotes.
        completions: PIL pictures that hold one line of text.
        letters: the only characters that may be read; empty: all.
    """
    texts = read(completions, letters)
    return [text_score(text, wanted_text(prompt), anywhere=False) for text, prompt in zip(texts, prompts, strict=True)]


def tesseract_exact(
    prompts: Sequence[Any], completions: Sequence[Image.Image], *, letters: str = LETTERS, **_: Any
) -> list[float]:
    """1.0 where the line of text is the quoted text (case and white space do not count), else 0.0."""
    texts = read(completions, letters)
    return [float(plain(text) == plain(wanted_text(prompt))) for text, prompt in zip(texts, prompts, strict=True)]


def read(pictures: Sequence[Image.Image], letters: str = LETTERS) -> list[str]:
    """The line of text in each picture, without Tesseract's dictionaries, which would mend misspelt words.

    Raises:
        FileNotFoundError: if the program is not installed.
    """
    program = shutil.which("tesseract")
    if program is None:
        raise FileNotFoundError("the program tesseract is not installed (apt install tesseract-ocr)")
    command = [program, "-", "-", "--psm", "7", "-c", "load_system_dawg=0", "-c", "load_freq_dawg=0"]
    if letters:
        command += ["-c", f"tessedit_char_whitelist={letters}"]

    def one(picture: Image.Image) -> str:
        done = subprocess.run(
            command,
            input=_png(picture),
            capture_output=True,
            timeout=SECONDS,
            check=True,
            env={**environ, "OMP_THREAD_LIMIT": "1"},
        )
        return done.stdout.decode("utf-8", "replace").strip()

    with ThreadPoolExecutor(cpu_count()) as pool:
        return list(pool.map(one, pictures))


def _png(picture: Image.Image) -> bytes:
    grey = picture.convert("L")
    factor = -(-SMALLEST_HEIGHT // grey.height)
    if factor > 1:
        grey = grey.resize((grey.width * factor, grey.height * factor), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    grey.save(buffer, "PNG", dpi=(150, 150))
    return buffer.getvalue()

"""OCR rewards on clean renderings, by the real engines."""

import shutil

import pytest
from PIL import Image, ImageDraw, ImageFont

from reward_models.edit_distance import levenshtein, text_score, wanted_text
from reward_models.ocr import ocr, ocr_exact
from reward_models.tesseract import tesseract, tesseract_exact

needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="the program tesseract is not installed")
PROMPTS = ['a sign that says "Open"', 'the word "river"', '"quiz"']


def drawn(text: str, size: tuple[int, int] = (96, 32)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    middle = (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(picture).text(middle, text, fill="black", font=ImageFont.load_default(22), anchor="mm")
    return picture


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_levenshtein(first: str, second: str, distance: int) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == distance


def test_the_score_of_flow_grpo() -> None:
    assert text_score("H E llo", "hello") == 1.0
    assert text_score("hallo", "hello") == 0.8
    assert text_score("something else entirely", "hello") == 0.0, "never below 0"
    assert text_score("hello world", "hello") == 1.0
    assert text_score("hello world", "hello", anywhere=False) == 0.0
    assert text_score("", "ab") == 0.0


def test_the_wanted_text_is_quoted() -> None:
    assert wanted_text([{"role": "user", "content": 'it\'s a sign "OPEN"'}]) == "OPEN"
    assert wanted_text('a "first" and a "second"') == "first"
    for prompt in ("no quotes", 'an "open one', 'empty " "'):
        with pytest.raises(ValueError, match="double quotes"):
            wanted_text(prompt)


def test_rapidocr_reads_and_grades() -> None:
    pictures = [drawn("OPEN"), drawn("RIVAR"), Image.new("RGB", (96, 32), "white")]
    assert ocr(PROMPTS, pictures) == pytest.approx([1.0, 0.8, 0.0])
    assert ocr_exact(PROMPTS, pictures) == [1.0, 0.0, 0.0]


def test_rapidocr_finds_text_in_a_scene() -> None:
    scene = Image.new("RGB", (256, 256), "lightblue")
    scene.paste(drawn("OPEN"), (80, 120))
    assert ocr(PROMPTS[:1], [scene], detect=True) == [1.0]


@needs_tesseract
def test_tesseract_reads_and_grades() -> None:
    pictures = [drawn("OPEN"), drawn("RIVAR"), Image.new("RGB", (96, 32), "white")]
    assert tesseract(PROMPTS, pictures) == pytest.approx([1.0, 0.8, 0.0])
    assert tesseract_exact(PROMPTS, pictures) == [1.0, 0.0, 0.0]

"""Prompts: reading and checking sources, decoding pictures, and the resumable sampler."""

import base64
import io
import itertools
import json
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unified_rl.data import sources
from unified_rl.data.prompts import PromptSampler, check_source, evaluation_prompts, load_rows
from unified_rl.errors import RecipeError
from unified_rl.types import Prompt

RED, BLUE = (255, 0, 0), (0, 0, 255)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (4, 2)) -> Image.Image:
    return Image.new("RGB", size, colour)


def only(rows: list[dict]) -> Prompt:
    """The prompt that evaluation makes of the first row."""
    (prompt,) = evaluation_prompts(rows, num=1, seed=0, rank=0, world_size=1)
    return prompt


def refusal(source: str) -> str:
    """The one-line error that checking and loading a source both give."""
    with pytest.raises(RecipeError) as checked:
        check_source(source, "data.prompts")
    with pytest.raises(RecipeError) as loaded:
        load_rows(source, "data.prompts")
    assert str(checked.value) == str(loaded.value)
    assert str(checked.value).startswith("data.prompts: ") and "\n" not in str(checked.value)
    return str(checked.value)


# --- sources ---


def test_txt(tmp_path: Path) -> None:
    source = write(tmp_path / "p.txt", "a cat\r\n  größer \nline\u2028separator")
    assert check_source(source, "data.prompts") == 3
    assert load_rows(source, "data.prompts") == [
        {"prompt": "a cat"},
        {"prompt": "  größer "},
        {"prompt": "line\u2028separator"},
    ]


def test_jsonl_keeps_every_column(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    rows = [{"prompt": "a", "answer": "b", "spec": {"n": [1, 2]}}, {"prompt": messages, "image": None}]
    source = write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert check_source(source, "data.prompts") == 2
    assert load_rows(source, "data.prompts") == [rows[0], {"prompt": messages}]


def test_csv_quoting_and_byte_order_mark(tmp_path: Path) -> None:
    source = write(tmp_path / "p.csv", '\ufeffprompt,answer\n"a, b",1\n"two\n\nlines",2\n')
    assert check_source(source, "data.prompts") == 2
    assert load_rows(source, "data.prompts") == [
        {"prompt": "a, b", "answer": "1"},
        {"prompt": "two\n\nlines", "answer": "2"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "", "p.txt: holds no prompts"),
        ("p.txt", "a\n\nb\n", "p.txt:2: empty line"),
        ("p.txt", "a\n \nb\n", "p.txt:2: empty line"),
        ("p.txt", b"a\nb\xff\n", "p.txt:2: not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n', "p.jsonl:2: empty line"),
        ("p.jsonl", '["a"]\n', 'p.jsonl:1: a row is an object with a "prompt", not list'),
        ("p.jsonl", '{"text": "a"}\n', 'p.jsonl:1: no "prompt" in this row; its columns are text'),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl:1: the prompt is 3; it must be text"),
        ("p.jsonl", '{"prompt": " "}\n', "p.jsonl:1: the prompt is empty"),
        ("p.jsonl", '{"prompt": []}\n', "p.jsonl:1: the prompt has no messages"),
        ("p.jsonl", '{"prompt": [{"content": "a"}]}\n', "p.jsonl:1: a chat message needs"),
        ("p.jsonl", '{"prompt": "a", "completions": 1}\n', "p.jsonl:1: a column cannot be called 'completions'"),
        ("p.jsonl", '{"prompt": "a", "image": "no.png"}\n', "p.jsonl:1: no image file"),
        ("p.jsonl", '{"prompt": "a", "image": 3}\n', "p.jsonl:1: an image is a path"),
        ("p.jsonl", '{"prompt": "a", "images": "x.png"}\n', "p.jsonl:1: images must be a list, not str"),
        ("p.jsonl", '{"prompt": "a", "image": "x.png", "images": []}\n', "p.jsonl:1: has both image and images"),
        ("p.jsonl", '{"prompt": "a", "image": "http://169.254.169.254/x"}\n', "is not fetched"),
        ("p.jsonl", '{"prompt": "a", "image": "file:///etc/passwd"}\n', "is not fetched"),
        ("p.jsonl", '{"prompt": "a", "image": "data:text/html,x"}\n', "is not fetched"),
        ("p.csv", "", "p.csv: holds no prompts"),
        ("p.csv", "prompt\n", "p.csv: holds no prompts"),
        ("p.csv", "text\na\n", "p.csv:1: the header must have a column prompt"),
        ("p.csv", "prompt,a,a\nx,1,2\n", "p.csv:1: the header must have a column prompt, and no name twice"),
        ("p.csv", "prompt,a\nx,1,2\n", "p.csv:2: 3 cells for 2 columns"),
        ("p.csv", "prompt\nx\n\n", "p.csv:3: empty line"),
        ("p.csv", 'prompt\n"x\n', "p.csv:2: not CSV"),
        ("p.csv", b"prompt\nx\n\xe9\n", "p.csv:3: not UTF-8"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    assert said in refusal(write(tmp_path / name, content))


def test_what_is_no_source(tmp_path: Path) -> None:
    assert "no file" in refusal(str(tmp_path / "missing.jsonl"))
    assert "is no .jsonl, .csv, .txt file and no package.module:name" in refusal(str(tmp_path / "p.parquet"))
    assert "did you mean 'train_drawing'" in refusal("unified_rl.worlds.shapes:train_drawings")


def test_references(tmp_path: Path) -> None:
    picture(BLUE).save(tmp_path / "blue.png")
    file = write(
        tmp_path / "rows.py",
        "fixed = [{'prompt': 'a'}]\n"
        "def made(): return [{'prompt': 'b', 'image': 'blue.png', 'answer': 1}]\n"
        "def failing(): raise KeyError('x')\n"
        "def nothing(): return []\n"
        "def number(): return 3\n"
        "def bad(): return [{'prompt': 'a'}, {'prompt': ''}]\n",
    )
    assert check_source(f"{file}:made", "data.prompts") is None
    assert load_rows(f"{file}:fixed", "data.prompts") == [{"prompt": "a"}]
    prompt = only(load_rows(f"{file}:made", "data.prompts"))
    assert prompt.columns == {"answer": 1} and prompt.images[0].getpixel((0, 0)) == BLUE
    for name, said in {
        "failing": "failing() failed: KeyError: 'x'",
        "nothing": "nothing gives no rows",
        "number": "number gives a int; it must give a list of dictionaries",
        "bad": "bad row 1: the prompt is empty",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_rows(f"{file}:{name}", "data.prompts")
        assert said in str(caught.value)


# --- pictures ---


def test_every_form_of_a_picture(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    picture().save(tmp_path / "sub" / "red.png")
    raw = encoded(picture())
    base = base64.b64encode(raw).decode()
    forms: list[Any] = [
        "sub/red.png",
        str(tmp_path / "sub" / "red.png"),
        {"path": "sub/red.png"},
        {"bytes": None, "path": "sub/red.png"},
        {"bytes": base, "path": None},
        f"data:image/png;base64,{base}",
    ]
    lines = [{"prompt": "a", "image": form} for form in forms] + [{"prompt": "a", "images": forms[:2]}]
    source = write(tmp_path / "p.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert check_source(source, "data.prompts") == len(lines)
    rows = load_rows(source, "data.prompts")
    rows += [
        {"prompt": "a", "image": {"bytes": raw}},
        {"prompt": "a", "image": raw},
        {"prompt": "a", "image": picture()},
    ]
    prompts = evaluation_prompts(rows, num=99, seed=0, rank=0, world_size=1)
    assert [len(prompt.images) for prompt in prompts] == [1] * 6 + [2] + [1] * 3
    for image in (image for prompt in prompts for image in prompt.images):
        assert (image.mode, image.size, image.getpixel((3, 1))) == ("RGB", (4, 2), RED)
    assert all(not prompt.columns for prompt in prompts)


def test_pictures_are_decoded_only_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "bad.png", b"no picture")
    picture().save(tmp_path / "good.png")
    names = ("good.png", "bad.png")
    lines = "".join(json.dumps({"prompt": "a", "image": name}) + "\n" for name in names)
    rows = load_rows(write(tmp_path / "p.jsonl", lines), "data.prompts")
    only(rows)
    with pytest.raises(RecipeError, match=r"p\.jsonl:2: image .*bad\.png cannot be read") as caught:
        evaluation_prompts(rows, num=2, seed=0, rank=1, world_size=2)
    assert "\n" not in str(caught.value)
    (tmp_path / "good.png").unlink()
    with pytest.raises(RecipeError, match=r"p\.jsonl:1: image .*good\.png cannot be read"):
        only(rows)


def pixel_bomb(width: int, height: int) -> bytes:
    """A PNG that says it is width x height, in under 100 bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encoded(picture(size=(64, 64)), "JPEG")[:300],
        encoded(picture(size=(64, 64)))[:60],
        encoded(picture(), "BMP"),
        encoded(picture(), "GIF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        pixel_bomb(8193, 8192),
        pixel_bomb(10_000, 10_000),
        pixel_bomb(20_000, 20_000),
        pixel_bomb(20_000, 8),
    ],
    ids=["empty", "cut jpeg", "cut png", "bmp", "gif", "svg", "eps", "67 Mpx", "100 Mpx", "400 Mpx", "20,000 px wide"],
)
def test_bad_pictures_are_refused(data: bytes) -> None:
    with pytest.raises(RecipeError, match=r"^row 0: its image cannot be read \(.+\); replace it$"):
        only([{"prompt": "a", "image": {"bytes": data}}])


def test_the_cap_holds_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_PIXELS", 7)
    with pytest.raises(RecipeError, match="4 x 2 is more than the 7 pixels allowed"):
        only([{"prompt": "a", "image": picture()}])


def test_unusual_pictures_become_rgb() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = picture()
    turned.putpixel((0, 0), BLUE)
    grey16 = Image.fromarray(np.full((2, 4), 0x8000, dtype=np.uint16))
    frames = [picture(RED), picture(BLUE)]
    made = {
        "cmyk": encoded(picture().convert("CMYK"), "JPEG"),
        "grey": encoded(Image.new("L", (4, 2), 128)),
        "palette": encoded(picture().convert("P")),
        "alpha": encoded(picture().convert("RGBA")),
        "grey16": encoded(grey16),
        "animated": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "tiny": encoded(picture(size=(1, 1))),
        "turned": encoded(turned, exif=exif),
    }
    images = {name: only([{"prompt": "a", "image": data}]).images[0] for name, data in made.items()}
    assert all(image.mode == "RGB" for image in images.values())
    assert images["grey"].getpixel((0, 0)) == images["grey16"].getpixel((0, 0)) == (128, 128, 128)
    assert images["palette"].getpixel((0, 0)) == images["alpha"].getpixel((0, 0)) == RED
    assert np.abs(np.array(images["animated"].getpixel((0, 0))) - RED).max() <= 2
    assert np.abs(np.array(images["cmyk"].getpixel((0, 0))) - RED).max() <= 3
    assert images["tiny"].size == (1, 1)
    assert images["turned"].size == (2, 4) and images["turned"].getpixel((1, 0)) == BLUE


# --- sampler ---


def sampler(num_rows: int, **settings: int) -> PromptSampler:
    rows = [{"prompt": f"p{index}", "index": index} for index in range(num_rows)]
    return PromptSampler(rows, **{"seed": 0, "group_size": 2, "prompts_per_step": 4, **settings})


def stream(one: PromptSampler, num: int) -> list[int]:
    """The rows of the first `num` rollouts, one a group."""
    prompts = [prompt for index in range(num) for prompt in one.rollout(index, rank=0, world_size=1)]
    return [prompt.columns["index"] for prompt in prompts[::2]]


@pytest.mark.parametrize("num_rows", [1, 3, 4, 10])
def test_every_epoch_is_a_permutation_without_gaps(num_rows: int) -> None:
    rows = stream(sampler(num_rows), 10)
    for start in range(0, len(rows) - num_rows + 1, num_rows):
        assert sorted(rows[start : start + num_rows]) == list(range(num_rows))
    if num_rows == 10:
        assert len({tuple(rows[start : start + 10]) for start in range(0, 40, 10)}) == 4, "each epoch has its own order"


def test_rollouts_depend_on_nothing_but_seed_and_index() -> None:
    one, other = sampler(10), sampler(10)
    in_order = [one.rollout(index, rank=0, world_size=1) for index in range(8)]
    assert [other.rollout(index, rank=0, world_size=1) for index in reversed(range(8))] == in_order[::-1]
    assert stream(sampler(10, seed=1), 5) != stream(one, 5)


def test_groups() -> None:
    prompts = sampler(10, group_size=3).rollout(2, rank=0, world_size=1)
    assert [prompt.group_id for prompt in prompts] == [8, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11]
    for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.group_id):
        assert len({prompt.text for prompt in group}) == 1


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_one_rollout(world_size: int) -> None:
    one = sampler(10)
    whole = one.rollout(3, rank=0, world_size=1)
    shares = [one.rollout(3, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {8 // world_size}
    assert [prompt for share in shares for prompt in share] == whole, "seeds included"


def test_seeds_are_63_bit_and_all_differ() -> None:
    one = sampler(10)
    rollouts = [one.rollout(index, rank=0, world_size=1) for index in range(50)]
    counts = Counter(prompt.seed for prompts in rollouts for prompt in prompts)
    assert len(counts) == 400
    assert 2**61 < max(counts) < 2**63 and min(counts) >= 0
    again = sampler(10, seed=1).rollout(0, rank=0, world_size=1)
    assert not {prompt.seed for prompt in again} & set(counts)


def test_samples_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^prompts_per_step: 4 prompts x group_size 2 = 8 samples .* 3 processes"):
        sampler(10).rollout(0, rank=0, world_size=3)
    with pytest.raises(RecipeError, match="holds no prompts"):
        sampler(0)


def test_a_group_shares_its_decoded_picture() -> None:
    rows = [{"prompt": "a", "image": picture(), "answer": "x"}]
    first, second = PromptSampler(rows, seed=0, group_size=2, prompts_per_step=1).rollout(0, rank=0, world_size=1)
    assert first.images[0] is second.images[0]
    assert first.columns == {"answer": "x"}


def test_the_exam_is_fixed_and_shared_out() -> None:
    rows = [{"prompt": f"p{index}"} for index in range(10)]
    whole = evaluation_prompts(rows, num=7, seed=1, rank=0, world_size=1)
    assert [(prompt.text, prompt.group_id) for prompt in whole] == [(f"p{index}", index) for index in range(7)]
    shares = [evaluation_prompts(rows, num=7, seed=1, rank=rank, world_size=3) for rank in range(3)]
    assert shares == [whole[0::3], whole[1::3], whole[2::3]]
    other = evaluation_prompts(rows, num=99, seed=2, rank=0, world_size=1)
    assert len(other) == 10 and not {prompt.seed for prompt in other} & {prompt.seed for prompt in whole}
    assert evaluation_prompts(rows, num=2, seed=1, rank=3, world_size=4) == []

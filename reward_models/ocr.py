"""Text in pictures, read by RapidOCR (PP-OCRv6 small, Apache-2.0; its weights come inside the wheel).

Hao Liu et al. (Flow-GRPO, arXiv:2505.05470) reward a picture by the edit distance between the text that it should
show, in double quotes in the prompt, and the text that OCR reads. RapidOCR runs on the CPU through onnxruntime:
`pip install 'unified-rl[ocr]'`.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from reward_models.edit_distance import plain, text_score, wanted_text

BATCH = 32
DETECTION_SIDE = 256
"""Longest side that text is looked for in; the engine's own choice (shortest side 736) takes a second a picture."""
LINE_HEIGHT = 48
"""What the recogniser scales a line to, in px."""


def ocr(
    prompts: Sequence[Any],
    completions: Sequence[Image.Image],
    *,
    detect: bool = False,
    anywhere: bool = False,
    **_: Any,
) -> list[float]:
    """How well the text in each picture agrees with the quoted text of its prompt, 0 to 1.

    Args:
        prompts: each with the wanted text in double quotes.
        completions: PIL pictures of 64 px or more.
        detect: look for text first (a scene); False: the whole picture is one line of text, which is much faster.
        anywhere: 1 also where the wanted text is only a part of what is read, as in Flow-GRPO's own reward.
    """
    texts = read(completions, detect=detect)
    return [
        text_score(text, wanted_text(prompt), anywhere=anywhere) for text, prompt in zip(texts, prompts, strict=True)
    ]


def ocr_exact(
    prompts: Sequence[Any], completions: Sequence[Image.Image], *, detect: bool = False, **_: Any
) -> list[float]:
    """1.0 where the text in a picture is the quoted text of its prompt, else 0.0; case and white space do not count."""
    texts = read(completions, detect=detect)
    return [float(plain(text) == plain(wanted_text(prompt))) for text, prompt in zip(texts, prompts, strict=True)]


def read(pictures: Sequence[Image.Image], *, detect: bool) -> list[str]:
    """The text of each picture; empty where none is found."""
    arrays = [np.asarray(picture.convert("RGB"))[:, :, ::-1] for picture in pictures]  # the engine wants BGR
    return [_scene(array) for array in arrays] if detect else _lines(arrays)


def _lines(arrays: Sequence[np.ndarray]) -> list[str]:
    from rapidocr.ch_ppocr_rec.typings import TextRecInput

    texts: list[str] = []
    for start in range(0, len(arrays), BATCH):
        texts += _engine().text_rec(TextRecInput(img=list(arrays[start : start + BATCH]))).txts
    return texts


def _scene(array: np.ndarray) -> str:
    # The engine keeps the flags of its last call, so all three are always given.
    return " ".join(_engine()(array, use_det=True, use_cls=False, use_rec=True).txts or ())


@functools.cache
def _engine() -> Any:
    from rapidocr import RapidOCR

    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    engine = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Det.limit_side_len": DETECTION_SIDE,
            "Det.limit_type": "max",
            "Rec.rec_batch_num": BATCH,
            "Rec.rec_img_shape": [3, LINE_HEIGHT, LINE_HEIGHT],  # the least width; the engine's own is 320 px
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        }
    )
    blank = np.full((LINE_HEIGHT, LINE_HEIGHT, 3), 255, dtype=np.uint8)
    engine(blank, use_det=False, use_cls=False, use_rec=True)  # makes it load the recogniser, `text_rec`
    return engine

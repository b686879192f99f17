"""What scoring 256 pictures with the reward `ocr` costs, against asking the engine for one picture after the other.

    python benchmarks/ocr_reward.py

The simple way is RapidOCR with its own settings, recognition only. Both read the same words; process times are of all
threads, and on a busy machine the fairer numbers.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapidocr import RapidOCR

from reward_models.ocr import ocr_exact

WORDS = Path(__file__).parent.parent / "recipes" / "quickstart" / "words.txt"


def drawn(word: str) -> Image.Image:
    picture = Image.new("RGB", (70, 28), "white")
    ImageDraw.Draw(picture).text((35, 14), word.upper(), fill="black", font=ImageFont.load_default(19), anchor="mm")
    return picture


def timed(score: Callable[[], int]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and words read."""
    score()  # warm
    began, used = time.perf_counter(), time.process_time()
    right = score()
    return time.perf_counter() - began, time.process_time() - used, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=256)
    num = parser.parse_args().num
    prompts = WORDS.read_text().split()[:num]
    pictures = [drawn(prompt.strip('"')) for prompt in prompts]
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    settings = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": threads}
    engine = RapidOCR(params=settings)

    def simple() -> int:
        read = [engine(np.asarray(picture), use_det=False, use_cls=False, use_rec=True).txts for picture in pictures]
        wanted = [prompt.strip('"') for prompt in prompts]
        return sum((text or ("",))[0].lower() == word for text, word in zip(read, wanted, strict=True))

    rows = {"one by one": timed(simple), "reward ocr": timed(lambda: int(sum(ocr_exact(prompts, pictures))))}
    for name, (wall, cpu, right) in rows.items():
        print(f"{name}: {wall:.2f} s wall, {cpu:.2f} s CPU, {right} of {len(prompts)} words read")
    shares = [100 * rows["reward ocr"][index] / rows["one by one"][index] for index in (0, 1)]
    print(f"the reward takes {shares[0]:.0f} % of the wall and {shares[1]:.0f} % of the CPU time")


if __name__ == "__main__":
    main()

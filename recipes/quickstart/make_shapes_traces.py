"""Write the traces of the cold start: replies that think before they answer, on scenes of the train split.

    python -m recipes.quickstart.make_shapes_traces --output recipes/quickstart/shapes_traces.jsonl

A trace names the objects of its scene, row by row, in a `<think>` block and then gives the right answer. Pictures are
in the lines themselves, as data-URIs.
"""

import argparse
import base64
import io
import json
from pathlib import Path

from PIL import Image

from unified_rl.worlds import shapes


def trace(image: Image.Image, answer: str) -> str:
    """A reply that thinks: `<think> red circle , blue square </think> <answer> two </answer>`."""
    found = sorted(shapes.find_objects(image), key=lambda thing: (round(thing.y), round(thing.x)))
    seen = " , ".join(f"{thing.colour} {thing.shape}" for thing in found)
    return f"<think> {seen} </think> <answer> {answer} </answer>"


def line(row: dict) -> dict:
    """A line of `data.rollouts`."""
    buffer = io.BytesIO()
    row["image"].save(buffer, format="PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {
        "prompt": row["prompt"],
        "condition_images": [f"data:image/png;base64,{encoded}"],
        "text": trace(row["image"], row["answer"]),
        "answer": row["answer"],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl to write")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1, help="of the scenes; another one than the questions to train on")
    args = parser.parse_args()
    rows = shapes.questions("train", args.num, seed=args.seed)
    args.output.write_text("".join(json.dumps(line(row)) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

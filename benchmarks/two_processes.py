"""Samples a second of two processes on two cores against one process on one core, one thread each.

python benchmarks/two_processes.py          # needs a machine with nothing else to do; it says how busy it was
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

CASES = (("quickstart", ()), ("quickstart_vlm", ()), ("quickstart_vlm", ("prompts_per_step=32",)))
"""Recipes and what is changed; each process has the recipe's own micro-batch."""
WORK = ["num_steps=16", "epochs=1", "data.evaluation=null", "engine.threads=1", "checkpoint.every=100"]


def speed(recipe: str, words: tuple[str, ...], num_processes: int) -> float:
    """Median samples a second of the steps after the first two."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*WORK, *words, "-n", str(num_processes), "--output", folder]
        command = [sys.executable, "-m", "unified_rl.cli", "train", recipe, *arguments]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return median(row["samples_per_second"] for row in rows[2:])


def main() -> None:
    for recipe, words in CASES:
        one, two = speed(recipe, words, 1), speed(recipe, words, 2)
        what = " ".join((recipe, *words))
        print(
            f"{what}: {one:.1f} samples/s of one process, {two:.1f} of two: {two / one:.2f} times "
            f"(bar: 1.6; load {os.getloadavg()[0]:.1f}, of which ours is at most 2)"
        )


if __name__ == "__main__":
    main()

"""Samples per second of whole GRPO steps (rollout, reward, update) here and in TRL's GRPOTrainer, on the same work.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/against_trl.py [--prompts 4] [--group-size 16] [--new-tokens 16] [--steps 6] [--rounds 3]

Both train the shipped visual question answerer in full (vision tower frozen), float32, one thread, one optimiser step a
rollout, with the same questions, reward, learning rate and no divergence term. Each side runs in a process of its own,
in turns; the first two steps of a process are left out. Prints one JSON object: median seconds a step, samples per
second, their ratio, and what each side's peak memory grew by while training.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

WARM_UP = 2
MODEL = Path(__file__).parent.parent / "recipes" / "quickstart" / "shapes_vlm"
LEARNING_RATE = 1e-4


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from unified_rl.assemble import assemble
    from unified_rl.engine import distributed
    from unified_rl.recipe.file import load_recipe
    from unified_rl.run_folder.tracking import NullRun
    from unified_rl.train import collect, plan_update
    from unified_rl.update import update

    distributed.initialise()
    num_samples = arguments.prompts * arguments.group_size
    recipe = load_recipe(
        "quickstart_vlm",
        [
            *("data.evaluation=null", "engine.threads=1", f"prompts_per_step={arguments.prompts}"),
            *(f"group_size={arguments.group_size}", f"policy.sampling.max_new_tokens={arguments.new_tokens}"),
            *(f"engine.micro_batch={num_samples}", f"engine.rollout_batch={num_samples}"),
            *(f"optimizer.lr={LEARNING_RATE}", "optimizer.decay=none"),
        ],
    )
    parts = assemble(recipe, NullRun(Path()))
    before, seconds, lengths = peak_mib(), [], []
    for index in range(WARM_UP + arguments.steps):
        started = time.perf_counter()
        rollout, prepared, _ = collect(parts, index)
        for number in range(recipe.updates_per_rollout):
            windows = plan_update(parts, prepared, index, number)
            update(parts.policy, parts.engine, windows, first_update=number == 0)
        seconds.append(time.perf_counter() - started)
        lengths.append(float(rollout.trajectory.segments["text"].loss_mask.sum(1).float().mean()))
    return {"seconds": seconds[WARM_UP:], "memory": peak_mib() - before, "length": statistics.mean(lengths)}


def trl(arguments: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from unified_rl.worlds.shapes import train_questions

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.lengths: list[float] = []
            self._started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self._started)

        def on_log(self, *args: Any, logs: dict[str, float], **_: Any) -> None:
            if "completions/mean_length" in logs:
                self.lengths.append(logs["completions/mean_length"])

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        said = [completion[0]["content"] for completion in completions]
        return [float(right in text) for text, right in zip(said, answer, strict=True)]

    rows = train_questions(256)
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "image": row["image"], "answer": row["answer"]}
            for row in rows
        ]
    )
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_model" not in name)
    num_samples = arguments.prompts * arguments.group_size
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=num_samples,
        num_generations=arguments.group_size,
        max_completion_length=arguments.new_tokens,
        max_steps=WARM_UP + arguments.steps,
        learning_rate=LEARNING_RATE,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        processing_class=AutoProcessor.from_pretrained(MODEL),
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        callbacks=[clock],
    )
    before = peak_mib()
    trainer.train()
    return {
        "seconds": clock.seconds[WARM_UP:],
        "memory": peak_mib() - before,
        "length": statistics.mean(clock.lengths),
    }


def in_process(side: str) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        torch.set_num_threads(1)
        print(json.dumps({"ours": ours, "trl": trl}[arguments.side](arguments)))
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(arguments.rounds):
        for side, results in found.items():
            results.append(in_process(side))
    num_samples = arguments.prompts * arguments.group_size
    row: dict[str, Any] = {"samples_per_step": num_samples}
    for side, results in found.items():
        seconds = statistics.median(value for result in results for value in result["seconds"])
        row[side] = {
            "seconds_per_step": round(seconds, 3),
            "samples_per_second": round(num_samples / seconds, 1),
            "memory_growth_mib": round(statistics.median(result["memory"] for result in results), 1),
            "mean_completion_length": round(statistics.mean(result["length"] for result in results), 2),
        }
    row["ratio"] = round(row["trl"]["seconds_per_step"] / row["ours"]["seconds_per_step"], 2)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()

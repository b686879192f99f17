"""How many samples each preset needs to reach a held-out score on the embedded world (docs/preset_table.md).

    python benchmarks/preset_table.py >docs/preset_table.md
    python benchmarks/preset_table.py run [--settings tokens noised] [--presets a b ...] [--seeds 0 1 2] [--runs FILE]

`run` trains one recipe a preset and seed and stops it at the first evaluation that reaches the score; it appends one
JSON object a run to FILE and leaves out runs that are there already. Without it, the page is printed from FILE, which
is benchmarks/preset_runs.jsonl unless you say another. All presets of a setting share the learning rate, the batch
and the number of updates a rollout: it is a comparison of what happens when only `objective.preset` is changed, not
of each method at its best. The settings `written` look for a folder my_shapes_planner here
(docs/masked_diffusion.md).
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_rl.assemble import assemble
from unified_rl.engine import distributed
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.presets import PRESETS
from unified_rl.run_folder.tracking import open_run, read_jsonl
from unified_rl.train import StopSignal, run_loop, start

SEEDS = (0, 1, 2)
HEAD = """# Presets on the embedded world

How many samples a preset needs until the held-out score is reached, and the best score until then (or until the run's
end). Only `objective.preset` changes within a table: learning rate, batch and updates a rollout are the same for all,
and tuned for none. So it says what a preset does as it is, not which method is best. The score is looked at every few
optimiser steps, on few questions: with these few seeds, differences of less than a factor of two mean little. Made by
`benchmarks/preset_table.py`; CPU seconds, where they were kept, are of one thread and include the evaluations. They
come from several machines, some of them busy with other work: rows that differ by a factor of two may cost the same.
Not every preset was run with three seeds: each row says how many there are.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the presets of one family are compared on."""

    title: str
    recipe: str
    overrides: tuple[str, ...]
    score: str
    """Name of the held-out reward."""
    target: float
    presets: tuple[str, ...]
    changes: dict[str, tuple[str, ...]]
    """Keys that a preset needs here beside its own, with the reason in `note`."""
    note: str


DIGITS = ("group_size=8", "prompts_per_step=8", "rewards=[{name: digit_check}]", "objective.train_steps=4",
          "optimizer.lr=2.0e-4", "optimizer.decay=none", "evaluation.sampling={noise_level: 0.0}")  # fmt: skip
"""What the settings on the digits UNet share."""
SHAPES = ("group_size=8", "evaluation.every=4", "evaluation.num_prompts=128", "optimizer.decay=none")
"""And those on the shapes that tokens make."""
BOUNDED = ("grpo", "dapo", "reinforce++", "reinforce++_baseline", "gdpo", "trl_grpo", "verl_grpo", "verl_ppo")
"""Presets of tokens with a clip range, which also train denoising steps."""
TOKENS = ("grpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "sapo", "rloo", "reinforce++",
          "reinforce++_baseline", "ppo", "gdpo", "drpo", "spo", "ddpo", "trl_grpo", "trl_rloo", "verl_grpo",
          "verl_ppo", "luspo", "vespo")  # fmt: skip
MASKED = ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "rloo", "reinforce++", "reinforce++_baseline", "gdpo", "drpo",
          "spo", "ddpo", "trl_grpo", "verl_grpo", "uni_grpo")  # fmt: skip
"""Presets that need neither a critic nor the log-prob of a whole sequence."""
IMITATION = ("dpo", "rwr", "best_of_n")
TOKEN_RANGE = {"ddpo": ("objective.clip_low=0.2", "objective.clip_high=0.2")}
OWN_NOISE = "policy.sampling={num_inference_steps: 10}"


def nats(bound: float) -> tuple[str, ...]:
    """Keys of a clip range in nats of a whole step."""
    return ("objective.threshold_unit=nats", f"objective.clip_low={bound}", f"objective.clip_high={bound}")


SETTINGS = {
    "tokens": Setting(
        title="Tokens: the visual question answerer of `quickstart_vlm`",
        recipe="quickstart_vlm",
        overrides=("num_steps=120", "epochs=2", "prompts_per_step=8", "group_size=8", "evaluation.every=4",
                   "evaluation.num_prompts=192", "optimizer.decay=none", "optimizer.lr=2.0e-4"),
        score="answer",
        target=0.85,
        presets=TOKENS,
        changes=TOKEN_RANGE,
        note="`ddpo` has the clip range of tokens (0.2): its own is one of means over latent dims. `rloo` has no ratio"
        " for the second update of a rollout; `trl_rloo` has one.",
    ),
    "imitated": Setting(
        title="Tokens: the same, by imitation and by pairs",
        recipe="quickstart_vlm",
        overrides=("num_steps=120", "prompts_per_step=8", "group_size=8", "evaluation.every=4",
                   "evaluation.num_prompts=192", "optimizer.decay=none", "optimizer.lr=2.0e-4"),
        score="answer",
        target=0.85,
        presets=IMITATION,
        changes={},
        note="One update a rollout.",
    ),
    "denoiser": Setting(
        title="Denoising steps: the digits UNet of `quickstart_ddpo`, policy gradients",
        recipe="quickstart_ddpo",
        overrides=(*DIGITS, "num_steps=24", "epochs=2", "evaluation.every=6"),
        score="digit_check",
        target=0.95,
        presets=("flow_grpo", "flow_grpo_fast", "dance_grpo", "mix_grpo", "grpo_guard", "flow_dppo", "ddpo", "ppo",
                 "dr_grpo", "flow_grpo_code", *BOUNDED, "cispo", "sapo", "rloo", "spo"),
        changes={
            **{name: nats(6.6) for name in ("flow_grpo", "dance_grpo", "ddpo", "ppo", "dr_grpo",
                                              "flow_grpo_code", *BOUNDED)},
            "spo": ("objective.penalty_range=8.6e-3",),
            "mix_grpo": (*nats(6.6), OWN_NOISE),
            "flow_grpo_fast": (*nats(0.66), OWN_NOISE),
            "grpo_guard": ("objective.clip_low=1.7e-4", "objective.clip_high=1.7e-4"),
            "flow_dppo": ("objective.threshold_unit=nats", "objective.max_divergence=0.66"),
        },
        note="The presets' thresholds are means over the latent dims, of which there are 768 here: in nats of a step"
        " they are given as they are at the 65,536 dims of SD3.5 (85 times the mean). Presets of tokens have the clip"
        " range of the others (`spo` as a mean), their own is one of tokens. Hardly a step is clipped at this learning"
        " rate, so that `cispo`, `sapo`, `gdpo`, `trl_grpo` and `verl_grpo` make `dapo`'s updates, `verl_ppo` those of"
        " `reinforce++` (curves equal to 1e-3): one seed. `rloo` has no ratio for the second update of a rollout."
        " `flow_grpo_fast` and `mix_grpo` place their noise themselves.",
    ),
    "drawn": Setting(
        title="Image tokens: the Janus of `quickstart_image_tokens`",
        recipe="quickstart_image_tokens",
        overrides=(*SHAPES, "num_steps=40", "epochs=2"),
        score="shapes_strict",
        target=0.5,
        presets=TOKENS,
        changes=TOKEN_RANGE,
        note="`ddpo` has the clip range of tokens. `rloo` has no ratio for the second update of a rollout.",
    ),
    "drawn_imitated": Setting(
        title="Image tokens: the same, by imitation and by pairs",
        recipe="quickstart_image_tokens",
        overrides=(*SHAPES, "num_steps=40"),
        score="shapes_strict",
        target=0.5,
        presets=IMITATION,
        changes={},
        note="One update a rollout.",
    ),
    "written": Setting(
        title="Masked texts: the planner of docs/masked_diffusion.md",
        recipe="quickstart/plans_masked_text",
        overrides=(*SHAPES, "num_steps=40", "epochs=2"),
        score="strict",
        target=0.7,
        presets=MASKED,
        changes=TOKEN_RANGE,
        note="The planner was made in float32, on a CPU without bfloat16 instructions. `ddpo` has the clip range of"
        " tokens. `uni_grpo` scores random masks, the others the sampler's own steps.",
    ),
    "written_imitated": Setting(
        title="Masked texts: the same, by imitation and by pairs",
        recipe="quickstart/plans_masked_text",
        overrides=(*SHAPES, "num_steps=40"),
        score="strict",
        target=0.7,
        presets=IMITATION,
        changes={},
        note="One update a rollout. Temperature 1, the preset's, weighs the samples of `rwr` nearly alike.",
    ),
    "noised": Setting(
        title="Noised samples: the same model and score, methods over the forward process",
        recipe="quickstart_ddpo",
        overrides=(*DIGITS, "num_steps=24", "evaluation.every=3"),
        score="digit_check",
        target=0.95,
        presets=("diffusion_nft", "awm", "dgpo", "diffusion_dpo", "rwr", "best_of_n"),
        changes={
            "awm": ("objective.kl.coef=0.001",),
            "rwr": ("objective.subtract_mean=true",),
            "best_of_n": ("objective.subtract_mean=true",),
        },
        note="One update a rollout. `awm` has a divergence of 0.001, a fifteenth of its preset's. `rwr` and `best_of_n`"
        " have `subtract_mean: true`: why they do not rise from a model's own pictures without it is in"
        " [objectives.md](objectives.md). `best_of_n` has nothing that holds it at this learning rate: its second seed"
        " fell from 0.93 to 0.81. `diffusion_dpo` learns from two of eight samples.",
    ),
    "gradient": Setting(
        title="Gradients of a reward: the same model, judged by the same score",
        recipe="quickstart_draft",
        overrides=("evaluation.every=2", "optimizer.decay=none"),
        score="digit_check",
        target=0.95,
        presets=("draft", "draft_lv", "alignprop", "refl"),
        changes={"refl": ("objective.reward_gradient.steps=[1, 3]",)},
        note="Trained on `digit_likeness`, whose gradient is followed; the judge is another kind. `refl` decodes one of"
        " the last three of ten steps: earlier ones predict no digit yet.",
    ),
}  # fmt: skip


class UntilReached(StopSignal):
    """Stops a run once an evaluation has reached the score."""

    def __init__(self, folder: Path, key: str, target: float) -> None:
        super().__init__()
        self._file, self._key, self._target = folder / "eval.jsonl", key, target

    @property
    def exit_code(self) -> int:
        return 0

    def requested(self) -> bool:
        return any(row[self._key] >= self._target for row in read_jsonl(self._file))


def train_once(setting: Setting, preset: str, seed: int) -> dict[str, Any]:
    """One run; the curve of its held-out score by samples seen."""
    distributed.initialise()
    changes = [*setting.overrides, *setting.changes.get(preset, ())]
    recipe = load_recipe(
        setting.recipe, [f"objective={{preset: {preset}}}", f"seed={seed}", "engine.threads=1", *changes]
    )
    key = f"rewards/{setting.score}/mean"
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(Path(folder), 0)
        begun = time.process_time()
        parts = assemble(recipe, run)
        run_loop(parts, start(parts, "never"), UntilReached(Path(folder), key, setting.target))
        run.close()
        samples = {row["step"]: row["samples_seen"] for row in read_jsonl(Path(folder) / "metrics.jsonl")}
        curve = [(samples.get(row["step"], 0), row[key]) for row in read_jsonl(Path(folder) / "eval.jsonl")]
    reached = [seen for seen, score in curve if score >= setting.target]
    return {
        "preset": preset,
        "seed": seed,
        "samples": reached[0] if reached else None,
        "best": max(score for _, score in curve),
        "curve": curve,
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def run(arguments: argparse.Namespace) -> None:
    """Train what is missing in the file of runs."""
    done = {(row["setting"], row["preset"], row["seed"]) for row in read_jsonl(arguments.runs)}
    for seed in arguments.seeds:
        for name in arguments.settings:
            setting = SETTINGS[name]
            for preset in arguments.presets or setting.presets:
                if preset in setting.presets and (name, preset, seed) not in done:
                    row = {"setting": name, **train_once(setting, preset, seed)}
                    with arguments.runs.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(name, preset, seed, row["samples"], round(row["best"], 3), row["cpu_seconds"], flush=True)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["run", "table"], default="table")
    parser.add_argument("--runs", type=Path, default=Path(__file__).with_name("preset_runs.jsonl"))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments)
    else:
        table(arguments)


def table(arguments: argparse.Namespace) -> None:
    """Print the page."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_jsonl(arguments.runs):
        found[row["setting"]][row["preset"]][row["seed"]] = row
    print(HEAD)
    for name, setting in SETTINGS.items():
        if name not in found:
            print(f"## {setting.title}\n\n{_about(setting)} Not run yet.\n")
            continue
        base = max(run["curve"][0][1] for runs in found[name].values() for run in runs.values())
        print(f"## {setting.title}\n\n{_about(setting)} The base model has {base:.2f}.\n")
        print("| preset | seeds that reached it | samples to reach it, by seed | best score, by seed | CPU seconds |")
        print("| --- | --- | --- | --- | --- |")
        for preset in setting.presets:
            runs = [run for _, run in sorted(found[name][preset].items())]
            reached = [run["samples"] for run in runs]
            cells = [
                f"`{preset}`",
                f"{sum(seen is not None for seen in reached)} of {len(runs)}" if runs else "not run",
                ", ".join("not reached" if seen is None else f"{seen:,}" for seen in reached),
                ", ".join(f"{run['best']:.2f}" for run in runs),
                ", ".join(f"{run['cpu_seconds']:.0f}" for run in runs if run["cpu_seconds"] is not None),
            ]
            print("| " + " | ".join(cells) + " |")
        print()
    missing = sorted(set(PRESETS) - {preset for setting in SETTINGS.values() for preset in setting.presets})
    print(f"In none of these tables: {', '.join(f'`{preset}`' for preset in missing)}. `bicot_grpo` is measured in")
    print("[image_tokens.md](image_tokens.md); `sft` trains on recorded samples. Masked pictures have the curves of")
    print("one preset in [masked_diffusion.md](masked_diffusion.md); that others raise a reward there is tested.")


def _about(setting: Setting) -> str:
    keys = ", ".join(f"`{override}`" for override in setting.overrides)
    return (
        f"`{setting.recipe}` with {keys}; held-out `{setting.score}`, to reach: {setting.target:g}. {setting.note}"
    ).strip()


if __name__ == "__main__":
    main()

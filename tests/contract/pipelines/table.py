"""Writes the table of pipeline classes: `python -m tests.contract.pipelines.table [CLASS...]` from the repository.

Builds the named classes (default: all) and writes unified_rl/policies/pipeline_table.csv and docs/pipelines.md. Rows
of classes that no case covers (refused ones) are kept as they stand in the table: they are edited there.
"""

import csv
import dataclasses
import inspect
import sys
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import policy_of
from unified_rl.policies.pipeline_table import ONE_ROW, PipelineRow, pipeline_table

ROOT = Path(__file__).parent.parent.parent.parent
TABLE = ROOT / "unified_rl" / "policies" / "pipeline_table.csv"
DOCS = ROOT / "docs" / "pipelines.md"
HEAD = """# Diffusers pipelines

Every pipeline class that diffusers {version} exports. *exact* classes were built tiny from their configs and tried by
`tests/contract/test_pipelines.py`: full fine-tuning in float32, with guidance where the class has it (true guidance too
where it is an option), two rows of different prompts, or one after the other where a call takes one row: sampled, each
step replayed at the rollout's batch shape (no log-prob differs by more than 1e-5), the first one for the first row
alone and the last one for the last row (the same; where that step's std is as small as 0.001, as in EDM schedules,
float32's rounding of its mean moves the log-prob by up to 1e-4, and no more is allowed; two classes round more), with
finite, non-zero gradients in the denoiser, equal ones with gradient checkpointing, and no encoder of texts or pictures
run again; then LoRA in bfloat16, its first and last noisy steps replayed without any difference.
*refused* classes raise `UnsupportedPipelineError` before anything is loaded. For a class that is not listed, such
as one of your own, the check of the replay gap at a run's first rollout decides.

A scheduler is replaced by a stochastic one with the same schedule: the times of the multistep solvers (DPM-Solver,
UniPC, DEIS, SA, also with Karras sigmas and flow sigmas) stay, but steps are of first order, so that pictures of an
exam without noise are those of an Euler or DDIM sampler. Where two times of a schedule round to the
same number (Karras sigmas with SD's betas: from 45 steps on), it is refused with the most steps that are apart. Solvers
that call the denoiser twice a step (Heun, KDPM2) and PNDM are taken as DDIM with their spacing.

Guidance that remembers earlier steps (adaptive projected guidance with a momentum: ACE-Step, HunyuanImage) is replayed
from what the denoiser gave at those steps, which `policy.sampling.store_outputs: true` keeps in the rollout; without it
the first replay ends the run and says so. What is remembered counts as given, like the states: gradients go through the
step's own prediction only.

Rewards get pictures, a video's frames or, for sound, the waveform (an array) as a completion's `images`; a run keeps
waveforms among its samples as `.npy` files.

{counts}

`unified-rl list policies` prints the same table. Written by `python -m tests.contract.pipelines.table`.

| class | task | kernel | replay | note |
| --- | --- | --- | --- | --- |
"""


def exported() -> dict[str, type]:
    """The pipeline classes that diffusers exports, by their own names."""
    found = {}
    for name in dir(diffusers):
        try:
            item = getattr(diffusers, name)
        except (AttributeError, RuntimeError):  # names of which the module is gone
            continue
        if inspect.isclass(item) and issubclass(item, DiffusionPipeline) and item is not DiffusionPipeline:
            found[item.__name__] = item
    return found


def task_of(name: str) -> str:
    """What a class does, from its name and its call."""
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    if "Audio" in name or "Music" in name or "AceStep" in name or "DanceDiffusion" in name:
        return "audio"
    video = any(key in parameters for key in ("num_frames", "frames", "video", "video_length", "segment_frame_length"))
    medium = "video" if video else "image"
    if "video" in parameters:
        return "video to video"
    if "Inpaint" in name or "mask_image" in parameters:
        return "inpainting"
    if any(part in name for part in ("Edit", "Pix2Pix", "Kontext")):
        return f"{medium} editing"
    if any(part in name for part in ("Control", "Adapter")):
        return f"{medium}, controlled"
    if (parameters.get("image") is not None and parameters["image"].default is not None) or "Img2Img" in name:
        return f"image to {medium}"
    return f"text to {medium}" if "prompt" in parameters else f"{medium}"


def tried_row(case: Case) -> PipelineRow:
    policy = policy_of(case)
    return PipelineRow(
        name=case.name,
        task=task_of(case.name),
        kernel=policy._head.kernel,
        replay="exact",
        note=note_of(case),
    )


def note_of(case: Case) -> str:
    notes = [case.note] if case.note else []
    if case.rows == 1:
        notes.append(ONE_ROW)
    if case.store_outputs:
        notes.append("policy.sampling.store_outputs: true where it guides, with a momentum")
    if case.kernel != "auto":
        notes.append(f"policy.sampling.kernel: {case.kernel}, the class reads its scheduler's sigmas")
    if not case.half:
        notes.append(case.half_note)
    return "; ".join(notes)


def document(rows: list[PipelineRow]) -> str:
    kinds = [row.replay for row in rows]
    counts = f"{len(rows)} classes: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) + "."
    lines = [f"| {' | '.join(dataclasses.asdict(row).values())} |\n" for row in rows]
    return HEAD.format(version=diffusers.__version__, counts=counts) + "".join(lines)


def main(wanted: set[str]) -> None:
    rows = {row.name: row for row in pipeline_table()}
    for case in CASES:
        if case.refused is None and (not wanted or case.name in wanted or case.name not in rows):
            rows[case.name] = tried_row(case)
    ordered = [rows[name] for name in sorted(rows)]
    with TABLE.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in dataclasses.fields(PipelineRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in ordered)
    DOCS.write_text(document(ordered), encoding="utf-8")


if __name__ == "__main__":
    main(set(sys.argv[1:]))

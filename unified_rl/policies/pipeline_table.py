"""What is known of each pipeline class of the diffusers version that the tests ran with; see docs/pipelines.md.

The table is data (`pipeline_table.csv`), written and checked by the contract test. Reading it imports no torch.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRow:
    """One pipeline class."""

    name: str
    task: str
    kernel: str
    """Transition kernel of the scheduler that was tried; empty where none was."""
    replay: str
    """exact or refused. For a class without a row, the check of the replay gap at a run's first rollout decides."""
    note: str
    """Why it is refused, or what to mind."""


ONE_ROW = "one row a call: engine.micro_batch 1"
"""A note on classes of which a call takes one prompt, or mixes the pictures of several."""


def pipeline_table() -> Sequence[PipelineRow]:
    """All classes by name."""
    with files("unified_rl.policies").joinpath("pipeline_table.csv").open(encoding="utf-8") as lines:
        return [PipelineRow(**row) for row in csv.DictReader(lines)]


def refusal(name: str) -> str | None:
    """Why a class is refused, or None."""
    return next((row.note for row in pipeline_table() if row.name == name and row.replay == "refused"), None)


def takes_one_row(name: str) -> bool:
    """Whether a class is known to be wrong, or to fail, with several rows in one call."""
    return any(row.name == name and ONE_ROW in row.note.split("; ") for row in pipeline_table())

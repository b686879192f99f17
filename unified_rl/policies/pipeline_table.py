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
    """exact, refused, or untried (then the check of the replay gap at a run's first rollout decides)."""
    note: str
    """Why it is refused or untried, or what to mind."""


def pipeline_table() -> Sequence[PipelineRow]:
    """All classes by name."""
    with files("unified_rl.policies").joinpath("pipeline_table.csv").open(encoding="utf-8") as lines:
        return [PipelineRow(**row) for row in csv.DictReader(lines)]


def refusal(name: str) -> str | None:
    """Why a class is refused, or None."""
    return next((row.note for row in pipeline_table() if row.name == name and row.replay == "refused"), None)

"""Writes docs/pipelines.md: `python -m tests.contract.pipelines.table` from the repository's root."""

from pathlib import Path

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import measure, policy_of
from unified_rl.policies.scheduler_head import UnsupportedPipelineError

HEAD = """# Diffusers pipelines

Every class below was built tiny from its configs and tried by `tests/contract/test_pipelines.py` (float32, guidance
where the class has it, two rows of different prompts): sampled, each step replayed at the rollout's batch shape (gap)
and for one row alone (row gap). The gaps are the largest differences of a log-prob. *exact*: both at most 1e-5, with
finite, non-zero gradients in the denoiser. *refused*: an `UnsupportedPipelineError` says why. Classes that are not
listed have not been tried; the trainer stops if the replay gap of the first rollout is above `max_replay_gap`.

Written by `python -m tests.contract.pipelines.table`.

| class | replay | gap | row gap | reason |
| --- | --- | --- | --- | --- |
"""


def line(case: Case) -> str:
    if case.refused is None:
        measured = measure(case)
        return f"| {case.name} | exact | {measured.gap:.0e} | {measured.row_gap:.0e} | |\n"
    try:
        policy_of(case)
    except UnsupportedPipelineError as error:
        return f"| {case.name} | refused | | | {error} |\n"
    raise AssertionError(f"{case.name} is not refused")


if __name__ == "__main__":
    Path("docs").mkdir(exist_ok=True)
    Path("docs/pipelines.md").write_text(HEAD + "".join(line(case) for case in CASES), encoding="utf-8")

"""The replay contract over diffusers' pipeline classes: exact, or refused with a reason; never trained wrongly."""

from pathlib import Path

import pytest
from PIL import Image

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import Kernel, measure, policy_of, prompts_of
from unified_rl.policies.pipeline_call import call_arguments
from unified_rl.policies.scheduler_head import UnsupportedPipelineError
from unified_rl.types import Prompt

EXACT = [case for case in CASES if case.refused is None]
REFUSED = [case for case in CASES if case.refused is not None]
TOLERANCE = 1e-5


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_a_pipeline_replays_its_rollout(case: Case):
    measured = measure(case)
    assert measured.gap <= TOLERANCE, "at the rollout's batch shape"
    assert measured.row_gap <= TOLERANCE, "one row alone"
    assert 0 < measured.smallest_gradient < float("inf")


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_cannot_be_replayed_is_refused(case: Case):
    with pytest.raises(UnsupportedPipelineError, match=case.refused):
        policy_of(case).sample(prompts_of(case))


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
def test_every_flow_kernel_replays(kernel: Kernel):
    case = next(case for case in CASES if case.name == "StableDiffusion3Pipeline")
    measured = measure(case, kernel)
    assert measured.gap <= TOLERANCE and measured.row_gap <= TOLERANCE
    assert 0 < measured.smallest_gradient < float("inf")


def test_a_kernel_of_another_family_is_refused():
    case = next(case for case in CASES if case.name == "StableDiffusionPipeline")
    with pytest.raises(UnsupportedPipelineError, match="cps does not fit"):
        policy_of(case, "cps")


class NotYetReleased:
    """A call that no pipeline of diffusers has."""

    def __call__(self, prompt: str | list[str], negative_prompt: str | list[str], video: list[Image.Image], size: int):
        """Nothing."""


def rows(**columns: tuple) -> list[Prompt]:
    return [
        Prompt(text=str(row), images=(), columns={k: v[row] for k, v in columns.items()}, group_id=0, seed=row)
        for row in range(2)
    ]


def test_columns_become_arguments_by_name():
    frames = [Image.new("RGB", (2, 2))]
    prompts = rows(negative_prompt=("x", "y"), size=(8, 8), video=(frames, frames), answer=(1, 2), prompt=("p", "q"))
    assert call_arguments(NotYetReleased, prompts, {}) == {
        "prompt": ["0", "1"],
        "negative_prompt": ["x", "y"],
        "size": 8,
        "video": [frames, frames],
    }


def test_rows_that_one_call_cannot_hold_are_refused():
    with pytest.raises(UnsupportedPipelineError, match="size is one value for the whole call"):
        call_arguments(NotYetReleased, rows(size=(8, 16)), {})
    with pytest.raises(UnsupportedPipelineError, match="takes no argument 'height'"):
        call_arguments(NotYetReleased, rows(), {"height": 8})


def test_the_table_in_the_docs_names_every_case():
    text = (Path(__file__).parent.parent.parent / "docs" / "pipelines.md").read_text(encoding="utf-8")
    for case in CASES:
        assert f"| {case.name} | {'exact' if case.refused is None else 'refused'} |" in text

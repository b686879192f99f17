"""The replay contract over diffusers' pipeline classes: exact, or refused with a reason; never trained wrongly."""

import pytest

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import measure, policy_of, prompts_of
from unified_rl.policies.scheduler_head import UnsupportedPipelineError

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

"""DPO against TRL's numbers."""

from typing import Any

import pytest
import torch
from oracle_files import load, of_case

from unified_rl.objectives.preference import ScoreTerms, dpo_loss

TRL, ARRAYS = load("trl_dpo_losses")


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: f"{case['pair_form']}-{case['pair_coef']}")
def test_dpo_and_its_gradient_are_trls(case: dict[str, Any]):
    log_probs = ARRAYS["log_probs"].clone().requires_grad_()
    mask = ARRAYS["loss_mask"]
    ones = torch.ones(4, dtype=torch.float64)
    terms = ScoreTerms(
        scores=(log_probs * mask).sum(1, keepdim=True),
        ref_scores=ARRAYS["ref_log_probs"].sum(1, keepdim=True),
        old_scores=torch.zeros(8, 1),
        advantages=torch.cat([ones, -ones]),
        group_ids=torch.arange(4).repeat(2),
        weights=torch.ones(8, 1),
        lengths=mask.sum(1).double(),
        pair_coef=case["pair_coef"],
        pair_form=case["pair_form"],
        clip_low=0.2,
        clip_high=0.2,
    )
    result = dpo_loss(terms)
    result.loss.backward()
    expected = torch.tensor(case["loss"], dtype=torch.float64)
    torch.testing.assert_close(result.loss.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_probs.grad, of_case(ARRAYS, case)["grad"], rtol=1e-12, atol=1e-12)
    if case["pair_form"] != "ipo":  # TRL reports sums, which ipo's margin is not
        assert case["pair_coef"] * result.metrics["pair/margin"] == pytest.approx(case["margin"], rel=1e-12)

"""Committed tokens' log-probs and the estimators' masks, by hand."""

import math

import pytest
import torch

from unified_rl.transitions import unmask


def test_only_committed_tokens_count():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]]))
    tokens = torch.tensor([[0, 3, 2]])  # 3 is a mask: it has no logit, and is not committed
    result = unmask.log_prob(logits, tokens, torch.tensor([[True, False, True]]))
    assert result.total.item() == pytest.approx(math.log(0.5) + math.log(0.4), abs=1e-6)
    assert result.count.item() == 2
    assert result.mean.item() == pytest.approx((math.log(0.5) + math.log(0.4)) / 2, abs=1e-6)
    nothing = unmask.log_prob(logits, tokens, torch.zeros(1, 3, dtype=torch.bool))
    assert nothing.total.item() == 0 and nothing.mean.item() == 0


def test_random_masks_keep_to_their_range():
    masks = unmask.random_masks(200, 20, low=0.25, high=0.5, generator=torch.Generator().manual_seed(0))
    counts = masks.sum(1)
    assert counts.min() >= 5 and counts.max() <= 10 and len(counts.unique()) > 3
    assert masks.float().mean(0).std() < 0.05, "no place is preferred"
    fewest = unmask.random_masks(50, 20, low=0.0, high=0.0, generator=torch.Generator())
    assert (fewest.sum(1) == 1).all()


def test_coupled_masks_are_complementary_pairs():
    masks = unmask.coupled_masks(50, 9, low=0.0, high=1.0, generator=torch.Generator().manual_seed(0))
    assert masks.shape == (100, 9)
    assert (masks[0::2] ^ masks[1::2]).all()
    assert masks.any(1).all()
    with pytest.raises(ValueError, match="two tokens"):
        unmask.coupled_masks(1, 1, low=0.1, high=0.9, generator=torch.Generator())

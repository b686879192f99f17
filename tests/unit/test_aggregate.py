"""Aggregation: hand-computed weights, and that cutting a batch changes nothing."""

from typing import get_args

import pytest
import torch

from unified_rl.objectives.aggregate import Aggregation, counts, weights

MASK = torch.tensor([[True, True, True, True], [False, True, False, False], [False] * 4, [True, True, False, False]])


def test_counts_by_hand() -> None:
    assert counts(MASK) == (7, 3)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", [1 / 7, 1 / 7, 0.0, 1 / 7]),
        ("sequence_mean", [1 / 12, 1 / 3, 0.0, 1 / 6]),
        ("sequence_sum", [1 / 3, 1 / 3, 0.0, 1 / 3]),
        ("constant", [1 / 30, 1 / 30, 0.0, 1 / 30]),
    ],
)
def test_weights_by_hand(mode: Aggregation, expected: list[float]) -> None:
    got = weights(MASK, mode, num_steps=7, num_sequences=3, max_length=10)
    torch.testing.assert_close(got, torch.tensor(expected).unsqueeze(1) * MASK)


@pytest.mark.parametrize("mode", get_args(Aggregation))
def test_windows_sum_to_the_loss_of_the_whole(mode: Aggregation) -> None:
    """Two processes, windows of rows and of steps: the same loss and gradient as one process with one window."""
    torch.manual_seed(0)
    loss_mask = torch.rand(8, 6) < 0.6
    loss_mask[3] = False
    per_step = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    num_steps, num_sequences = counts(loss_mask)
    arguments = {"num_steps": num_steps, "num_sequences": num_sequences, "max_length": 6, "dtype": torch.float64}
    whole = (per_step * weights(loss_mask, mode, **arguments)).sum()
    (expected,) = torch.autograd.grad(whole, per_step)

    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 5), slice(5, 8)):
        process_weights = weights(loss_mask[rows], mode, **arguments)
        for row in range(len(process_weights)):
            for steps in (slice(0, 4), slice(4, 6)):
                total = total + (per_step[rows][row, steps] * process_weights[row, steps]).sum()
    (gradient,) = torch.autograd.grad(total, per_step)
    torch.testing.assert_close((total, gradient), (whole, expected), rtol=1e-12, atol=1e-14)


def test_named_aggregations_are_what_they_say() -> None:
    torch.manual_seed(0)
    per_step, loss_mask = torch.randn(3, 4, dtype=torch.float64), MASK[[0, 1, 3]]
    rows = [values[mask] for values, mask in zip(per_step, loss_mask, strict=True)]
    arguments = {"num_steps": 7, "num_sequences": 3, "max_length": 4, "dtype": torch.float64}
    expected = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
        "sequence_sum": torch.stack([row.sum() for row in rows]).mean(),
        "constant": torch.cat(rows).sum() / 12,
    }
    for mode in get_args(Aggregation):
        torch.testing.assert_close((per_step * weights(loss_mask, mode, **arguments)).sum(), expected[mode])


@pytest.mark.parametrize("mode", get_args(Aggregation))
def test_a_batch_without_steps_has_weights_zero(mode: Aggregation) -> None:
    got = weights(torch.zeros(2, 3, dtype=torch.bool), mode, num_steps=0, num_sequences=0, max_length=3)
    assert got.dtype == torch.float32 and got.eq(0.0).all()


def test_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="known: token_mean"):
        weights(MASK, "mean", num_steps=7, num_sequences=3, max_length=4)  # type: ignore[arg-type]

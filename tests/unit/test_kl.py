"""KL estimators: hand-computed numbers, and their expectations on a distribution with a known KL."""

import math

import pytest
import torch

from unified_rl.objectives.kl import Estimator, estimate


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_estimators_by_hand(estimator: Estimator, expected: float) -> None:
    got = estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), estimator)
    torch.testing.assert_close(got, torch.tensor([[expected]]))


def known_kl() -> tuple[torch.Tensor, torch.Tensor, float]:
    log_p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    log_q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    return log_p, log_q, float((log_p.exp() * (log_p - log_q)).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    log_p, log_q, expected = known_kl()
    values = estimate(log_p[None], log_q[None], estimator)[0]
    assert float((log_p.exp() * values).sum()) == pytest.approx(expected, rel=1e-12)


def test_k2_has_the_gradient_of_the_kl() -> None:
    _, log_q, _ = known_kl()
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    p = log_p.exp()
    (exact,) = torch.autograd.grad((p * (log_p - log_q)).sum(), logits, retain_graph=True)
    (surrogate,) = torch.autograd.grad((p.detach() * estimate(log_p[None], log_q[None], "k2")[0]).sum(), logits)
    torch.testing.assert_close(surrogate, exact)


def test_k3_keeps_its_digits_near_zero_and_stays_finite_far_away() -> None:
    near = estimate(torch.tensor([[0.0]]), torch.tensor([[1e-3]]), "k3")
    assert float(near) == pytest.approx(0.5e-6, rel=1e-3)
    log_probs = torch.tensor([[-500.0, 0.0]], requires_grad=True)
    far = estimate(log_probs, torch.tensor([[0.0, -500.0]]), "k3")
    far.sum().backward()
    torch.testing.assert_close(far.detach(), torch.tensor([[math.exp(20.0) - 21.0, math.exp(-20.0) + 19.0]]))
    assert log_probs.grad is not None and log_probs.grad.tolist() == [[0.0, 0.0]]


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="known: k1, k2, k3"):
        estimate(torch.zeros(1, 1), torch.zeros(1, 1), "gaussian")  # type: ignore[arg-type]

"""Coefficients that follow a measurement. Their state is a few floats, so that a resumed run goes on exactly."""

import math
from collections.abc import Mapping

MAX_ERROR = 1.0
"""The relative error of one measurement is cut here: one wild update must not move the coefficient by orders."""
MAX_LOG_CHANGE = 7.0
"""The coefficient stays within exp(+-7), about three orders of magnitude, of where it began; the integral stops there
too (anti-windup)."""


class KLController:
    """A coefficient that keeps a divergence at its target: proportional-integral control of its logarithm.

    error = clip(kl / target - 1, -1, 1); coef = initial * exp(gain_p * error + gain_i * sum of errors). Ziegler et al.
    2019 (arXiv 1909.08593, section 2.2) have the integral part alone, as a product of factors 1 + 0.1 * error.
    """

    def __init__(self, initial: float, target: float, gain_p: float, gain_i: float) -> None:
        self._initial, self._target = initial, target
        self._gain_p, self._gain_i = gain_p, gain_i
        self._integral = 0.0
        self.coef = initial

    def observe(self, kl: float) -> None:
        """Take the divergence of one optimiser step, in nats a step of the policy; a non-finite one counts as large."""
        error = kl / self._target - 1.0 if math.isfinite(kl) else MAX_ERROR
        error = max(-MAX_ERROR, min(MAX_ERROR, error))
        self._integral = _within(self._integral + self._gain_i * error)
        self.coef = self._initial * math.exp(_within(self._integral + self._gain_p * error))

    def state(self) -> dict[str, float]:
        """What `restore` needs, as JSON."""
        return {"integral": self._integral, "coef": self.coef}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` returned."""
        self._integral, self.coef = state["integral"], state["coef"]


class EntropyController:
    """An entropy coefficient that grows by a fixed step while the entropy is below its target and shrinks else, and
    that acts only below the target: Skywork-OR1 (He et al. 2025, arXiv 2505.22312, section 4)."""

    def __init__(self, initial: float, target: float, step: float) -> None:
        self._value, self._target, self._step = initial, target, step
        self._below = True

    @property
    def coef(self) -> float:
        """The coefficient of the next update; 0 while the entropy is above the target."""
        return self._value if self._below else 0.0

    def observe(self, entropy: float) -> None:
        """Take the mean entropy of one optimiser step, in nats a step of the policy."""
        self._below = entropy <= self._target
        self._value = max(0.0, self._value + (self._step if self._below else -self._step))

    def state(self) -> dict[str, float]:
        """What `restore` needs, as JSON."""
        return {"value": self._value, "below": float(self._below)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` returned."""
        self._value, self._below = state["value"], bool(state["below"])


def _within(change: float) -> float:
    return max(-MAX_LOG_CHANGE, min(MAX_LOG_CHANGE, change))

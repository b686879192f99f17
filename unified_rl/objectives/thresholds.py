"""Thresholds of Gaussian steps in nats, converted to the means over dims that the losses compare them with."""

import math


def mean_bounds(low: float, high: float, num_dims: int) -> tuple[float, float]:
    """Clip range of exp(mean log-ratio) for bounds on the log-ratio itself.

    A step's log-ratio may then go from -low to +high nats, whatever the resolution: the range of the mean's exponential
    is [exp(-low / D), exp(high / D)].

    Args:
        low, high: nats, at least 0.
        num_dims: D, latent dimensions of a step.

    Returns:
        Distances of the bounds from 1.
    """
    return -math.expm1(-low / num_dims), math.expm1(high / num_dims)


def mean_divergence(nats: float, num_dims: int) -> float:
    """A divergence of the whole step as the mean over its dims."""
    return nats / num_dims

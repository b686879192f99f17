"""A differentiable reward: how likely a small network finds the digit that the prompt names.

The network is trained, at first use (about two seconds), on the same handwritten digits as `digit_check`, but it is
another kind of judge: train on this one, and let `digit_check` tell whether that helped.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_models.digit_check import FAINTEST_CONTRAST, SIDE, _not_digits, named_digit, strokes

if TYPE_CHECKING:
    from torch import Tensor, nn

GREY = (0.299, 0.587, 0.114)
LEAST = -8.0
"""Log-probabilities are cut here softly, in nats, so that one hopeless picture does not outweigh all others."""


@functools.cache
def _network() -> nn.Module:
    """The trained network: features [B, 64] to logits [B, 11], the digits and last "no digit"."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    rng = np.random.default_rng(1)
    images, labels = load_digits(return_X_y=True)
    grey = 1.0 - images.reshape(-1, SIDE, SIDE) / 16.0
    digits = np.concatenate([strokes(grey), strokes(grey + rng.normal(0.0, 0.06, grey.shape))])
    others = _not_digits(digits, rng)
    features = torch.tensor(np.concatenate([digits, others]), dtype=torch.float32)
    wanted = torch.tensor(np.concatenate([labels, labels, np.full(len(others), 10)]))
    with torch.enable_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(SIDE * SIDE, 64), nn.SiLU(), nn.Linear(64, 11))
        adam = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
        for _ in range(300):
            rows = torch.randint(len(features), (512,))
            loss = nn.functional.cross_entropy(network(features[rows]), wanted[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
    return network.requires_grad_(False)


def _features(pictures: Tensor) -> Tensor:
    """`digit_check.strokes` of pictures [B, 3, H, W] in [0, 1], with gradients: [B, 64]."""
    import torch

    grey = (pictures * torch.tensor(GREY).to(pictures)[:, None, None]).sum(1, keepdim=True)
    grey = torch.nn.functional.adaptive_avg_pool2d(grey, SIDE)[:, 0]
    edges = grey[:, :, [0, -1]].flatten(1).sort(1).values
    paper = edges[:, SIDE - 1 : SIDE + 1].mean(1)[:, None, None]
    contrast = (grey - paper).abs()
    peak = contrast.amax(dim=(1, 2), keepdim=True).clamp(min=FAINTEST_CONTRAST)
    return (contrast / peak).flatten(1)


def digit_likeness(prompts: Sequence[Any], completions: Tensor, **columns: Any) -> Tensor:
    """The log-probability, in [-8, 0] nats, that each picture shows the digit named in its prompt.

    Args:
        prompts: one per picture, each naming a digit: "a handwritten seven", "the digit 7".
        completions: pictures [B, 3, H, W] in [0, 1]; gradients flow into them.
        **columns: the data set's other columns; not looked at.
    """
    import torch

    log_probs = _network().to(completions.device)(_features(completions.float())).log_softmax(1)
    wanted = torch.tensor([named_digit(prompt) for prompt in prompts], device=completions.device)
    found = log_probs.gather(1, wanted[:, None])[:, 0]
    return LEAST * torch.tanh(found / LEAST)


digit_likeness.differentiable = True  # type: ignore[attr-defined]

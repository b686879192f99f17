"""The training loop that the scripts beside it share: a mean loss, averaged weights, and CPU time as the clock."""

import time
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.quickstart import script
from recipes.quickstart.make_shapes_sd3 import learning_rate_at

EMA_DECAY = 0.995


def fit(parts: nn.Module, loss_of: Callable[[], Tensor], *, minutes: float, learning_rate: float, name: str) -> None:
    """Train for some minutes of CPU time on `loss_of()` and leave the averaged weights in `parts`."""
    parts.train().requires_grad_(True)
    average = deepcopy(parts)
    params, averaged = list(parts.parameters()), list(average.parameters())
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": 0.01},
        {"params": [param for param in params if param.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    began, step, running = time.process_time(), 0, 0.0
    while (progress := (time.process_time() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_at(progress, step)
        # PyTorch's fused attention is slow to differentiate on CPUs at this size.
        with sdpa_kernel(SDPBackend.MATH), script.autocast():
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, params, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        step += 1
        running += loss.item()
        if step % 100 == 0:
            print(f"{name}: {60 * minutes * progress:6.0f} s  step {step:6d}  loss {running / 100:.4f}", flush=True)
            running = 0.0
    parts.load_state_dict(average.state_dict())
    parts.eval().requires_grad_(False)

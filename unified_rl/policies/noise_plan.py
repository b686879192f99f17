"""Where the noise of a rollout goes: which steps of a sampling loop are stochastic, and so trained; the others are ODE.

A plan is a function of the recipe's seed and the rollout's number, so it is the same on all processes and after a
resume. Fewer noisy steps cost fewer training forwards and less memory: only their states are stored.

- Sliding window: MixGRPO, Li et al. 2025, arXiv 2507.21802, algorithm 1 and section 3.3 (progressive, random, and
  decaying: an interval of ceil(every * exp(-rate * max(0, start - threshold))) rollouts at window start `start`).
- Branch at a random step: Flow-GRPO-Fast (Liu et al. 2025, arXiv 2505.05470, section on the fast variant).
"""

import hashlib
import math
import random

from unified_rl.errors import RecipeError
from unified_rl.recipe.policy import DiffusionSampling, NoiseShift


def noisy_steps(sampling: DiffusionSampling, *, seed: int, rollout: int) -> list[int] | None:
    """The stochastic steps of rollout number `rollout`, ascending; None: all, however many the loop has."""
    if sampling.noise_steps is None and sampling.noise_range is None:
        return None
    first, stop = sampling.noise_range or (0, sampling.num_inference_steps)
    steps = range(first, stop)
    size = min(sampling.noise_steps or len(steps), len(steps))
    positions = len(steps) - size + 1
    if sampling.noise_place == "random":
        return sorted(_drawn("subset", seed, rollout).sample(steps, size))
    start = 0
    if sampling.noise_place == "branch":
        start = _drawn("branch", seed, rollout).randrange(positions)
    elif sampling.noise_place == "window":
        start = window_start(sampling.noise_shift, positions, seed=seed, rollout=rollout)
    return list(steps[start : start + size])


def check_plan(sampling: DiffusionSampling, num_steps: int, *, noisy: int) -> None:
    """Refuse a plan that the loop cannot keep: a pipeline that starts from a picture leaves out its first steps.

    Args:
        num_steps: of the loop.
        noisy: how many of them were stochastic in this rollout.

    Raises:
        RecipeError: at the first rollout already, whatever step it drew.
    """
    if sampling.noise_level == 0:
        return
    if noisy == 0:
        raise RecipeError(f"policy.sampling: none of the {num_steps} steps of the loop is noisy; see noise_range")
    first, stop = sampling.noise_range or (0, sampling.num_inference_steps)
    if sampling.noise_place != "first" and num_steps < stop:
        raise RecipeError(
            f"policy.sampling.noise_range: noise_place {sampling.noise_place} may choose any step from {first} to"
            f" {stop - 1}, but the loop has {num_steps} (strength shortens it); say [{first}, {num_steps}]"
        )


def window_start(shift: NoiseShift, positions: int, *, seed: int, rollout: int) -> int:
    """Where a sliding window lies in a rollout: one of `positions` starts; behind the last one it begins anew."""
    if shift.schedule == "random":
        return _drawn("window", seed, rollout // shift.every).randrange(positions)
    starts = range(0, positions, shift.stride)
    if shift.schedule == "progressive":
        return starts[rollout // shift.every % len(starts)]
    lengths = [math.ceil(shift.every * math.exp(-shift.rate * max(0, start - shift.threshold))) for start in starts]
    rest = rollout % sum(lengths)
    for start, length in zip(starts, lengths, strict=True):
        if rest < length:
            return start
        rest -= length
    raise AssertionError("the lengths add up to more than the rest")


def shares_initial_noise(sampling: DiffusionSampling) -> bool:
    """Whether the trajectories of a group start from the same noise; one that branches off is one until then."""
    return sampling.initial_noise == "group" or sampling.noise_place == "branch"


def group_seed(seed: int, group_id: int) -> int:
    """The seed of a group's common initial noise; group ids differ from rollout to rollout."""
    digest = hashlib.sha256(f"group/{seed}/{group_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stored_steps(noisy: list[bool]) -> list[int]:
    """The steps whose results a replay of the noisy steps needs, of a loop with one kind of latents: each noisy step's
    own and the one that it starts from; and the finished sample."""
    steps = {step for step, is_noisy in enumerate(noisy) if is_noisy}
    return sorted(steps | {step - 1 for step in steps if step} | {len(noisy) - 1})


def _drawn(what: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{what}/{seed}/{number}")

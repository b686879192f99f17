"""What `validate` says about where the noise of a diffusion loop goes."""

from unified_rl.policies.noise_plan import noisy_steps
from unified_rl.recipe.policy import DiffusionSampling
from unified_rl.recipe.schema import Recipe


def noise_lines(recipe: Recipe) -> list[tuple[str, str]]:
    """Which steps of a diffusion loop are stochastic, for as many rollouts as show how that changes."""
    sampling = recipe.policy.sampling
    if not isinstance(sampling, DiffusionSampling):
        return []
    if sampling.noise_level == 0:
        return [("noise", "none: every step follows the ODE")]
    every = sampling.noise_shift.every if sampling.noise_place == "window" else 1
    plans = [noisy_steps(sampling, seed=recipe.seed, rollout=index * every) for index in range(3)]
    runs = [_run(list(range(sampling.num_inference_steps)) if plan is None else plan) for plan in plans]
    if sampling.noise_place == "first":
        return [("noise", f"in steps {runs[0]} of {sampling.num_inference_steps}")]
    shown = ", ".join(f"{run} from rollout {index * every}" for index, run in enumerate(runs))
    return [("noise", f"in steps {shown}, ... of {sampling.num_inference_steps} ({sampling.noise_place})")]


def _run(steps: list[int]) -> str:
    """Steps, from 0: a run by its ends."""
    if len(steps) > 1 and steps[-1] - steps[0] == len(steps) - 1:
        return f"{steps[0]}-{steps[-1]}"
    return "+".join(map(str, steps))

"""What `validate` says of methods that are no policy gradients; no torch."""

from unified_rl.recipe.method_rules import METHOD_KINDS, OLD_METHODS
from unified_rl.recipe.objective import Objective

METHOD_MEANINGS = {
    "policy_gradient": "policy gradient over recorded steps",
    "nft": "contrast of finished samples, noised again: good ones attract, bad ones repel",
    "awm": "clipped ratio of denoising errors, weighted by advantages",
    "sft": "imitation of samples, as much as their advantage says",
    "dpo": "preference of the group's best to its worst, against the reference",
    "reward_gradient": "gradient of differentiable rewards through the picture and the last steps",
    "dgpo": "advantage-weighted denoising errors, weighed by group against the reference",
}


SCORED = ("sft", "dpo", "dgpo")
"""Methods whose scores are denoising errors, if there is a denoiser."""


def method_lines(objective: Objective) -> list[tuple[str, str]]:
    """(name, text) of the method and the keys that it uses."""
    lines = []
    for name, method in (("method", objective.method), ("beside", objective.beside)):
        if method is not None:
            text = METHOD_MEANINGS.get(method, f"your own: {method}")
            used = _used_keys(objective, method)
            coef = f", times {objective.beside_coef:g}" if name == "beside" and objective.beside_coef != 1 else ""
            lines.append((name, text + coef + (f" ({', '.join(used)})" if used else "")))
    return lines


def _used_keys(objective: Objective, method: str) -> list[str]:
    keys: list[str] = []
    if method == "nft":
        keys = ["mix_coef"]
    elif method == "awm":
        keys = ["error_weight", "clip_low", "clip_high"]
    elif method == "dpo":
        keys = ["pair_form", "pair_coef"]
    elif method == "dgpo":
        keys = ["pair_coef", "clip_low", "clip_high"]
    elif method == "sft" and objective.advantage == "exponential":
        keys = ["temperature"]
    if method == "sft" and objective.subtract_mean:
        keys.append("subtract_mean")
    if method in SCORED and objective.error_weight is not None:
        keys.append("error_weight")
    if method in OLD_METHODS or method not in METHOD_KINDS:
        keys.append("old_weights")
    if objective.train_steps is not None and method != "policy_gradient":
        keys.append("train_steps")
    if method == "reward_gradient":
        return [f"{key} {value}" for key, value in objective.reward_gradient.model_dump(exclude_none=True).items()]
    return [f"{key} {getattr(objective, key)}" for key in keys]

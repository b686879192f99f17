"""The methods of `objective.method`, and combinations of them with other keys that make no sense. No torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from unified_rl.errors import nearest

if TYPE_CHECKING:
    from unified_rl.recipe.objective import Objective
    from unified_rl.recipe.schema import Recipe

METHOD_KINDS = {
    "policy_gradient": "steps",
    "nft": "denoising",
    "awm": "denoising",
    "sft": "scores",
    "dpo": "scores",
    "dgpo": "scores",
    "reward_gradient": "reward",
}
"""What the loss of each method is a function of: the log-probs of steps, a denoiser's prediction for noised samples,
the scores of all samples together, or a differentiable reward."""
REFERENCE_METHODS = {"dpo", "dgpo"}
"""Methods that always compare with the reference."""
OLD_METHODS = {"nft", "awm", "dgpo"}
"""Methods that compare with old weights."""
GROUP_METHODS = {"dpo", "dgpo"}
"""Methods that need the members of a group in the same update."""
IMITATED = ("uniform", "exponential", "best")
"""Advantages that say how much a sample is imitated."""
GRADIENT_KEYS = (
    "ratio", "loss", "dual_clip", "delta", "correction", "old_log_probs", "off_policy_mask", "entropy_coef",
    "entropy_target", "top_entropy", "stop_kl",
)  # fmt: skip
"""Keys that only policy gradients use."""
LARGEST_TEXT_COEF = 50.0


def method_refusals(objective: "Objective", tokens: bool) -> Iterator[tuple[str, str]]:
    """(key, reason and alternative) for each combination that is refused.

    Args:
        tokens: the steps are tokens, not denoising steps.
    """
    yield from _of_the_method(objective, tokens)
    yield from _of_the_advantage(objective)
    if objective.subtract_mean and "sft" in objective.methods:
        yield from _of_the_contrast(objective, tokens)
    yield from _of_the_kl(objective, tokens)
    if "steps" not in objective.kinds:
        defaults = type(objective).model_fields
        for key in GRADIENT_KEYS:
            if getattr(objective, key) != defaults[key].default:
                yield key, f"only policy gradients use it, not {objective.method}; leave it out"
    if objective.old_weights != "trained" and not OLD_METHODS & {*objective.methods} and None not in objective.kinds:
        yield "old_weights", f"{objective.method} compares with no old policy; leave it out"


def method_conflicts(objective: "Objective", recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """(key path, reason and alternative) for what a method needs of the whole recipe."""
    methods = {*objective.methods}
    if "reward_gradient" in methods and recipe.updates_per_rollout > 1:
        yield (
            "objective.method",
            "reward_gradient goes on from the rollout's states, which other weights do not reach; take epochs: 1 and"
            " minibatches: 1",
        )
    if recipe.minibatches > 1 and methods & GROUP_METHODS:
        name = min(methods & GROUP_METHODS)
        yield "minibatches", f"{name} compares the members of a group, which minibatches take apart; use epochs"
    old = objective.old_weights
    if old != "trained" and old not in recipe.all_snapshots:
        known = list(recipe.all_snapshots)
        yield "objective.old_weights", f"no snapshot {old!r}{nearest(old, known) if known else ''}; add it to snapshots"
    if old == "trained" and recipe.updates_per_rollout > 1 and methods & {"nft", "awm"}:
        yield (
            "objective.old_weights",
            f"{recipe.updates_per_rollout} updates a rollout need the old policy: say old, with"
            " snapshots: {old: {decay: 0, clock: rollout}}",
        )


def data_conflicts(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """(key path, reason and alternative) for what recorded samples, or the lack of them, rule out."""
    data = recipe.data
    if recipe.record_rollouts and recipe.policy.family not in ("causal_lm", "diffusion"):
        yield "record_rollouts", f"{recipe.policy.family} policies cannot train on recorded samples; leave it out"
    if recipe.record_rollouts and data.rollouts is not None:
        yield "record_rollouts", "these samples are recorded already; leave it out"
    if recipe.policy.writer is not None and (recipe.record_rollouts or data.rollouts is not None):
        key = "record_rollouts" if recipe.record_rollouts else "data.rollouts"
        yield key, "recorded samples hold no texts of a policy.writer beside their pictures; leave it out"
    if recipe.policy.environment is not None and (recipe.record_rollouts or data.rollouts is not None):
        key = "record_rollouts" if recipe.record_rollouts else "data.rollouts"
        yield key, "episodes of a policy.environment cannot be recorded; leave it out"
    if recipe.policy.writer is not None:
        for name, objective in recipe.objective.items():
            if objective.advantage == "gae":
                yield f"objective.{name}.advantage", "gae has no critic for a policy.writer's chain; use group_std"
    kinds = {kind for objective in recipe.objective.values() for kind in objective.kinds}
    if bool(data.prompts) == (data.rollouts is not None):
        yield "data", "give prompts to sample for, or rollouts that were recorded; one of them"
    if data.rollouts is None:
        return
    if recipe.resample:
        yield "resample", "redraws samples, recorded ones are what they are; leave it out"
    if recipe.rollout_weights != "trained":
        yield "rollout_weights", "recorded samples are drawn by no weights; leave it out"
    if "reward" in kinds:
        yield (
            "objective.method",
            "reward_gradient goes on from states that are not recorded; use nft or sft",
        )
    if "steps" in kinds and recipe.policy.family == "diffusion":
        yield (
            "objective.method",
            "policy_gradient needs the chain that drew a picture, which is not recorded; use nft, awm, sft or dpo",
        )


def _of_the_method(objective: "Objective", tokens: bool) -> Iterator[tuple[str, str]]:
    for key, method in (("method", objective.method), ("beside", objective.beside)):
        kind = METHOD_KINDS.get(method or "")
        if tokens and kind == "denoising":
            yield key, f"{method} noises finished samples, which tokens cannot be; use policy_gradient, sft or dpo"
        if tokens and kind == "reward":
            yield key, f"{method} needs samples with a gradient, tokens have none; use policy_gradient"
        if tokens and method == "dgpo":
            yield key, "dgpo weighs denoising errors; use dpo, or policy_gradient"
        if method == "dpo" and tokens and objective.pair_coef > LARGEST_TEXT_COEF:
            yield "pair_coef", f"{objective.pair_coef:g} is for denoising errors; for texts use preset dpo, or 0.1"
        if method == "dpo" and not tokens and objective.pair_coef < 1:
            yield (
                "pair_coef",
                f"{objective.pair_coef:g} is for texts; denoising errors are means over dims: use preset"
                " diffusion_dpo, or 2000",
            )
    if objective.beside == objective.method:
        yield "beside", f"{objective.method} is the method already; leave it out"
    fewest, most = objective.reward_gradient.steps
    if not 1 <= fewest <= most:
        yield "reward_gradient.steps", f"[{fewest}, {most}] is no range of steps; write [fewest, most], from 1 on"


def _of_the_advantage(objective: "Objective") -> Iterator[tuple[str, str]]:
    advantage = objective.advantage
    for method in objective.methods:
        if method == "sft" and advantage not in IMITATED:
            yield (
                "advantage",
                f"{advantage} has negative values, and what is pushed away without bound breaks the model; for sft"
                " use uniform, best or exponential",
            )
        if method == "dpo" and advantage != "best_worst":
            yield "advantage", f"{advantage} names no pairs; for dpo use best_worst"
        if method in ("policy_gradient", "nft", "awm", "dgpo") and advantage in (*IMITATED, "best_worst"):
            instead = "pass_k" if advantage == "best" and method == "policy_gradient" else "group_std"
            yield "advantage", f"{advantage} is for sft and dpo; for {method} use {instead}"


def _of_the_contrast(objective: "Objective", tokens: bool) -> Iterator[tuple[str, str]]:
    if tokens:
        yield (
            "subtract_mean",
            "would push worse texts away without bound; leave it out (texts are drawn from what is fitted), or use"
            " policy_gradient",
        )
    elif objective.advantage == "uniform":
        yield "subtract_mean", "leaves nothing of uniform weights; use exponential or best"


def _of_the_kl(objective: "Objective", tokens: bool) -> Iterator[tuple[str, str]]:
    kl = objective.kl
    if not kl.coef:
        return
    if "steps" in objective.kinds:
        if kl.estimator == "prediction":
            yield "kl.estimator", "prediction is for methods over the forward process; use gaussian"
        return
    if objective.kinds == {"reward"}:
        yield "kl", "reward_gradient evaluates no step again; lower optimizer.lr, or put nft or awm beside it"
    elif tokens:
        yield "kl", f"{objective.method} has none for tokens (dpo holds the reference inside); leave it out"
    elif kl.estimator != "prediction":
        yield "kl.estimator", f"{kl.estimator} compares steps, {objective.method} has none; say prediction"
    elif kl.place == "reward":
        yield "kl.place", f"{objective.method} adds it to the loss; say place: loss"

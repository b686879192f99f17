"""Warnings about objectives that can run and do not do what they look like: keys without an effect, clip ranges in
another family's unit, stale samples. No torch."""

from collections.abc import Iterator

from unified_rl.recipe.method_rules import IMITATED
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.objective_rules import CATEGORICAL
from unified_rl.recipe.presets import PRESETS
from unified_rl.recipe.schema import Recipe

UNDIVIDED = ("group_mean", "rloo", "gae", *IMITATED, "best_worst")
"""Advantages without a std of rewards."""
WIDE_CLIP = 0.05
"""Of means over latent dims: 50 nats of a step of 1000 dims."""
NARROW_CLIP = 1e-3
"""Of single tokens: rounding and the next update cut most of them."""


def advice(recipe: Recipe) -> list[str]:
    """One line a finding: where, what and why."""
    found = []
    for name, objective in recipe.objective.items():
        where = "objective." if name == "all" else f"objective.{name}."
        family = recipe.policy.family_of(name)
        lines = [
            *((key, f"has no effect, {why}") for key, why in _idle(objective, family)),
            *_off_policy(objective, family, recipe.updates_per_rollout),
        ]
        if objective.method == "sft" and objective.advantage == "uniform" and recipe.data.rollouts is None:
            lines.append(("advantage", "uniform imitates the policy's own samples whatever their rewards; use best"))
        if _imitates_its_sampler(objective, family) and recipe.data.rollouts is None:
            lines.append(
                (
                    "subtract_mean",
                    "a denoiser that imitates its own samples learns the errors of its sampler too, often faster than"
                    " what is better; say subtract_mean: true",
                )
            )
        found += [f"{where}{key}: {text}" for key, text in lines]
    return found


def _imitates_its_sampler(objective: Objective, family: str) -> bool:
    weighted = objective.method == "sft" and objective.advantage in ("exponential", "best")
    return weighted and family not in CATEGORICAL and not objective.subtract_mean


def _off_policy(objective: Objective, family: str, updates: int) -> Iterator[tuple[str, str]]:
    """What only matters from the second update of a rollout on."""
    if "steps" not in objective.kinds or updates == 1:
        return
    narrow, wide = sorted((objective.clip_low, objective.clip_high))
    if objective.loss == "reinforce":
        remedy = "say epochs: 1 and minibatches: 1, or loss: clip with ratio: token"
        yield "loss", f"reinforce has no ratio, and {updates} updates of a rollout make its samples stale; {remedy}"
    elif objective.loss == "clip" and family in CATEGORICAL:
        if objective.ratio == "token" and narrow < NARROW_CLIP:
            yield "clip_low", f"{narrow:g} cuts nearly every token from the second update on; say 0.2, as is usual"
    elif objective.loss == "spo" and family not in CATEGORICAL and objective.penalty_range > WIDE_CLIP:
        given = objective.penalty_range
        yield "penalty_range", f"{given:g} of log-probs that are means over the latent dims holds nothing; say 1e-4"
    elif objective.loss in ("clip", "guard") and objective.threshold_unit == "mean" and wide > WIDE_CLIP:
        remedy = "papers have 1e-4 or less, or say threshold_unit: nats"
        yield "clip_high", f"{wide:g} of log-probs that are means over the latent dims never clips; {remedy}"


def _idle(objective: Objective, family: str) -> Iterator[tuple[str, str]]:
    """(key, who would use it) for keys that the recipe gives and nothing uses. What a preset gives is not the user's
    doing, and a method or loss of the user's own may use anything."""
    preset = PRESETS[objective.preset][1] if objective.preset else {}
    own_method, own_loss = None in objective.kinds, ":" in objective.loss
    for key, used, by in (*_uses(objective, family), *_uses_of_blocks(objective)):
        block, _, last = key.rpartition(".")
        holder = getattr(objective, block) if block else objective
        filled = preset.get(block, {}) if block else preset
        value, default = getattr(holder, last), type(holder).model_fields[last].default
        from_preset = filled.get(last, default)
        given = value not in (default, tuple(from_preset) if isinstance(from_preset, list) else from_preset)
        if given and not used and not own_method and not (own_loss and key in LOSS_KEYS):
            yield key, f"only {by} uses it"


LOSS_KEYS = ("clip_low", "clip_high", "penalty_range", "max_divergence")
"""What `StepTerms` hands on to a loss of the user's own."""


def _uses(objective: Objective, family: str) -> Iterator[tuple[str, bool, str]]:
    """(key, whether something uses it, what would)."""
    methods, advantage = {*objective.methods}, objective.advantage
    steps, compared = "steps" in objective.kinds, objective.kinds != {"reward"}
    loss = objective.loss if steps else ""
    divides = advantage not in UNDIVIDED and compared
    bounded = {"awm", "dgpo"} & methods
    yield (
        "advantage_clip",
        compared and advantage not in (*IMITATED, "best_worst"),
        "an advantage that compares rewards",
    )
    yield "std_eps", divides, "an advantage that divides by a std"
    yield "population_std", divides, "an advantage that divides by a std"
    yield "prompt_buffer", advantage == "prompt_std", "advantage prompt_std"
    yield "prompt_min_count", advantage == "prompt_std", "advantage prompt_std"
    yield "temperature", advantage == "exponential", "advantage exponential"
    yield "subtract_mean", "sft" in methods, "method sft"
    yield "beside_coef", objective.beside is not None, "beside"
    yield "mix_coef", "nft" in methods, "method nft"
    scored = family not in CATEGORICAL and {"sft", "dpo", "dgpo"} & methods
    yield "error_weight", "awm" in methods or bool(scored), "a method over denoising errors"
    yield "pair_coef", bool({"dpo", "dgpo"} & methods), "method dpo or dgpo"
    yield "pair_form", "dpo" in methods, "method dpo"
    yield "clip_low", bool(bounded) or loss in ("clip", "guard"), "loss clip or guard"
    yield "clip_high", bool(bounded) or loss in ("clip", "guard", "cispo"), "loss clip, guard or cispo"
    yield "penalty_range", loss in ("drpo", "spo"), "loss drpo or spo"
    yield "max_divergence", loss == "dppo", "loss dppo"
    yield "entropy_step", objective.entropy_target is not None, "entropy_target"
    yield "overlong_margin", objective.overlong == "penalty", "overlong: penalty"
    yield "train_steps", compared, "a method that trains steps or noise levels"
    texts = "sft" in methods and family in CATEGORICAL
    yield "aggregation", steps or texts, "a policy gradient, or sft on texts,"


def _uses_of_blocks(objective: Objective) -> Iterator[tuple[str, bool, str]]:
    """The same of the blocks inside an objective."""
    kl, correction = objective.kl, objective.correction
    for key in ("estimator", "place", "reference"):
        yield f"kl.{key}", kl.coef > 0, "a kl.coef above 0"
    for key in ("gain_p", "gain_i"):
        yield f"kl.{key}", kl.target is not None, "kl.target"
    for key in ("level", "cap"):
        yield f"correction.{key}", correction.mode != "none", "a correction.mode"
    yield "correction.floor", correction.mode == "mask", "correction.mode mask"
    kind = objective.reward_gradient.kind if "reward" in objective.kinds else ""
    yield "reward_gradient.kind", bool(kind), "method reward_gradient"
    yield "reward_gradient.steps", kind in ("last_steps", "clean_prediction"), "last_steps or clean_prediction"
    yield "reward_gradient.copies", kind == "renoised", "reward_gradient.kind renoised"
    yield "reward_gradient.margin", bool(kind), "method reward_gradient"

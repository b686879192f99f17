"""Combinations of objective keys that make no sense: where, why, and what to do instead. No torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from unified_rl.recipe.method_rules import method_refusals

if TYPE_CHECKING:
    from unified_rl.recipe.objective import Objective

LOSS_NAMES = ["clip", "cispo", "sapo", "reinforce", "vespo", "drpo", "spo", "guard", "dppo"]
"""Keys of `objectives.policy_gradient.LOSSES`, which needs torch (a test holds them equal)."""
GAUSSIAN_LOSSES = ("guard", "dppo")
"""Losses that compare the means of Gaussian steps."""
SEQUENCE_RATIOS = ("sequence", "sequence_token", "sequence_product")
"""Ratios that need all steps of a row in one forward."""
ALL_AT_ONCE = {"causal_lm", "image_tokens"}
"""Families that evaluate all steps of a sequence in one forward."""
CATEGORICAL = ALL_AT_ONCE | {"masked_diffusion", "masked_text"}
"""Families whose steps are drawn from a vocabulary."""


def refusals(objective: "Objective", family: str) -> Iterator[tuple[str, str]]:
    """(key, reason and alternative) for each combination that is refused."""
    yield from method_refusals(objective, family in CATEGORICAL)
    yield from _of_the_steps(objective, family)
    yield from _of_the_family(objective, family)
    yield from _of_the_kl(objective)
    yield from _of_the_loss(objective)
    yield from _of_the_critic(objective, family)


def _of_the_steps(objective: "Objective", family: str) -> Iterator[tuple[str, str]]:
    if family in CATEGORICAL:
        if objective.kl.estimator == "gaussian" and objective.kl.coef:
            yield "kl", "gaussian needs Gaussian steps; use k3 for tokens"
        if objective.loss in GAUSSIAN_LOSSES:
            yield "loss", f"{objective.loss} compares means of Gaussian steps, tokens have none; use clip or drpo"
        if objective.threshold_unit != "mean":
            yield "threshold_unit", "a token's log-prob is in nats already; leave it out"


def _of_the_family(objective: "Objective", family: str) -> Iterator[tuple[str, str]]:
    if family in ALL_AT_ONCE:
        if objective.train_steps is not None:
            yield "train_steps", "for denoising steps; tokens are trained together"
        return
    if objective.overlong == "penalty" and family == "masked_text":
        yield "overlong", "counts tokens, and this trajectory is of denoising steps; use mask"
    elif objective.overlong != "keep" and family != "masked_text":
        yield "overlong", "for completions of tokens; every denoising trajectory has the same length"
    if objective.threshold_unit == "nats":
        if objective.loss not in ("clip", "dppo"):
            yield "threshold_unit", f"nats are for clip and dppo, not for the bounds of {objective.loss}; use mean"
        if objective.kl.target is not None and objective.kl.estimator != "gaussian":
            yield "kl.estimator", f"{objective.kl.estimator} of means over dims has no value in nats; use gaussian"
        if objective.kl.target is not None and objective.kl.place == "reward":
            yield "kl.target", "in nats is for a divergence in the loss; say kl.place: loss, or threshold_unit: mean"
    if objective.loss == "drpo" and family not in CATEGORICAL:
        yield "loss", "drpo weighs by a token's probability, which a density of denoising steps is not; use spo"
    if objective.ratio in SEQUENCE_RATIOS:
        yield "ratio", f"{objective.ratio} needs all steps in one forward; use token"
    if objective.off_policy_mask is not None:
        yield "off_policy_mask", "needs all steps in one forward; use correction {mode: mask, level: sequence}"
    if objective.entropy_coef or objective.entropy_target is not None or objective.top_entropy < 1:
        key = "top_entropy" if objective.top_entropy < 1 else "entropy_coef"
        yield key, "the entropy of denoising steps is not evaluated (Gaussian noise is fixed); use kl against collapse"


def _of_the_kl(objective: "Objective") -> Iterator[tuple[str, str]]:
    kl = objective.kl
    if kl.target is not None and not kl.coef:
        yield "kl.target", "needs a coef above 0 to start from; try 0.01"
    if kl.coef and kl.place == "loss" and kl.estimator == "k1":
        yield "kl.estimator", "k1 has no gradient on average in the loss; say place: reward, or use k2 or k3"
    if kl.coef and kl.place == "reward" and objective.advantage == "gdpo":
        yield "kl.place", "gdpo normalises each reward by itself, a penalty on their sum has no place; use loss"


def _of_the_loss(objective: "Objective") -> Iterator[tuple[str, str]]:
    loss, ratio = objective.loss, objective.ratio
    if "steps" in objective.kinds and loss == "reinforce" and ratio != "none":
        yield "ratio", f"reinforce has no ratio, not even {ratio}; say ratio: none, or loss: clip"
    if loss in LOSS_NAMES and loss != "reinforce" and ratio == "none":
        yield "ratio", f"{loss} is a function of the ratio; say ratio: token, or loss: reinforce"
    if loss in GAUSSIAN_LOSSES and ratio != "token":
        yield "ratio", f"{loss} acts on each step; use token"
    if ratio in ("sequence", "sequence_token") and objective.aggregation == "token_mean":
        yield "aggregation", "with a sequence's ratio token_mean counts long sequences more; use sequence_mean"
    if loss == "vespo" and ratio != "sequence_product":
        yield "ratio", f"vespo weighs whole sequences, not {ratio}; use sequence_product"
    if loss == "cispo" and objective.clip_high < 1:
        yield "clip_high", f"cispo's is the bound itself, so {objective.clip_high:g} scales all down; try 5.0"
    for key, value in (("dual_clip", objective.dual_clip), ("delta", objective.delta)):
        if value is not None and loss in LOSS_NAMES and loss != "clip":
            yield key, f"bounds the clip loss and does nothing for {loss}; leave it out"
    correction = objective.correction
    if correction.mode != "none" and objective.old_log_probs == "rollout":
        yield "correction", "compares recomputed log-probs with the rollout's; say old_log_probs: recompute"
    if objective.overlong == "penalty" and objective.advantage == "gdpo":
        yield "overlong", "gdpo normalises each reward by itself, a penalty on their sum has no place; use mask"
    if correction.floor > correction.cap:
        yield "correction.floor", "above cap, so that everything is masked; lower it"
    if objective.advantage == "prompt_std" and objective.prompt_min_count > objective.prompt_buffer:
        yield "prompt_min_count", "more than prompt_buffer can hold, so a prompt's past is never used; lower it"


def _of_the_critic(objective: "Objective", family: str) -> Iterator[tuple[str, str]]:
    critic = objective.critic
    if objective.advantage != "gae":
        if critic != type(critic)():
            kind = objective.advantage
            yield "critic", f"{kind} compares rewards with each other and has no critic; leave it out, or use gae"
        return
    if family in ("masked_diffusion", "masked_text"):
        yield "advantage", f"gae has no critic for {family} policies yet; use group_std"
    if objective.ratio in ("sequence", "sequence_product"):
        yield "ratio", "gae has an advantage for each step, a sequence's ratio one for all; use token or sequence_token"
    if critic.trunk_gradient and critic.network == "separate":
        yield "critic.trunk_gradient", "for a head on the policy; a separate network always trains its own trunk"
    if family not in ALL_AT_ONCE and (critic.network == "separate" or critic.trunk_gradient):
        key = "trunk_gradient" if critic.trunk_gradient else "network"
        yield f"critic.{key}", "a denoising step's critic always is a network of its own; leave it out"

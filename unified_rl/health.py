"""Why a run does not learn: what the metrics of its steps say, as warnings for events.jsonl."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unified_rl.engine import distributed
from unified_rl.recipe.schema import Recipe
from unified_rl.stragglers import Stragglers

PATIENCE = 5
"""Rollouts in a row without any difference between rewards before a warning."""
NOISE_MARGIN = 3.0
"""A clip range has to be this many times the replay gap, else it cuts rounding noise (verl-omni, pull request 291)."""
ENTROPY_LEFT = 0.1
"""Share of the run's first entropy below which it has collapsed."""
MIN_WITH_GRADIENT = 0.1
"""Share of the samples with an advantage below which a rollout is mostly wasted."""
MOSTLY = 0.5
USELESS_CRITIC = 0.0
"""Explained variance below which a critic is worse than a constant."""
MAX_KL = {"kl": 1.0, "update_kl": 1.0}
"""Nats a step from the reference, or from the start of the update, that no healthy run has."""
MAX_MEAN_KL = {"kl": 0.1, "update_kl": 0.01}
"""The same of denoising steps, whose log-probs are means over the latent dims: every dim half a step's std away from
the reference; a log-ratio of 0.14 a dim, where clip ranges are 1e-4."""


class Health:
    """Watches the rows of metrics.jsonl. A warning is given once, and again only after its cause went away."""

    def __init__(self, recipe: Recipe) -> None:
        clipped = [
            objective
            for objective in recipe.objective.values()
            if objective.loss in ("clip", "guard") and objective.threshold_unit == "mean"
        ]
        self._clip = min((min(each.clip_low, each.clip_high) for each in clipped), default=math.inf)
        # With one update a rollout every ratio is 1, and no clip acts.
        self._clips = recipe.updates_per_rollout > 1
        # A distance of predictions is in no nats; one that large is no better.
        distance = any(each.kl.coef > 0 and each.kl.estimator == "prediction" for each in recipe.objective.values())
        self._max_kl = MAX_MEAN_KL if recipe.log_probs_are_means and not distance else MAX_KL
        self._unit = "nats a dim and step" if self._max_kl is MAX_MEAN_KL else "nats a step"
        self._grouped = recipe.group_size > 1
        self._flat = self._sparse = self._blind = 0
        self._first_entropy: float | None = None
        self._told: set[str] = set()
        self._stragglers = Stragglers(recipe.engine.straggler_factor, distributed.world_size())

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Know what the rows of a resumed run's metrics.jsonl said, so that it is warned as if it had not stopped."""
        for row in rows:
            known = {key: value for key, value in row.items() if value is not None}
            self.observe(known, new_rollout=known.get("time/rollout", 0.0) > 0.0)

    def observe(self, row: Mapping[str, float], *, new_rollout: bool) -> list[str]:
        """The warnings that a row adds.

        Args:
            new_rollout: the row is that of the first update of a rollout.
        """
        if new_rollout:
            flat = self._grouped and row.get("frac_reward_zero_std") == 1.0
            self._flat = self._flat + 1 if flat else 0
            sparse = not flat and row.get("frac_samples_with_gradient", 1.0) < MIN_WITH_GRADIENT
            self._sparse = self._sparse + 1 if sparse else 0
            self._blind = self._blind + 1 if row.get("value/explained_variance", 1.0) < USELESS_CRITIC else 0
        entropy = row.get("entropy")
        if self._first_entropy is None and entropy is not None:
            self._first_entropy = entropy
        found = dict(self._causes(row, new_rollout))
        fresh = [message for cause, message in found.items() if cause not in self._told]
        # The replay gap and the rewards are only known at a rollout's first update; later rows keep what they said.
        kept = set() if new_rollout else self._told & {"noise", "flat", "gradient", "sparse", "critic"}
        self._told = set(found) | kept
        return [*fresh, *self._stragglers.observe(row)]

    def _causes(self, row: Mapping[str, float], new_rollout: bool) -> Iterator[tuple[str, str]]:
        if new_rollout:
            yield from self._of_a_rollout(row)
        entropy = row.get("entropy", math.inf)
        if self._first_entropy and entropy < ENTROPY_LEFT * self._first_entropy:
            message = (
                f"entropy collapsed from {self._first_entropy:.3g} to {entropy:.3g} nats a step: samples of a group "
            )
            yield "entropy", message + "become alike; raise entropy_coef or kl.coef, or lower the learning rate"
        for key, where in (("kl", "the reference"), ("update_kl", "the rollout's policy")):
            if row.get(key, 0.0) > self._max_kl[key]:
                message = f"{key} is {row[key]:.3g} {self._unit}: the policy runs away from {where}; "
                yield key, message + "lower the learning rate, raise kl.coef, or set stop_kl"
        overflow = row.get("ratio/overflow", 0.0)
        if overflow > 0.0:
            message = f"{100 * overflow:.2g} % of the log-ratios were beyond +-20 nats and cut: "
            yield "overflow", message + "these steps have no gradient; lower the learning rate"

    def _of_a_rollout(self, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        gap = row.get("replay_gap", 0.0)
        clip = min(self._clip, row.get("clip_range", math.inf))  # the latter: of those that are given in nats
        if self._clips and gap * NOISE_MARGIN > clip:
            message = f"the clip range {clip:.3g} is under {NOISE_MARGIN:g} times the replay gap {gap:.1e}: "
            yield "noise", message + "rounding decides what is clipped; widen clip_low and clip_high, or use float32"
        if self._flat >= PATIENCE:
            message = f"all rewards of each group were equal in {self._flat} rollouts in a row: nothing can be learnt; "
            yield "flat", message + "is the task too hard or too easy, or the sampling too cold?"
        elif row.get("frac_samples_with_gradient", 1.0) == 0.0 and row.get("frac_reward_zero_std") != 1.0:
            yield "gradient", "no sample has an advantage although rewards differ: this rollout teaches nothing"
        if self._sparse >= PATIENCE:
            share = 100 * row["frac_samples_with_gradient"]
            message = f"only {share:.2g} % of the samples had an advantage in {self._sparse} rollouts in a row: "
            yield (
                "sparse",
                message + "most of the work is wasted; set resample, or choose prompts of middling difficulty",
            )
        if self._blind >= PATIENCE:
            explained = row["value/explained_variance"]
            message = f"the critic explains less than a constant ({explained:.2g}) in {self._blind} rollouts in a row: "
            remedy = "raise optimizer.critic_lr or epochs, or lower them if value/loss swings"
            if row.get("value/clip_fraction", 0.0) > MOSTLY:
                remedy = "critic.value_clip holds most of its values back; give it in units of the reward, or null"
            yield "critic", message + remedy

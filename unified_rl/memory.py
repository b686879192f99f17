"""What a run's objectives remember from update to update; part of a checkpoint, so that a resumed run goes on exactly.

Empty for most recipes. Equal on every process, because it only sees reduced metrics and gathered rewards.
"""

from collections.abc import Mapping
from typing import Any

from unified_rl.advantages import PromptStatistics
from unified_rl.objectives.control import EntropyController, KLController
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.schema import Recipe


class Memory:
    """Controllers and running statistics, by block of `objective`."""

    def __init__(self, recipe: Recipe) -> None:
        self._kl: dict[str, KLController] = {}
        self._entropy: dict[str, EntropyController] = {}
        self._prompts: dict[str, PromptStatistics] = {}
        self._measured: dict[str, str] = {}
        """The metric that a divergence's target is about."""
        for name, objective in recipe.objective.items():
            kl = objective.kl
            self._measured[name] = "kl_nats" if objective.threshold_unit == "nats" else "kl"
            if kl.target is not None:
                self._kl[name] = KLController(kl.coef, kl.target, kl.gain_p, kl.gain_i)
            if objective.entropy_target is not None:
                self._entropy[name] = EntropyController(
                    objective.entropy_coef, objective.entropy_target, objective.entropy_step
                )
            if objective.advantage == "prompt_std":
                self._prompts[name] = PromptStatistics(
                    objective.prompt_buffer,
                    objective.prompt_min_count,
                    std_eps=objective.std_eps,
                    population_std=objective.population_std,
                )
        self._blocks = list(recipe.objective)
        self._asked = [recipe.engine.micro_batch, recipe.engine.micro_batch_tokens]
        self.halvings = 0
        """How often an update that did not fit into memory has halved the recipe's windows."""

    def block(self, segment: str) -> str:
        """The block of `objective` that a segment uses."""
        return segment if segment in self._blocks else "all"

    def kl_coef(self, segment: str, objective: Objective) -> float:
        """The coefficient of the next update."""
        controller = self._kl.get(self.block(segment))
        return controller.coef if controller else objective.kl.coef

    def entropy_coef(self, segment: str, objective: Objective) -> float:
        """The coefficient of the next update."""
        controller = self._entropy.get(self.block(segment))
        return controller.coef if controller else objective.entropy_coef

    def prompts(self, segment: str) -> PromptStatistics:
        """The running statistics of a segment whose advantage is prompt_std."""
        return self._prompts[self.block(segment)]

    def observe(self, row: Mapping[str, float]) -> dict[str, float]:
        """Take the metrics of one update (means over all its trained steps); returns the coefficients that follow."""
        coefs = {}
        for name, controller in self._kl.items():
            if self._measured[name] in row:
                controller.observe(row[self._measured[name]])
            coefs["kl_coef" if name == "all" else f"kl_coef/{name}"] = controller.coef
        for name, adaptive in self._entropy.items():
            if "entropy" in row:
                adaptive.observe(row["entropy"])
            coefs["entropy_coef" if name == "all" else f"entropy_coef/{name}"] = adaptive.coef
        return coefs

    def state(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "kl": {name: controller.state() for name, controller in self._kl.items()},
            "entropy": {name: controller.state() for name, controller in self._entropy.items()},
            "prompts": {name: statistics.state() for name, statistics in self._prompts.items()},
            "windows": {"asked": self._asked, "halvings": self.halvings},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned. What the recipe has now and the state lacks (the recipe was changed) starts
        anew, and the other way round is left out."""
        windows = state.get("windows", {})
        if windows.get("asked") == self._asked:
            self.halvings = windows["halvings"]
        kinds: list[tuple[str, Mapping[str, Any]]] = [
            ("kl", self._kl),
            ("entropy", self._entropy),
            ("prompts", self._prompts),
        ]
        for kind, parts in kinds:
            for name, part in parts.items():
                if name in state.get(kind, {}):
                    part.restore(state[kind][name])

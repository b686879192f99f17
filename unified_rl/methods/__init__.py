"""What a rollout is trained with: a table from `objective.method` to the function that plans an optimiser step.

A plan is a list of windows. Each is one forward and backward and carries its loss, so that the trainer runs policy
gradients, denoising objectives, preferences and gradients of rewards alike, also beside each other. Denominators, and
whatever else is known only of all samples together, are settled over all processes while planning: neither windows nor
processes change an update.

Another objective is one function of tensors and one line in a table of `objectives`:

- `forward_process.FORWARD_LOSSES`: from a denoiser's prediction for a noised sample to its loss;
- `preference.SCORE_LOSSES`: from the scores of all samples of an update to one loss;
- `policy_gradient.LOSSES`: from the log-probs of steps to their losses (`objective.loss`).

or, from outside the package, such a function named in the recipe as `package.module:function`.
"""

from collections.abc import Callable

from unified_rl.assemble import Parts
from unified_rl.methods import denoising, gradients, reward_gradient, scores
from unified_rl.methods.planning import Planned, kind_of
from unified_rl.prepare import Prepared
from unified_rl.windows import Window

PLANS: dict[str, Callable[[Parts, Prepared, Planned], list[Window]]] = {
    "steps": gradients.plan,
    "denoising": denoising.plan,
    "scores": scores.plan,
    "reward": reward_gradient.plan,
}
"""By the kind of a method: what its loss is a function of."""


def plan_windows(parts: Parts, prepared: Prepared, index: int, number: int) -> list[Window]:
    """The windows of one segment for update `number` of rollout `index`."""
    objective = prepared.objective
    windows = []
    for method, coef in ((objective.method, 1.0), (objective.beside, objective.beside_coef)):
        if method is not None:
            planned = Planned(method=method, coef=coef, index=index, number=number)
            windows += PLANS[kind_of(method)](parts, prepared, planned)
    return windows

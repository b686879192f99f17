"""Policy gradients over the recorded steps of a rollout: see `update.window_loss`."""

from dataclasses import replace

from unified_rl.assemble import Parts
from unified_rl.methods.planning import Planned, rows_of
from unified_rl.prepare import Prepared, chosen_steps
from unified_rl.update import window_loss
from unified_rl.windows import Window, cut, make_target


def plan(parts: Parts, prepared: Prepared, planned: Planned) -> list[Window]:
    """Windows of (rows x steps)."""
    recipe, memory = parts.recipe, parts.memory
    rows = rows_of(recipe, prepared, planned)
    steps = chosen_steps(prepared.name, prepared.segment, recipe, planned.index, planned.number)
    target = make_target(
        prepared,
        rows=rows,
        steps=steps,
        max_steps=parts.policy.max_steps[prepared.name],
        kl_coef=memory.kl_coef(prepared.name, prepared.objective),
        entropy_coef=memory.entropy_coef(prepared.name, prepared.objective),
    )
    if planned.coef != 1.0:
        target = replace(target, weights=target.weights * planned.coef)
    return cut(target, parts.policy, recipe, rows, steps, window_loss)

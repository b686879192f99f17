"""What a run is made of, loaded from its recipe."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unified_rl.data.prompts import PromptSampler
from unified_rl.data.recorded import RecordedSampler, check_recorded, load_recorded, weights_of
from unified_rl.data.sources import load_rows
from unified_rl.engine import build_engine, distributed
from unified_rl.engine.files import check_folder
from unified_rl.errors import RecipeError
from unified_rl.evaluate import load_exam
from unified_rl.health import Health
from unified_rl.memory import Memory
from unified_rl.policies import build_policy, check_rows
from unified_rl.policies.critic import add_critics
from unified_rl.protocols import ChecksPrompts, Console, EncodesAhead, Engine, Policy
from unified_rl.recipe.schema import Recipe
from unified_rl.recorder import Recorder
from unified_rl.rewards.gradients import DifferentiableReward, load_differentiable
from unified_rl.rewards.scoring import LoadedReward, load_rewards
from unified_rl.run_folder.tracking import Run, make_console
from unified_rl.snapshots import Snapshots
from unified_rl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a run is made of."""

    recipe: Recipe
    policy: Policy
    engine: Engine
    snapshots: Snapshots
    rewards: Sequence[LoadedReward]
    sampler: PromptSampler
    exam: Sequence[Prompt]
    run: Run
    console: Console
    memory: Memory
    differentiable: Sequence[DifferentiableReward] = ()
    """Rewards whose gradient is trained on."""
    recorder: Recorder | None = None
    """Keeps the rollouts, if the recipe asks for it."""
    health: Health


def build_sampler(recipe: Recipe) -> PromptSampler:
    """The prompts of every rollout, with their samples if they were recorded."""
    counts = {"seed": recipe.seed, "group_size": recipe.group_size, "prompts_per_step": recipe.prompts_per_step}
    if recipe.data.rollouts is not None:
        groups = load_recorded(recipe.data.rollouts, weights_of(recipe), recipe.group_size)
        check_recorded(recipe, groups)
        return RecordedSampler(groups, **counts)
    rows = load_rows(recipe.data.prompts, "data.prompts")
    check_rows(recipe, rows, "data.prompts")
    may_skip = recipe.data.on_bad_image == "skip"
    return PromptSampler(rows, **counts, max_skipped=recipe.data.max_bad_images if may_skip else None)


def assemble(recipe: Recipe, run: Run) -> Parts:
    """Load everything that a run needs, cheap things first."""
    if recipe.engine.offload_folder is not None:
        check_folder(recipe.engine.offload_folder)
    rewards = load_rewards(recipe.rewards, device=str(distributed.device()))
    sampler = build_sampler(recipe)
    share = len(sampler.rollout(0, rank=distributed.rank(), world_size=distributed.world_size()))
    if share % recipe.minibatches:
        raise RecipeError(f"minibatches: {recipe.minibatches} does not divide the {share} samples of each process")
    exam = load_exam(recipe)
    torch.manual_seed(recipe.seed)  # adapters are initialised at random
    policy = build_policy(recipe, distributed.device())
    if isinstance(policy, ChecksPrompts):
        sampler.check = policy.check
    recorder = Recorder(run.path, policy, distributed.rank()) if recipe.record_rollouts else None
    if isinstance(policy, EncodesAhead):
        policy.encode_ahead(itertools.chain(sampler.every_prompt(), exam))
    if any(objective.advantage == "gae" for objective in recipe.objective.values()):
        policy = add_critics(policy, recipe, sampler.rollout(0, rank=0, world_size=1)[:1])
    by_gradient = any("reward" in objective.kinds for objective in recipe.objective.values())
    engine = build_engine(policy.module, recipe, num_steps=recipe.num_steps)
    snapshots = Snapshots(engine, recipe.all_snapshots)
    if recipe.kl_reference is not None:
        # The reference moves with the weights: in place of the policy's own, a copy that the trainer keeps.
        policy.reference = functools.partial(snapshots.use, recipe.kl_reference)  # type: ignore[method-assign]
    return Parts(
        recipe=recipe,
        policy=policy,
        engine=engine,
        snapshots=snapshots,
        rewards=rewards,
        sampler=sampler,
        exam=exam,
        run=run,
        console=make_console(distributed.rank() > 0, recipe.num_steps),
        memory=Memory(recipe),
        differentiable=load_differentiable(recipe.rewards, str(distributed.device())) if by_gradient else (),
        recorder=recorder,
        health=Health(recipe),
    )

"""Policies: how a generator's steps are drawn and evaluated again. The only code that knows model families."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from unified_rl.protocols import Policy
    from unified_rl.recipe.schema import Recipe


def build_policy(recipe: "Recipe", device: "torch.device") -> "Policy":
    """Load the recipe's model as a policy (imports only the libraries of its family).

    Raises:
        RecipeError: if the model cannot be read, or the adapter matches nothing.
        UnsupportedPipelineError: if a pipeline cannot be replayed exactly.
    """
    from unified_rl.errors import RecipeError
    from unified_rl.recipe.policy import PIPELINES, SAMPLING, exam_sampling

    _quiet_libraries()
    block = recipe.policy
    evaluation: Any = SAMPLING[block.family].model_validate(
        exam_sampling(block.sampling.model_dump(), recipe.evaluation.sampling)
    )
    with_reference = any(objective.needs_reference for objective in recipe.objective.values())
    try:
        if block.writer is not None:
            from unified_rl.policies.chain import load_chain

            return load_chain(recipe, evaluation=evaluation, device=device)
        if block.family in PIPELINES:
            from unified_rl.policies.diffusion import DiffusionPolicy
            from unified_rl.policies.masked_diffusion import MaskedDiffusionPolicy

            pipeline = MaskedDiffusionPolicy if block.family == "masked_diffusion" else DiffusionPolicy
            return pipeline.load(
                block, evaluation=evaluation, with_reference=with_reference, device=device, seed=recipe.seed
            )
        if block.family == "masked_text":
            from unified_rl.policies.masked_text import MaskedTextPolicy

            return MaskedTextPolicy.load(block, evaluation=evaluation, with_reference=with_reference, device=device)
        from unified_rl.data.environments import load_environment
        from unified_rl.policies.action import ActionPolicy
        from unified_rl.policies.causal_lm import CausalLMPolicy
        from unified_rl.policies.image_tokens import ImageTokensPolicy

        kind = ImageTokensPolicy if block.family == "image_tokens" else CausalLMPolicy
        around = block.environment
        make = None if around is None else load_environment(around.name, around.arguments)
        policy = kind.load(
            block,
            evaluation=evaluation,
            with_reference=with_reference,
            entropy_gradient=any(
                objective.entropy_coef > 0 or objective.entropy_target is not None
                for objective in recipe.objective.values()
            ),
            device=device,
        )
        if around is None or make is None:
            return policy
        return ActionPolicy(policy, make, around)
    except OSError as error:  # what both libraries raise for a missing or unreadable checkpoint
        reason = " ".join(str(error).split())
        raise RecipeError(f"policy.model: {block.model} cannot be loaded: {reason}") from error


def check_rows(recipe: "Recipe", rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Make sure, before the model is loaded, that it can take the conditions that the rows of a dataset bring, and as
    many rows at once as the recipe says.

    Args:
        where: the recipe key of the rows, for instance "data.prompts"; errors begin with it.

    Raises:
        RecipeError: if a pipeline has no argument for a condition or a setting, needs one that rows lack, or takes one
            row a call.
    """
    if recipe.policy.family == "diffusion":
        from unified_rl.policies.conditions import check_batches, check_call, check_conditions

        _quiet_libraries()
        check_call(recipe.policy, recipe.evaluation.sampling)
        check_conditions(recipe.policy, rows, where)
        check_batches(recipe.policy, recipe.engine)


def _quiet_libraries() -> None:
    """Keep loading bars and advice out of the run's console; errors are raised all the same."""
    import os

    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    # transformers imports deepspeed when it saves; said here, it does not look for an accelerator and warn.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

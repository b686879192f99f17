"""Policies: how a generator's steps are drawn and evaluated again. The only code that knows model families."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from unified_rl.protocols import Policy
    from unified_rl.recipe import Recipe


def build_policy(recipe: "Recipe", device: "torch.device") -> "Policy":
    """Load the recipe's model as a policy (imports only the libraries of its family).

    Raises:
        RecipeError: if the model cannot be read, or the adapter matches nothing.
        UnsupportedPipeline: if a pipeline cannot be replayed exactly.
    """
    from unified_rl.recipe import SAMPLING, RecipeError

    block = recipe.policy
    evaluation = SAMPLING[block.family].model_validate({**block.sampling.model_dump(), **recipe.evaluation.sampling})
    with_reference = any(objective.kl.coef > 0 for objective in recipe.objective.values())
    try:
        if block.family == "diffusion":
            from unified_rl.policies.diffusion import DiffusionPolicy

            return DiffusionPolicy.load(block, evaluation=evaluation, with_reference=with_reference, device=device)
        from unified_rl.policies.causal_lm import CausalLMPolicy

        return CausalLMPolicy.load(
            block,
            evaluation=evaluation,
            with_reference=with_reference,
            entropy_gradient=any(objective.entropy_coef > 0 for objective in recipe.objective.values()),
            device=device,
        )
    except OSError as error:  # what both libraries raise for a missing or unreadable checkpoint
        reason = " ".join(str(error).split())
        raise RecipeError(f"policy.model: {block.model} cannot be loaded: {reason}") from error

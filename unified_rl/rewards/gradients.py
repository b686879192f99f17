"""Differentiable rewards as functions of pictures with gradients, inside this process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from unified_rl.errors import RecipeError
from unified_rl.imports import load_import
from unified_rl.recipe.reward import RewardBlock
from unified_rl.rewards.conventions import for_parameters, make_reward, marked
from unified_rl.rewards.scoring import arguments_of, reference_of
from unified_rl.rewards.types import RewardError
from unified_rl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferentiableReward:
    """A reward marked with `differentiable = True`, or the method `with_gradient` of one that has it."""

    name: str
    weight: float
    function: Callable

    def of(self, prompts: Sequence[Prompt], pictures: Tensor) -> Tensor:
        """Rewards [B] of pictures [B, 3, H, W] in [0, 1], with gradients.

        Raises:
            RewardError: if it did not return one differentiable number per picture.
        """
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        given = {**columns, "prompts": [prompt.text for prompt in prompts], "completions": pictures}
        values = self.function(**for_parameters(self.function, given, {}))
        if not isinstance(values, Tensor) or values.shape != (len(prompts),) or not values.requires_grad:
            raise RewardError(f"reward {self.name!r}: return one differentiable number per picture, a tensor [B]")
        return values


def load_differentiable(blocks: Sequence[RewardBlock], device: str) -> list[DifferentiableReward]:
    """The trained rewards of a recipe that can be differentiated.

    Raises:
        RecipeError: if there is none.
    """
    found = []
    for index, block in enumerate(blocks):
        where = f"rewards.{index}"
        if block.weight == 0 or block.held_out:
            continue
        reference = reference_of(block.name, f"{where}.name")
        target, arguments = load_import(reference, f"{where}.name"), arguments_of(block, reference)
        whole = marked(target, "differentiable")
        if not whole and "with_gradient" not in dir(target):
            continue
        reward = make_reward(target, arguments, shown=block.name, where=where, device=block.device or device)
        function = reward.function if whole else reward.with_gradient
        assert function is not None, "its class has the method"
        found.append(DifferentiableReward(name=block.shown_name, weight=block.weight, function=function))
    if not found:
        raise RecipeError(
            "rewards: reward_gradient needs one with a weight that is marked differentiable = True or has a method "
            "with_gradient, see docs/rewards.md"
        )
    return found

"""The attention of a transformers model, by the library's own name for it."""

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface

from unified_rl.errors import RecipeError, nearest
from unified_rl.imports import one_line


def load_with_attention(load: Callable[..., Any], name: str | None) -> Any:
    """What `load`, a `from_pretrained` that lacks only this argument, returns with the attention of that name.

    Names of repositories, whose kernels transformers would download and run, are refused with all others that it does
    not bring itself.

    Args:
        name: as `policy.attention`; None: the library's choice.

    Raises:
        RecipeError: if transformers has no such attention, cannot run it here, or the model takes another one.
    """
    if name is None:
        return load()
    valid = ["eager", *(each for each in AttentionInterface().valid_keys() if "|" not in each)]
    if name not in valid:
        raise RecipeError(f"policy.attention: no attention {name!r} of transformers{nearest(name, valid)}")
    try:
        model = load(attn_implementation=name)
    except (ImportError, ValueError) as error:  # what it raises for a package that is missing, or a model without it
        raise RecipeError(f"policy.attention: {name} cannot run here: {one_line(error)}") from error
    taken = model.config._attn_implementation
    if taken != name:
        raise RecipeError(f"policy.attention: {type(model).__name__} takes {taken} in place of {name}; leave it out")
    return model

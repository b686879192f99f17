"""What all blocks of a recipe have in common."""

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    """A strict block of a recipe: unknown keys are errors, values are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

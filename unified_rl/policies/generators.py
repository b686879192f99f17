"""Which class of transformers loads a model that generates."""

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from unified_rl.errors import RecipeError


def loader_of(config: PretrainedConfig) -> Any:
    """An automatic class of transformers or, of a model that these leave out (GLM-Image), its own.

    Raises:
        RecipeError: if it is no decoder that transformers generates with.
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    name = (config.architectures or [""])[0]
    kind: Any = getattr(transformers, name) if name and hasattr(transformers, name) else None
    if kind is None or not issubclass(kind, GenerationMixin) or config.is_encoder_decoder:
        what = name or config.model_type
        raise RecipeError(f"policy.model: {what} is no decoder that transformers generates with; name one that is")
    return kind

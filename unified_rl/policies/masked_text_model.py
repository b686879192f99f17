"""Loading a text denoiser; the code of its repository runs only where the recipe allows it."""

import functools
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DiffusionGemmaForBlockDiffusion,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from unified_rl.errors import RecipeError
from unified_rl.policies.attention import load_with_attention
from unified_rl.recipe.policy import PolicyBlock

OFFERED = {each.__name__: each for each in (AutoModelForMaskedLM, AutoModelForCausalLM, AutoModel)}
"""Names under which a repository may offer its class; the first that it has is taken."""


def load_model(block: PolicyBlock) -> tuple[Any, Any]:
    """A model and its tokenizer, from a folder or the hub.

    Raises:
        RecipeError: if the model needs the code of its repository and `trust_remote_code` is not set, if that code lies
            in another repository (which the revision does not pin), or if the model is no masked language model.
    """
    config, _ = PreTrainedConfig.get_config_dict(block.model, revision=block.revision)
    loader = _loader(config, block)
    revision: dict[str, Any] = {"revision": block.revision}
    if block.trust_remote_code:
        revision |= {"code_revision": block.revision}
    given: dict[str, Any] = {"trust_remote_code": block.trust_remote_code, **revision}
    load = functools.partial(loader.from_pretrained, block.model, dtype=getattr(torch, block.dtype), **given)
    return load_with_attention(load, block.attention), AutoTokenizer.from_pretrained(block.model, **given)


def _loader(config: dict[str, Any], block: PolicyBlock) -> Any:
    """The class that loads a model of this configuration."""
    model_type = str(config.get("model_type"))
    canvas: Any = DiffusionGemmaForBlockDiffusion.config_class
    if model_type == canvas.model_type:
        return DiffusionGemmaForBlockDiffusion
    if model_type in CONFIG_MAPPING and model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return AutoModelForMaskedLM
    code = config.get("auto_map") or {}
    offered = [name for name in OFFERED if name in code]
    if not offered:
        raise RecipeError(f"policy.family: masked_text, but {model_type} is no masked language model; try causal_lm")
    if not block.trust_remote_code:
        raise RecipeError(
            f"policy.trust_remote_code: {block.model} brings its own code ({code[offered[0]]}), which is not run;"
            " read it, then set this to true"
        )
    elsewhere = [where for where in code.values() if isinstance(where, str) and "--" in where]
    if elsewhere:
        raise RecipeError(
            f"policy.trust_remote_code: the code lies in another repository ({elsewhere[0]}), which no revision pins;"
            " copy both into one folder"
        )
    return OFFERED[offered[0]]

"""Tiny text-only families."""

from functools import partial
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from families.toolkit import Family, tokenizer, vocabulary

WIDTH: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDTH, "num_key_value_heads": 2}
SLIDING = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, **SLIDING},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8, **SLIDING},
    "gemma3_text": {**GROUPED, "head_dim": 8, **SLIDING},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {**WIDTH, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt_neox": WIDTH,
    "phi": GROUPED,
    "phi3": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "cohere": GROUPED,
    "glm4": {**GROUPED, "head_dim": 8},
    "falcon": WIDTH,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, **EXPERTS, "head_dim": 8},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
}


def build(name: str) -> tuple[Any, Any]:
    words = tokenizer()
    config = CONFIG_MAPPING[name](
        vocab_size=vocabulary(words), pad_token_id=0, bos_token_id=2, eos_token_id=3, **SETTINGS[name]
    )
    return AutoModelForCausalLM.from_config(config), words


RECURRENT = {"mamba"}
FAMILIES = {name: Family(build=partial(build, name), shares_prefill=name not in RECURRENT) for name in SETTINGS}

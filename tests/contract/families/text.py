"""Tiny text-only families."""

from functools import partial
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from families.toolkit import Family, tokenizer, vocabulary

WIDTH: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDTH, "num_key_value_heads": 2}
SLIDING = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 8}
DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"layer_types": ["linear_attention", "full_attention"], "head_dim": 8},
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

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
    "gpt_oss": {**GROUPED, **SLIDING, "num_local_experts": 4, "head_dim": 8},
    "gemma4_text": {
        **{**GROUPED, **SLIDING, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0},
        **{"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8},
        "vocab_size_per_layer_input": 41,
    },
    "deepseek_v3": {
        **{**WIDTH, **LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    },
    "qwen3_next": {**GROUPED, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**GROUPED, **DELTA},
    "bamba": {**GROUPED, **STATES, "attn_layer_indices": [1]},
    "falcon_h1": {**GROUPED, **STATES, "mamba_d_ssm": 64},
    "jamba": {
        **{**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
        **{"mamba_d_state": 8, "mamba_dt_rank": 4},
    },
    "recurrent_gemma": {
        **{**GROUPED, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8},
        "block_types": ["recurrent", "attention"],
    },
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
}


def build(name: str) -> tuple[Any, Any]:
    words = tokenizer()
    config = CONFIG_MAPPING[name](
        vocab_size=vocabulary(words), pad_token_id=0, bos_token_id=2, eos_token_id=3, **SETTINGS[name]
    )
    return AutoModelForCausalLM.from_config(config), words


RECURRENT = {"mamba", "recurrent_gemma"}
"""Their past is not in a cache whose rows can be repeated."""
FAMILIES = {name: Family(build=partial(build, name), shares_prefill=name not in RECURRENT) for name in SETTINGS}

"""Tiny models that draw with tokens, with random weights."""

from typing import Any

from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from families.toolkit import tokenizer

LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CODES = 12


def janus() -> tuple[Any, Any]:
    """2 x 2 tokens of 4 pixels a side."""
    words = tokenizer({"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"})
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = JanusConfig(
        text_config=LlamaConfig(vocab_size=len(words), **LAYERS, **ids).to_dict(),
        vision_config=JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, num_image_tokens=4,
            projection_dim=32, depth=1,
        ).to_dict(),
        vq_config=JanusVQVAEConfig(
            embed_dim=4, num_embeddings=CODES, latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1],
            num_res_blocks=1, projection_dim=32, image_token_embed_dim=32,
        ).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = JanusForConditionalGeneration(config)
    model.generation_config.update(**ids)
    model.generation_config.generation_kwargs = {"boi_token_id": words.convert_tokens_to_ids("<boi>")}
    images = JanusImageProcessorPil(size={"height": 8, "width": 8}, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return model, JanusProcessor(images, words, num_image_tokens=4)


def emu3() -> tuple[Any, Any]:
    """2 x 3 tokens, each row ended by a token of its own."""
    named = {
        "image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", "image_wrapper_token": "<image token>",
        "eof_token": "<|extra_201|>",
    }  # fmt: skip
    codes = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    words = tokenizer(named, ("<|extra_200|>", *codes))
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = Emu3Config(
        text_config=Emu3TextConfig(vocab_size=len(words), attention_dropout=0.0, **LAYERS, **ids).to_dict(),
        vq_config=Emu3VQVAEConfig(
            codebook_size=CODES, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1],
            num_res_blocks=1, attn_resolutions=[1], hidden_size=32, temporal_downsample_factor=1,
        ).to_dict(),
        vocabulary_map=dict(words.get_vocab()),
    )  # fmt: skip
    model = Emu3ForConditionalGeneration(config)
    model.generation_config.update(**ids)
    return model, Emu3Processor(Emu3ImageProcessor(), words)


BUILDERS = {"janus": (janus, {}), "emu3": (emu3, {"ratio": "3:2", "image_area": 384})}
"""Builder, and what its processor needs to draw."""

"""Tiny models that draw with tokens, with random weights."""

from typing import Any

from PIL import Image
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil
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


def chameleon() -> tuple[Any, Any]:
    """2 x 2 tokens, which are words in another order than their codes."""
    codes = ["IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z" for code in range(CODES)]
    named = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", "sep_token": "<sep>"}
    words = tokenizer(named, tuple(sorted(codes)))
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = ChameleonConfig(
        vocab_size=len(words), **{**LAYERS, "initializer_range": 0.1}, **ids, vocabulary_map=dict(words.get_vocab()),
        vq_config={
            "embed_dim": 4, "num_embeddings": CODES, "latent_channels": 4, "resolution": 4, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1,
        },
    )  # fmt: skip
    return ChameleonForConditionalGeneration(config), ChameleonProcessor(ChameleonImageProcessorPil(), words)


class SmallPreview(GlmImageProcessor):
    """Its small grid has 256 tokens for every size; here 2."""

    def _get_target_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        rows, columns, *_ = super()._get_target_shape(height, width)
        return rows, columns, 1, 2


def glm_image() -> tuple[Any, Any]:
    """1 x 2 tokens, then a picture of 2 x 3; the head also has the start's and the end's, which are not drawn."""
    codes = tuple(f"<|dit_token_{code}|>" for code in range(CODES + 2))
    named = {"image_token": "<image>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    words = tokenizer(named, first=codes)
    words.bos_token, words.eos_token = codes[CODES:]
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(words), "vision_vocab_size": CODES + 2, "rope_parameters": rope, **LAYERS, **ids,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "image_size": 32, "patch_size": 16,
        },
        vq_config={"embed_dim": 4, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=words.convert_tokens_to_ids("<image>"), image_start_token_id=CODES, image_end_token_id=CODES + 1,
    )  # fmt: skip
    model = GlmImageForConditionalGeneration(config)
    model.generation_config.update(**ids)
    return model, SmallPreview(GlmImageImageProcessorPil(patch_size=16, merge_size=1), words)


def grey(codes: Any) -> list[Image.Image]:
    """A decoder: each token a pixel, as bright as its number."""
    return [Image.fromarray((each * 255 // CODES).byte().cpu().numpy()).convert("RGB") for each in codes]


GLM_SIZE = {"target_h": 64, "target_w": 96}
BUILDERS = {
    "janus": (janus, {}),
    "emu3": (emu3, {"processor": {"ratio": "3:2", "image_area": 384}}),
    "chameleon": (chameleon, {"decoder": "families.drawing:grey"}),
    "glm_image": (glm_image, {"decoder": "families.drawing:grey", "negative_prompt": "a", "processor": GLM_SIZE}),
}
"""Builder, and what its recipe says."""

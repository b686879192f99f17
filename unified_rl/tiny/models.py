"""Tiny random twins of real models: the same pipeline class and the same component classes, from configs in code.

A twin shows that a recipe runs, not that it learns. It is written to a folder of its own with `save_pretrained`, so
that it is loaded, trained, saved and exported as the real model is. Only the tokenizer differs: it reads characters.
"""

import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn

from unified_rl.policies.without_videos import without_videos
from unified_rl.tiny import language

WIDTH = 32
LENGTH = 64
"""Tokens that the text encoders have positions for."""
TEXT: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL, *string.printable.strip()])}


def _tokenizer(side: str = "right") -> Any:
    """A tokenizer of single characters, which reads any prompt."""
    raw = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S"), behavior="removed", invert=True)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=LENGTH,
        padding_side=side,
    )


def _clip(projection: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        **TEXT,
        vocab_size=len(VOCABULARY),
        projection_dim=WIDTH,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def _t5(kind: str = "T5") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(VOCABULARY), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "vocab_size": len(VOCABULARY), "rope_scaling": rope}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=5)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _image_vae(channels: int, **more: Any) -> Any:
    """An autoencoder with `channels` latent channels that halves the resolution twice."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        norm_num_groups=1,
        **more,
    )


def _unet(**more: Any) -> Any:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**settings | more)


def _sd15() -> dict[str, Any]:
    return {
        "unet": _unet(),
        "vae": _image_vae(4),
        "text_encoder": _clip(),
        "tokenizer": _tokenizer(),
        "scheduler": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sdxl() -> dict[str, Any]:
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        use_linear_projection=True,
    )
    return {
        "unet": unet,
        "vae": _image_vae(4),
        "text_encoder": _clip(),
        "text_encoder_2": _clip(True),
        "tokenizer": _tokenizer(),
        "tokenizer_2": _tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS),
    }


def _sd3() -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    t5 = transformers.T5Config(
        vocab_size=len(VOCABULARY), d_model=2 * WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return {
        "transformer": transformer,
        "vae": _image_vae(16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": _clip(True),
        "text_encoder_2": _clip(True),
        "text_encoder_3": transformers.T5EncoderModel(t5),
        "tokenizer": _tokenizer(),
        "tokenizer_2": _tokenizer(),
        "tokenizer_3": _tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _flux() -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return {
        "transformer": transformer,
        "vae": _image_vae(16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": _clip(),
        "text_encoder_2": _t5(),
        "tokenizer": _tokenizer(),
        "tokenizer_2": _tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _qwen_image(**vae_settings: Any) -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        **{"base_dim": 6, "dim_mult": [1, 2, 4], "temperal_downsample": [False, True], **vae_settings},
        z_dim=16,
        num_res_blocks=1,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": _qwen2_vl(),
        "tokenizer": _tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _qwen_image_edit() -> dict[str, Any]:
    tokenizer = _tokenizer()
    tokenizer.add_tokens([*SPECIAL[4:]], special_tokens=True)  # one token each, as the processor counts them
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    settings = {"max_pixels": 28 * 28, "video_processor_type": "Qwen2VLVideoProcessor"}
    processor = without_videos(transformers.Qwen2VLProcessor, settings)(
        image_processor=transformers.Qwen2VLImageProcessor(max_pixels=28 * 28), tokenizer=tokenizer
    )
    # The class brings pictures to a million pixels, whatever the call says: few channels, and sides halved four times.
    parts = _qwen_image(base_dim=2, dim_mult=[1] * 5, temperal_downsample=[False, False, True, True])
    return {**parts, "tokenizer": tokenizer, "processor": processor}


def _wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def _wan(in_channels: int = 16, **more: Any) -> dict[str, Any]:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **more,
    )
    return {
        "transformer": transformer,
        "vae": _wan_vae(),
        "text_encoder": _t5("UMT5"),
        "tokenizer": _tokenizer(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    }


def _wan22() -> dict[str, Any]:
    """Wan 2.2 has a second transformer for the less noisy steps."""
    return {**_wan(), "transformer_2": _wan()["transformer"], "boundary_ratio": 0.875}


def _wan_image_to_video() -> dict[str, Any]:
    vision = transformers.CLIPVisionConfig(**TEXT, projection_dim=WIDTH, image_size=32, patch_size=16)
    size: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return {
        **_wan(36, added_kv_proj_dim=WIDTH, image_dim=WIDTH),
        "image_encoder": transformers.CLIPVisionModel(vision),
        "image_processor": transformers.CLIPImageProcessor(**size),
    }


TWINS: dict[str, Callable[[], dict[str, Any]]] = {
    "StableDiffusionPipeline": _sd15,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "FluxKontextPipeline": _flux,
    "QwenImagePipeline": _qwen_image,
    "QwenImageEditPipeline": _qwen_image_edit,
    "WanPipeline": _wan,
    "WanPipeline-2.2": _wan22,
    "WanImageToVideoPipeline": _wan_image_to_video,
}
"""Pipeline class (and version, where its components differ) -> its components."""


def write_twin(name: str, folder: Path) -> None:
    """Write the twin of a pipeline's or model's class (a key of TWINS here or of `language`) with weights from seed 0,
    in one go, unless it is there.

    Raises:
        ImportError: if a component needs a library that is not installed.
    """
    if folder.is_dir():
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = name.partition("-")[0]
        parts: Any = (
            language.TWINS[name]() if name in language.TWINS else [getattr(diffusers, pipeline)(**TWINS[name]())]
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part in parts:
            part.save_pretrained(fresh)
        fresh.chmod(0o755)
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)

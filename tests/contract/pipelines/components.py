"""One tiny random component per component class that diffusers' pipelines name in their `__init__` annotations.

Every text encoder is `WIDTH` wide, so that most denoisers fit most pipelines; a case overrides what differs.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

WIDTH = 32
WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "on", "the", "left", "right", "of", "two", "three"]


def tokenizer() -> Any:
    """A word tokenizer with the special tokens that pipelines ask for."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])  # type: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.model_max_length = 16
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


class Processor:
    """A processor of texts and pictures that reads the texts alone."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32})

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **settings: Any) -> Any:
        return self.tokenizer(text, **settings)

    def decode(self, tokens: Any) -> str:
        return self.tokenizer.decode(tokens)

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, **settings)


TEXT = {"vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024}


def t5(kind: str = "T5") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip(projection: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(**TEXT, projection_dim=WIDTH, max_position_embeddings=77)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def clip_vision(projection: bool = True, size: int = 32) -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=size
    )
    config.projection_dim, config.patch_size = WIDTH, 8
    return (transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel)(config)


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**DECODER, "rope_scaling": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def decoder(kind: str, head: str = "Model", **more: Any) -> nn.Module:
    return getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**DECODER | more))


def image_vae(channels: int, blocks: int = 2, **more: Any) -> nn.Module:
    """An image autoencoder that halves the resolution `blocks - 1` times."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=1,
        **more,
    )


def unet(xl: bool = False, in_channels: int = 4, cross: int | None = None, **more: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "in_channels": in_channels,
        "out_channels": 4,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross or (2 * WIDTH if xl else WIDTH),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    if xl:
        settings |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "attention_head_dim": (2, 4)} | {
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
            "transformer_layers_per_block": (1, 1),
            "use_linear_projection": True,
        }
    return diffusers.UNet2DConditionModel(**settings | more)


def controlnet(xl: bool = False) -> nn.Module:
    return diffusers.ControlNetModel.from_unet(unet(xl), conditioning_embedding_out_channels=(8, 8))


def betas(kind: str = "DDIMScheduler", **more: Any) -> Any:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | more
    return getattr(diffusers, kind)(**settings)


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def image_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def wan_vae() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


FACTORIES: dict[str, Callable[[], Any]] = {
    "T5EncoderModel": t5,
    "UMT5EncoderModel": lambda: t5("UMT5"),
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": lambda: clip(True),
    "CLIPVisionModelWithProjection": clip_vision,
    "CLIPVisionModel": lambda: clip_vision(False),
    "CLIPImageProcessor": image_processor,
    "Gemma2PreTrainedModel": lambda: decoder("Gemma2"),
    "GemmaPreTrainedModel": lambda: decoder("Gemma"),
    "GlmModel": lambda: decoder("Glm"),
    "LlamaModel": lambda: decoder("Llama"),
    "LlamaForCausalLM": lambda: decoder("Llama", "ForCausalLM"),
    "Qwen3Model": lambda: decoder("Qwen3"),
    "Qwen3ForCausalLM": lambda: decoder("Qwen3", "ForCausalLM"),
    "PreTrainedModel": lambda: decoder("Qwen3"),
    "Qwen2_5_VLForConditionalGeneration": qwen2_vl,
    "BertModel": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "AutoencoderKL": lambda: image_vae(4),
    "AutoencoderKLWan": wan_vae,
    "UNet2DConditionModel": unet,
    "ControlNetModel": controlnet,
    "FlowMatchEulerDiscreteScheduler": flow,
    "KarrasDiffusionSchedulers": betas,
    "DDIMScheduler": betas,
    "DDPMScheduler": lambda: betas("DDPMScheduler"),
    "DDPMWuerstchenScheduler": diffusers.DDPMWuerstchenScheduler,
    "LCMScheduler": lambda: betas("LCMScheduler"),
    "EulerDiscreteScheduler": lambda: betas("EulerDiscreteScheduler"),
    "DPMSolverMultistepScheduler": lambda: betas("DPMSolverMultistepScheduler"),
    "PNDMScheduler": lambda: betas("PNDMScheduler"),
    "UniPCMultistepScheduler": lambda: diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "CogVideoXDDIMScheduler": lambda: betas("CogVideoXDDIMScheduler", prediction_type="v_prediction"),
}

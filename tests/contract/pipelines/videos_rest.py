"""Video pipelines of one model each: worlds (Cosmos, Sana-WM), Kandinsky 6, Motif, those that start from a video."""

from types import SimpleNamespace

import diffusers
import torch
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_kandinsky6_sr
from torch.nn.functional import interpolate, scaled_dot_product_attention

from tests.contract.pipelines.build import Case, mask, picture
from tests.contract.pipelines.components import WIDTH, flow, image_processor, qwen2_vl
from tests.contract.pipelines.edits_more import visual_tokenizer
from tests.contract.pipelines.images import (
    EMBEDDED,
    NO_TEXT,
    SAME,
    Processor,
    Safe,
    tiny,
    without_zeros,
)
from tests.contract.pipelines.transformers_2d import NEGATIVE
from tests.contract.pipelines.unets import noise
from tests.contract.pipelines.videos import LATENT, UNIPC, clip_of, hunyuan_vae
from tests.contract.pipelines.videos_more import IMAGE, SECOND, WAN_VAE, frames, siglip, video


def pixels(channels: int):
    """A column of videos as tensors [C, F, H, W] in [0, 1]."""
    return lambda row: torch.rand((channels, 5, 32, 32), generator=torch.Generator().manual_seed(row))


def ones(length: int):
    return lambda row: torch.ones(length, dtype=torch.int64)


def kandinsky6():
    return without_zeros(
        diffusers.Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=WIDTH,
            time_dim=16,
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 2, 2),
            in_audio_dim=4,
            out_audio_dim=4,
        )
    )


def dense(query, key, value, attn_mask, **settings):
    """Attention over blocks of 64 tokens; PyTorch's sparse one has no gradients on a CPU."""
    blocks = attn_mask.to_dense().bool()
    mask = blocks.repeat_interleave(64, dim=-1).repeat_interleave(64, dim=-2)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def kandinsky6_sr():
    transformer_kandinsky6_sr.dispatch_attention_fn = dense
    return without_zeros(
        diffusers.Kandinsky6SRTransformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_visual_blocks=1,
            axes_dims=(8, 4, 4),
            tile_sizes=((32, 32),),
        )
    )


def kandinsky6_sr_vae():
    return diffusers.Kandinsky6SRVAE(
        latent_channels=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        layers_per_block=1,
        temporal_compression_ratio=2,
        temporal_compression_start_level=0,
    )


def sound_vae():
    return diffusers.MMAudioVAE(
        mel_bins=8, latent_channels=4, hidden_channels=8, layers_per_block=1, sample_rate=640, hop_length=16
    )


def vocoder():
    return diffusers.MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )


def sana_wm():
    return without_zeros(
        diffusers.SanaWMTransformer3DModel(
            in_channels=4,
            num_layers=2,
            hidden_size=48,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=24,
            caption_channels=WIDTH,
            chunk_plucker_channels=12,
        )
    )


MOTIF = NO_TEXT | WAN_VAE | {"guider": diffusers.ClassifierFreeGuidance, "scheduler": flow}
easy_inpaint = tiny("EasyAnimateTransformer3DModel", in_channels=12, resize_inpaint_mask_directly=False)


def cosmos_control():
    """It resizes a mask with torchvision."""
    resize = SimpleNamespace(resize=lambda mask, size, interpolation: interpolate(mask, size))
    controlnet_cosmos.transforms = SimpleNamespace(
        functional=resize, InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    return without_zeros(
        diffusers.CosmosControlNetModel(
            n_controlnet_blocks=1,
            in_channels=18,
            latent_channels=18,
            model_channels=32,
            num_attention_heads=2,
            attention_head_dim=16,
            mlp_ratio=2.0,
            text_embed_dim=2 * WIDTH,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            encoder_hidden_states_channels=2 * WIDTH,
        )
    )


def cosmos3():
    return without_zeros(
        diffusers.Cosmos3OmniTransformer(
            head_dim=16,
            hidden_size=32,
            intermediate_size=32,
            latent_channel=16,
            latent_patch_size=2,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=1,
            patch_latent_dim=64,
            vocab_size=32,
            rope_axes_dim=(4, 2, 2),
        )
    )


def masks(row: int) -> list:
    return [mask(row) for _ in range(5)]


def cosmos(**more):
    return tiny("CosmosTransformer3DModel", in_channels=17, concat_padding_mask=False, **more)


MASKED = SAME | dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), ones(7))
COSMOS = WAN_VAE | {
    "safety_checker": Safe,
    "transformer": tiny("CosmosTransformer3DModel", in_channels=17, concat_padding_mask=False),
}

COSMOS25 = COSMOS | UNIPC | {"text_encoder": qwen2_vl, "transformer": cosmos(text_embed_dim=2 * WIDTH)}
VIDEOS_REST = [
    Case("VideoToVideoSDPipeline", call=LATENT, columns={"video": clip_of}, rows=1),
    Case(
        "HunyuanVideo15ImageToVideoPipeline",
        NO_TEXT
        | {"text_encoder_2": None, "tokenizer_2": None, "guider": diffusers.ClassifierFreeGuidance}
        | {"image_encoder": siglip, "feature_extractor": image_processor}
        | {"transformer": tiny("HunyuanVideo15Transformer3DModel", task_type="i2v", image_embed_dim=WIDTH)},
        LATENT,
        columns=EMBEDDED | SECOND | IMAGE,
        rows=1,
    ),
    Case(
        "HunyuanVideoImageToVideoPipeline",
        NO_TEXT
        | {"text_encoder_2": None, "tokenizer_2": None, "image_processor": None, "vae": hunyuan_vae}
        | {"transformer": tiny("HunyuanVideoTransformer3DModel", in_channels=9, image_condition_type="latent_concat")},
        LATENT | {"true_cfg_scale": 2.0},
        columns=MASKED | IMAGE | {"pooled_prompt_embeds": noise(WIDTH), "negative_pooled_prompt_embeds": noise(WIDTH)},
        rows=1,
    ),
    Case(
        "EasyAnimateInpaintPipeline",
        {"text_encoder": qwen2_vl, "transformer": easy_inpaint},
        LATENT,
        columns=NEGATIVE | {"video": pixels(3), "mask_video": pixels(1)},
        rows=1,
    ),
    Case("MotifVideoPipeline", MOTIF, LATENT, columns=MASKED),
    Case("MotifVideoImage2VideoPipeline", MOTIF, LATENT, columns=MASKED | IMAGE, rows=1),
    Case(
        "Cosmos2VideoToWorldPipeline",
        COSMOS | {"scheduler": lambda: flow(use_karras_sigmas=True)},
        LATENT,
        columns=IMAGE,
        note="needs cosmos_guardrail, which the test stands in for",
    ),
    Case(
        "Cosmos2_5_PredictBasePipeline",
        COSMOS25,
        LATENT | {"num_latent_conditional_frames": 1, "max_sequence_length": 128},
        columns={"video": video},
        rows=1,
        note="needs cosmos_guardrail, which the test stands in for",
    ),
    Case(
        "Kandinsky6TI2VAPipeline",
        {"transformer": kandinsky6, "vae": hunyuan_vae, "tokenizer": Processor}
        | {"scheduler": flow, "audio_vae": sound_vae, "vocoder": vocoder},
        LATENT,
        constants={"_PROMPT_TEMPLATE": "{}", "_QWEN_CROP_START": 0},
    ),
    Case(
        "Kandinsky6SRPipeline",
        {"transformer": kandinsky6_sr, "vae": kandinsky6_sr_vae, "scheduler": flow},
        {"resolution_scale": 2, "output_type": "np"},
        columns={"video": frames(5, 16)},
        rows=1,
        note="tried with dense attention: PyTorch's sparse one has no gradients on a CPU",
    ),
    Case(
        "SanaWMPipeline",
        {"transformer": sana_wm},
        LATENT | {"action": "w-8", "intrinsics": [32.0, 32.0, 16.0, 16.0], "num_frames": 9},
        columns=IMAGE,
        rows=1,
        size=16,
        half=False,
        half_note="tried in float32: on a CPU its camera grid has no bfloat16",
    ),
    Case(
        "Cosmos2_5_TransferPipeline",
        COSMOS25
        | {
            "controlnet": cosmos_control,
            "transformer": cosmos(text_embed_dim=2 * WIDTH, controlnet_block_every_n=1),
        },
        LATENT | {"num_frames_per_chunk": 5, "max_sequence_length": 128},
        columns={"controls": video},
        note="needs cosmos_guardrail and torchvision, which the test stands in for",
    ),
    Case(
        "WanVACEPipeline", WAN_VAE, LATENT, columns={"video": video, "mask": masks, "reference_images": picture}, rows=1
    ),
    Case(
        "Cosmos3OmniPipeline",
        {"transformer": cosmos3, "text_tokenizer": visual_tokenizer, "enable_safety_checker": False},
        LATENT | {"use_system_prompt": False},
        columns=IMAGE,
        rows=1,
        note="needs cosmos_guardrail, which the test switches off",
    ),
]

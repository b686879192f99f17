"""Image pipelines around a transformer denoiser."""

import diffusers

from tests.contract.pipelines.build import Case, picture
from tests.contract.pipelines.components import WIDTH, image_vae, t5, tokenizer, unet
from tests.contract.pipelines.families import FLUX_VAE, IMAGE, MASKED

LATENT = {"output_type": "latent"}
HEADS = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}


def chroma():
    return diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )


def aura():
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )


def pixart(**more):
    return diffusers.PixArtTransformer2DModel(
        **HEADS, sample_size=16, cross_attention_dim=32, caption_channels=WIDTH, use_additional_conditions=False, **more
    )


def sana(**more):
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=16,
        **more,
    )


def dc():
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )


def lumina2():
    return diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=WIDTH,
    )


def lumina():
    return diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )


def cogview4(channels: int = 4):
    return diffusers.CogView4Transformer2DModel(
        in_channels=channels,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )


def cogview3():
    return diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=16,
    )


def qwen():
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), **HEADS
    )


def qwen_vae():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def z_image(**more):
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 64, 64],
        **more,
    )


def hunyuan_dit():
    return diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8,
        hidden_size=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )


def ovis():
    return diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
    )


def bria():
    return diffusers.BriaTransformer2DModel(
        in_channels=16, num_single_layers=1, joint_attention_dim=WIDTH, axes_dims_rope=[4, 4, 8], **HEADS
    )


def flux2(guidance_embeds: bool = False):
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
        **HEADS,
    )


def flux2_vae():
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=1,
        layers_per_block=1,
    )


def dit():
    return diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, sample_size=16, norm_num_groups=4, num_embeds_ada_norm=1000
    )


CHROMA = {"transformer": chroma} | FLUX_VAE
GEMMA_SANA = {"transformer": sana, "vae": dc}
SANA_CALL = {"complex_human_instruction": None, "use_resolution_binning": False}
QWEN = {"transformer": qwen, "vae": qwen_vae}
QWEN_CALL = {"true_cfg_scale": 3.0, "guidance_scale": None}
NEGATIVE = {"negative_prompt": lambda row: "blue square"}
Z = {"transformer": z_image} | FLUX_VAE
DIT_PROMPT = {"class_labels": lambda row: 3 + row}
HUNYUAN = {"text_encoder_2": t5, "tokenizer_2": tokenizer, "transformer": hunyuan_dit}
HUNYUAN["vae"] = lambda: image_vae(4, blocks=4)
KLEIN = {"transformer": flux2, "vae": flux2_vae, "is_distilled": False}
KLEIN_CALL = {"text_encoder_out_layers": (0, 1, 2)}

TRANSFORMERS_2D = [
    Case("ChromaPipeline", CHROMA),
    Case("ChromaImg2ImgPipeline", CHROMA, columns=IMAGE),
    Case("AuraFlowPipeline", {"transformer": aura}),
    Case("PixArtAlphaPipeline", {"transformer": pixart}, {"use_resolution_binning": False}),
    Case("PixArtSigmaPipeline", {"transformer": pixart}, {"use_resolution_binning": False}),
    Case(
        "PixArtSigmaPAGPipeline",
        {"transformer": pixart, "pag_applied_layers": "blocks.0"},
        {"use_resolution_binning": False},
    ),
    Case("SanaPipeline", GEMMA_SANA | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler}, SANA_CALL),
    Case("SanaPAGPipeline", GEMMA_SANA | {"pag_applied_layers": "transformer_blocks.0"}, SANA_CALL),
    Case("Lumina2Pipeline", {"transformer": lumina2} | FLUX_VAE),
    Case("LuminaPipeline", {"transformer": lumina}),
    Case("CogView4Pipeline", {"transformer": cogview4}),
    Case("CogView3PlusPipeline", {"transformer": cogview3}),
    Case("QwenImagePipeline", QWEN, QWEN_CALL, columns=NEGATIVE),
    Case("QwenImageImg2ImgPipeline", QWEN, QWEN_CALL, columns=NEGATIVE | IMAGE),
    Case("QwenImageInpaintPipeline", QWEN, QWEN_CALL, columns=NEGATIVE | IMAGE | MASKED),
    Case("ZImagePipeline", Z),
    Case("ZImageImg2ImgPipeline", Z, columns=IMAGE),
    Case("ZImageInpaintPipeline", Z, columns=IMAGE | MASKED),
    Case(
        "HunyuanDiTPipeline",
        HUNYUAN,
        {"use_resolution_binning": False},
    ),
    Case(
        "HunyuanDiTPAGPipeline",
        HUNYUAN | {"pag_applied_layers": "1"},
        {"use_resolution_binning": False},
    ),
    Case("OvisImagePipeline", {"transformer": ovis} | FLUX_VAE),
    Case("BriaPipeline", {"transformer": bria} | FLUX_VAE),
    Case("Flux2KleinPipeline", KLEIN, KLEIN_CALL),
    Case("DiTPipeline", {"transformer": dit}, columns=DIT_PROMPT),
    Case("CogView4ControlPipeline", {"transformer": lambda: cogview4(8)}, columns={"control_image": picture}),
    Case("Flux2KleinInpaintPipeline", KLEIN, KLEIN_CALL, columns=IMAGE | MASKED),
    Case("LatentConsistencyModelPipeline", {"unet": lambda: unet(time_cond_proj_dim=8)}),
    Case(
        "SanaPipeline",
        GEMMA_SANA | {"scheduler": diffusers.FlowMatchHeunDiscreteScheduler},
        SANA_CALL,
        refused="no transition kernel",
    ),
]

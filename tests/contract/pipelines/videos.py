"""Video and audio pipelines, and those that are refused."""

import diffusers

from tests.contract.pipelines.build import Case, mask, picture
from tests.contract.pipelines.components import WIDTH, betas, clip_vision, flow, image_processor, unet, wan_vae

HEADS = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}


def wan(channels: int = 16, **more):
    return diffusers.WanTransformer3DModel(
        **HEADS, in_channels=channels, text_dim=WIDTH, freq_dim=16, ffn_dim=32, rope_max_seq_len=32, **more
    )


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=WIDTH,
    )


def ltx_vae():
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )


def cogvideo(channels: int = 4):
    return diffusers.CogVideoXTransformer3DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=WIDTH,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )


def cogvideo_vae():
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def mochi():
    return diffusers.MochiTransformer3DModel(
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        pooled_projection_dim=16,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=16,
    )


def mochi_vae():
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )


def hunyuan():
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 6, 8),
        **HEADS,
    )


def hunyuan_vae(channels: int = 4):
    return diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def latte():
    return diffusers.LatteTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=WIDTH,
        video_length=2,
    )


def allegro():
    return diffusers.AllegroTransformer3DModel(
        num_layers=1,
        attention_head_dim=24,
        num_attention_heads=2,
        cross_attention_dim=48,
        caption_channels=WIDTH,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        activation_fn="gelu-approximate",
    )


def allegro_vae():
    return diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=32
    )


def motion():
    return diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )


def if_unet(channels: int = 3, **more):
    return unet(
        in_channels=channels,
        out_channels=6,
        encoder_hid_dim=WIDTH,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        only_cross_attention=True,
        **{"class_embed_type": None} | more,
    )


def svd_unet():
    return diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )


def svd_vae():
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), latent_channels=4, layers_per_block=1
    )


def clip_of(row: int) -> list:
    return [picture(10 * row + frame, 16) for frame in range(9)]


LATENT = {"output_type": "latent"}
WAN = {"transformer": wan, "vae": wan_vae}
LTX = {"transformer": ltx, "vae": ltx_vae}
COG = {"transformer": cogvideo, "vae": cogvideo_vae}
UNIPC = {
    "scheduler": lambda: diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
}
IF_CALL = {"height": 16, "width": 16, "clean_caption": False}
VIDEOS = [
    Case("WanPipeline", WAN | UNIPC, LATENT, note="Wan 2.2's two transformers are trained together"),
    Case("LTXPipeline", LTX, LATENT | {"num_frames": 9}),
    Case("LTXImageToVideoPipeline", LTX, LATENT | {"num_frames": 9}, columns={"image": picture}),
    Case("CogVideoXPipeline", COG, LATENT | {"num_frames": 9, "height": 16, "width": 16}),
    Case(
        "MochiPipeline",
        {"transformer": mochi, "vae": mochi_vae, "scheduler": lambda: flow(invert_sigmas=True)},
        LATENT | {"num_frames": 7},
    ),
    Case(
        "HunyuanVideoPipeline",
        {"transformer": hunyuan, "vae": hunyuan_vae},
        LATENT | {"prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    Case("LattePipeline", {"transformer": latte}, LATENT | {"video_length": 2, "clean_caption": False}),
    Case(
        "AllegroPipeline",
        {"transformer": allegro, "vae": allegro_vae},
        LATENT | {"num_frames": 8, "clean_caption": False},
    ),
    Case("AnimateDiffPipeline", {"motion_adapter": motion}, LATENT | {"num_frames": 2}),
    Case("AnimateDiffPAGPipeline", {"motion_adapter": motion}, LATENT | {"num_frames": 2}),
    Case("IFPipeline", {"unet": if_unet}, IF_CALL),
    Case(
        "StableVideoDiffusionPipeline",
        {
            "unet": svd_unet,
            "vae": svd_vae,
            "image_encoder": lambda: clip_vision(size=224),
            "feature_extractor": image_processor,
            "scheduler": lambda: betas(
                "EulerDiscreteScheduler",
                timestep_type="continuous",
                prediction_type="v_prediction",
                interpolation_type="linear",
                use_karras_sigmas=True,
                sigma_min=0.002,
                sigma_max=700,
            ),
        },
        LATENT | {"num_frames": 2},
        columns={"image": picture},
        size=16,
    ),
    Case("CogVideoXVideoToVideoPipeline", COG, LATENT | {"height": 16, "width": 16}, columns={"video": clip_of}),
    Case("AnimateDiffVideoToVideoPipeline", {"motion_adapter": motion}, LATENT, columns={"video": clip_of}),
    Case(
        "ConsistencyModelPipeline",
        {
            "unet": lambda: diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 32, 32, 32)),
            "scheduler": diffusers.CMStochasticIterativeScheduler,
        },
        half=False,
    ),
    Case(
        "AnimateDiffSDXLPipeline",
        {"motion_adapter": motion, "unet": lambda: unet(True)},
        LATENT | {"num_frames": 2},
    ),
    Case("LTXConditionPipeline", LTX, LATENT | {"num_frames": 9}),
    Case("IFImg2ImgPipeline", {"unet": if_unet}, {"clean_caption": False}, columns={"image": picture}),
    Case(
        "IFInpaintingPipeline",
        {"unet": if_unet},
        {"clean_caption": False},
        columns={"image": picture, "mask_image": mask},
    ),
]

"""More pipelines around UNets: adapters, ControlNet-Union, unCLIP, Kandinsky, upscalers, IF, older classes."""

import diffusers
import torch
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

from tests.contract.pipelines.build import Case, mask, picture
from tests.contract.pipelines.components import (
    WIDTH,
    betas,
    clip,
    clip_vision,
    image_processor,
    image_vae,
    tokenizer,
    unet,
)
from tests.contract.pipelines.families import CONTROL, CONTROLLED, IMAGE, MASKED, XL_UNET
from tests.contract.pipelines.videos import LATENT, clip_of, if_unet, motion


def old_clip():
    """A text encoder whose layers lie where pipelines of older transformers look for them."""
    encoder = clip()
    if not hasattr(encoder, "text_model"):
        encoder.add_module("text_model", torch.nn.Module())
        encoder.text_model.final_layer_norm = encoder.final_layer_norm
    return encoder


def noise(*shape: int):
    """A column of random tensors, one a row."""

    def make(row: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(row))

    return make


def union():
    return diffusers.ControlNetUnionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        conditioning_embedding_out_channels=(8, 8),
        num_control_type=6,
        num_proj_channel=8,
        num_trans_channel=8,
        num_trans_head=2,
    )


def unclip_unet():
    return unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)


def kandinsky_unet(in_channels: int = 4, **more):
    settings = {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    return unet(
        in_channels=in_channels,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
        **settings | more,
    )


def kandinsky1_unet(in_channels: int = 4):
    return kandinsky_unet(
        in_channels,
        encoder_hid_dim_type="text_image_proj",
        addition_embed_type="text_image",
        cross_attention_dim=WIDTH,
    )


def multilingual_clip():
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=WIDTH, transformerDimensions=WIDTH, hidden_size=WIDTH, intermediate_size=37, num_attention_heads=4
    )
    config.num_hidden_layers, config.vocab_size = 1, 40
    return MultilingualCLIP(config)


def unclip_scheduler():
    return diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
    )


def movq():
    return diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )


def prior(**more):
    return diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=1, **more
    )


def pixel_unet(channels: int, out: int):
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=out,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def xs(xl: bool = False):
    return diffusers.ControlNetXSAdapter.from_unet(
        unet(xl, layers_per_block=2), size_ratio=0.5, conditioning_embedding_out_channels=(8, 8)
    )


UNION = XL_UNET | {"controlnet": union}
UNION_CALL = {"control_mode": [0]}
UNIONED = {"control_image": lambda row: [picture(row)]}
ADAPTER = {
    "unet": lambda: unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
}
ADAPTER |= {"adapter": lambda: diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2)}
XL_ADAPTER = XL_UNET | {
    "adapter": lambda: diffusers.T2IAdapter(
        channels=[8, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
}
UNCLIP = {
    "unet": unclip_unet,
    "image_normalizer": lambda: StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
    "image_noising_scheduler": lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
}
VISION = {"image_encoder": clip_vision, "feature_extractor": image_processor, "image_processor": image_processor}
EMBEDS = {"image_embeds": noise(WIDTH), "negative_image_embeds": noise(WIDTH)}
SIZE = {"height": 32, "width": 32}
MOVQ = {"movq": movq}
HINT = {"hint": noise(3, 128, 128)}
K22 = MOVQ | {"unet": kandinsky_unet}
HINTED = MOVQ | {"unet": lambda: kandinsky_unet(8, addition_embed_type="image_hint")}
K1 = MOVQ | {"unet": kandinsky1_unet, "text_encoder": multilingual_clip}
PRIOR = {
    "prior": lambda: prior(num_embeddings=16),
    "text_encoder": lambda: clip(True),
    "scheduler": unclip_scheduler,
} | VISION
SUPER = {
    "unet": lambda: if_unet(6, class_embed_type="timestep"),
    "image_noising_scheduler": lambda: betas("DDPMScheduler"),
}
SUPER_CALL = {"clean_caption": False, "noise_level": 250}

FRAMES = clip_of(0)[:2]
UNETS = [
    Case("StableDiffusionXLControlNetUnionPipeline", UNION, UNION_CALL, columns=UNIONED, rows=1),
    Case(
        "StableDiffusionXLControlNetUnionInpaintPipeline", UNION, UNION_CALL, columns=UNIONED | IMAGE | MASKED, rows=1
    ),
    Case("StableDiffusionXLControlNetUnionImg2ImgPipeline", UNION, {"control_mode": 0}, columns=CONTROLLED),
    Case("StableDiffusionAdapterPipeline", ADAPTER, columns=IMAGE),
    Case("StableDiffusionXLAdapterPipeline", XL_ADAPTER, columns=IMAGE),
    Case(
        "StableDiffusionDepth2ImgPipeline",
        {"unet": lambda: unet(in_channels=5), "depth_estimator": None, "feature_extractor": None},
        columns=IMAGE | {"depth_map": noise(32, 32)},
    ),
    Case("StableUnCLIPImg2ImgPipeline", UNCLIP | VISION, columns=IMAGE),
    Case(
        "StableUnCLIPPipeline",
        UNCLIP
        | {
            "prior_tokenizer": tokenizer,
            "prior_text_encoder": lambda: clip(True),
            "prior": lambda: prior(num_embeddings=16),
            "prior_scheduler": unclip_scheduler,
        },
        {"prior_num_inference_steps": 2},
    ),
    Case("KandinskyV22Pipeline", K22, SIZE, columns=EMBEDS),
    Case("KandinskyV22Img2ImgPipeline", K22, SIZE, columns=EMBEDS | IMAGE),
    Case(
        "KandinskyV22InpaintPipeline",
        MOVQ | {"unet": lambda: kandinsky_unet(9)},
        SIZE,
        columns=EMBEDS | IMAGE | MASKED,
        rows=1,
    ),
    Case("KandinskyV22ControlnetPipeline", HINTED, SIZE, columns=EMBEDS | HINT),
    Case("KandinskyV22ControlnetImg2ImgPipeline", HINTED, SIZE, columns=EMBEDS | HINT | IMAGE),
    Case("KandinskyPipeline", K1, SIZE, columns=EMBEDS),
    Case("KandinskyImg2ImgPipeline", K1, SIZE, columns=EMBEDS | IMAGE),
    Case("KandinskyInpaintPipeline", K1 | {"unet": lambda: kandinsky1_unet(9)}, SIZE, columns=EMBEDS | IMAGE | MASKED),
    Case("KandinskyPriorPipeline", PRIOR),
    Case("KandinskyV22PriorPipeline", PRIOR),
    Case("KandinskyV22PriorEmb2EmbPipeline", PRIOR, columns={"image": noise(WIDTH)}),
    Case("Kandinsky3Pipeline", MOVQ),
    Case("Kandinsky3Img2ImgPipeline", MOVQ, columns=IMAGE, row_tolerance=1e-4),
    Case("IFSuperResolutionPipeline", SUPER, SUPER_CALL | SIZE, columns=IMAGE),
    Case("IFImg2ImgSuperResolutionPipeline", SUPER, SUPER_CALL, columns=IMAGE | {"original_image": picture}),
    Case(
        "IFInpaintingSuperResolutionPipeline", SUPER, SUPER_CALL, columns=IMAGE | {"original_image": picture} | MASKED
    ),
    Case("LDMTextToImagePipeline", {"bert": clip, "vqvae": lambda: image_vae(4)}, SIZE, half=False),
    Case(
        "LDMSuperResolutionPipeline",
        {
            "vqvae": lambda: diffusers.VQModel(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=3,
                norm_num_groups=4,
            ),
            "unet": lambda: pixel_unet(6, 3),
        },
        columns=IMAGE,
        rows=1,
        half=False,
    ),
    Case(
        "AnimateDiffControlNetPipeline",
        {"motion_adapter": motion},
        LATENT | {"num_frames": 2, "conditioning_frames": FRAMES},
        rows=1,
    ),
    Case(
        "AnimateDiffVideoToVideoControlNetPipeline",
        {"motion_adapter": motion},
        LATENT,
        columns={"video": clip_of, "conditioning_frames": clip_of},
    ),
    Case(
        "AnimateDiffSparseControlNetPipeline",
        {
            "motion_adapter": motion,
            "controlnet": lambda: diffusers.SparseControlNetModel(
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
                conditioning_channels=3,
                cross_attention_dim=WIDTH,
                conditioning_embedding_out_channels=(8, 8),
                norm_num_groups=2,
                attention_head_dim=4,
                motion_num_attention_heads=2,
                use_simplified_condition_embedding=False,
            ),
        },
        LATENT | {"num_frames": 2, "controlnet_frame_indices": [0], "conditioning_frames": FRAMES[:1]},
        rows=1,
    ),
    Case("MarigoldDepthPipeline", {"unet": lambda: unet(in_channels=8)}, {"processing_resolution": 0}, columns=IMAGE),
    Case("MarigoldNormalsPipeline", {"unet": lambda: unet(in_channels=8)}, {"processing_resolution": 0}, columns=IMAGE),
    Case(
        "MarigoldIntrinsicsPipeline",
        {
            "unet": lambda: unet(in_channels=12, out_channels=8),
            "target_properties": {"target_names": ["albedo", "roughness"]},
        },
        {"processing_resolution": 0},
        columns=IMAGE,
    ),
    Case("LatentConsistencyModelImg2ImgPipeline", {"unet": lambda: unet(time_cond_proj_dim=8)}, columns=IMAGE),
    Case(
        "StableDiffusionControlNetXSPipeline",
        {"controlnet": xs, "unet": lambda: unet(layers_per_block=2)},
        columns=CONTROL,
    ),
    Case(
        "StableDiffusionXLControlNetXSPipeline",
        {"controlnet": lambda: xs(True), "unet": lambda: unet(True, layers_per_block=2)},
        columns=CONTROL,
    ),
    Case("TextToVideoSDPipeline", call=LATENT | {"num_frames": 2}),
    Case("I2VGenXLPipeline", VISION | {"text_encoder": old_clip}, LATENT | {"num_frames": 2}, columns=IMAGE),
    Case("LDMPipeline", {"unet": lambda: pixel_unet(4, 4)}, half=False),
    Case(
        "PNDMPipeline", {"unet": lambda: pixel_unet(3, 3), "scheduler": lambda: diffusers.PNDMScheduler()}, half=False
    ),
    Case(
        "PIAPipeline",
        {"motion_adapter": motion, "unet": lambda: unet(in_channels=9)},
        LATENT | {"num_frames": 2, "strength": 1.0},
        columns=IMAGE,
    ),
    Case(
        "StableDiffusionLDM3DPipeline",
        {"vae": lambda: image_vae(4, in_channels=6, out_channels=6)},
        {"output_type": "np"},
    ),
    Case("StableDiffusionPanoramaPipeline", rows=1),
    Case("SemanticStableDiffusionPipeline"),
    Case("StableDiffusionPipelineSafe", {"safety_checker": None}),
    Case("StableDiffusionInpaintPipelineLegacy", columns=IMAGE | {"mask_image": mask}, rows=1),
    Case("StableDiffusionModelEditingPipeline", {"scheduler": betas}),
    Case(
        "StableDiffusionGLIGENPipeline",
        {"unet": lambda: unet(attention_type="gated")},
        {"gligen_phrases": ["a star"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]]},
    ),
    Case("AltDiffusionPipeline", {"text_encoder": clip}),
    Case("AltDiffusionImg2ImgPipeline", {"text_encoder": clip}, columns=IMAGE),
]

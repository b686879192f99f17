"""UNet, SD3 and FLUX families: text to image, image to image, inpainting, ControlNet, PAG."""

import diffusers

from tests.contract.pipelines.build import Case, mask, picture
from tests.contract.pipelines.components import WIDTH, clip_vision, controlnet, image_processor, image_vae, unet

CONTROL = {"image": picture}
MASKED = {"mask_image": mask}
IMAGE = {"image": picture}
CONTROLLED = {"image": picture, "control_image": picture}

SD = [
    Case("StableDiffusionPipeline"),
    Case("StableDiffusionImg2ImgPipeline", columns=IMAGE, call={"strength": 0.7}),
    Case("StableDiffusionInpaintPipeline", columns=IMAGE | MASKED),
    Case("StableDiffusionInstructPix2PixPipeline", {"unet": lambda: unet(in_channels=8)}, columns=IMAGE),
    Case("StableDiffusionControlNetPipeline", columns=CONTROL),
    Case("StableDiffusionControlNetImg2ImgPipeline", columns=CONTROLLED),
    Case("StableDiffusionControlNetInpaintPipeline", columns=CONTROLLED | MASKED),
    Case("StableDiffusionPAGPipeline"),
    Case("StableDiffusionPAGImg2ImgPipeline", columns=IMAGE),
    Case("StableDiffusionPAGInpaintPipeline", columns=IMAGE | MASKED),
    Case("StableDiffusionControlNetPAGPipeline", columns=CONTROL),
    Case("StableDiffusionControlNetPAGInpaintPipeline", columns=CONTROLLED | MASKED),
    Case(
        "StableDiffusionImageVariationPipeline",
        {"image_encoder": clip_vision, "feature_extractor": image_processor},
        columns=IMAGE,
    ),
    Case("StableDiffusionUpscalePipeline", {"unet": lambda: unet(in_channels=7, num_class_embeds=1000)}, columns=IMAGE),
]
XL_UNET = {"unet": lambda: unet(True)}
XL_CONTROL = XL_UNET | {"controlnet": lambda: controlnet(True)}
AESTHETIC = {"unet": lambda: unet(True, projection_class_embeddings_input_dim=5 * 8 + WIDTH)}
AESTHETIC |= {"requires_aesthetics_score": True}
SDXL = [
    Case("StableDiffusionXLPipeline", XL_UNET),
    Case("StableDiffusionXLImg2ImgPipeline", AESTHETIC, columns=IMAGE),
    Case("StableDiffusionXLInpaintPipeline", AESTHETIC, columns=IMAGE | MASKED),
    Case("StableDiffusionXLInstructPix2PixPipeline", {"unet": lambda: unet(True, 8)}, columns=IMAGE),
    Case("StableDiffusionXLControlNetPipeline", XL_CONTROL, columns=CONTROL),
    Case("StableDiffusionXLControlNetImg2ImgPipeline", XL_CONTROL, columns=CONTROLLED),
    Case("StableDiffusionXLControlNetInpaintPipeline", XL_CONTROL, columns=CONTROLLED | MASKED),
    Case("StableDiffusionXLPAGPipeline", XL_UNET),
    Case("StableDiffusionXLPAGImg2ImgPipeline", AESTHETIC, columns=IMAGE),
    Case("StableDiffusionXLPAGInpaintPipeline", AESTHETIC, columns=IMAGE | MASKED),
    Case("StableDiffusionXLControlNetPAGPipeline", XL_CONTROL, columns=CONTROL),
    Case("StableDiffusionXLControlNetPAGImg2ImgPipeline", XL_CONTROL, columns=CONTROLLED),
]


def sd3(channels: int = 4, **more):
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=channels,
        **more,
    )


SHIFTED = {"shift_factor": 0.06, "scaling_factor": 1.5}
SD3_PARTS = {"transformer": sd3, "vae": lambda: image_vae(4, **SHIFTED), "text_encoder_3": None, "tokenizer_3": None}
SD3 = [
    Case("StableDiffusion3Pipeline", SD3_PARTS),
    Case("StableDiffusion3Img2ImgPipeline", SD3_PARTS, columns=IMAGE),
    Case(
        "StableDiffusion3InpaintPipeline",
        SD3_PARTS | {"transformer": lambda: sd3(16), "vae": lambda: image_vae(16, **SHIFTED)},
        columns=IMAGE | MASKED,
    ),
    Case("StableDiffusion3PAGPipeline", SD3_PARTS | {"pag_applied_layers": "blocks.0"}),
    Case("StableDiffusion3PAGImg2ImgPipeline", SD3_PARTS | {"pag_applied_layers": "blocks.0"}, columns=IMAGE),
    Case(
        "StableDiffusion3ControlNetPipeline",
        SD3_PARTS
        | {
            "controlnet": lambda: diffusers.SD3ControlNetModel.from_transformer(
                sd3(), num_layers=1, num_extra_conditioning_channels=0
            )
        },
        columns={"control_image": picture},
    ),
]


def flux(in_channels: int = 16, **more):
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        **more,
    )


FLUX_VAE = {"vae": lambda: image_vae(4, **SHIFTED)}
FLUX_PARTS = {"transformer": lambda: flux(guidance_embeds=True)} | FLUX_VAE
FLUX = [
    Case("FluxPipeline", FLUX_PARTS),
    Case("FluxImg2ImgPipeline", FLUX_PARTS, columns=IMAGE),
    Case("FluxInpaintPipeline", FLUX_PARTS, columns=IMAGE | MASKED),
    Case("FluxKontextPipeline", FLUX_PARTS, columns=IMAGE, call={"max_area": 1024, "_auto_resize": False}),
    Case("FluxControlPipeline", {"transformer": lambda: flux(32)} | FLUX_VAE, columns={"control_image": picture}),
    Case("FluxControlImg2ImgPipeline", {"transformer": lambda: flux(32)} | FLUX_VAE, columns=CONTROLLED),
    Case("FluxFillPipeline", {"transformer": lambda: flux(16 + 16 + 4 * 4)} | FLUX_VAE, columns=IMAGE | MASKED),
    Case(
        "FluxControlNetPipeline",
        FLUX_PARTS
        | {
            "controlnet": lambda: diffusers.FluxControlNetModel.from_transformer(
                flux(guidance_embeds=True),
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
            )
        },
        columns={"control_image": picture},
    ),
]
UNCONDITIONAL = [
    Case(
        name,
        {
            "unet": lambda: diffusers.UNet2DModel(
                sample_size=8,
                block_out_channels=(8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            )
        },
        half=False,  # its pictures go through numpy in the model's dtype
    )
    for name in ("DDPMPipeline", "DDIMPipeline")
]
FAMILIES = [*SD, *SDXL, *SD3, *FLUX, *UNCONDITIONAL]

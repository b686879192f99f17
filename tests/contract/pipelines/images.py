"""More image pipelines around transformers: editing, ControlNets, inpainting, those of one model each."""

import diffusers
import torch

from tests.contract.pipelines.build import UNMASKED, Case, picture, without_zeros
from tests.contract.pipelines.components import WIDTH, Processor, decoder, flow, image_vae, qwen2_vl, tokenizer
from tests.contract.pipelines.families import (
    CONTROLLED,
    FLUX_PARTS,
    FLUX_VAE,
    IMAGE,
    MASKED,
    SD3_PARTS,
    SHIFTED,
    flux,
    sd3,
)
from tests.contract.pipelines.tiny import TINY
from tests.contract.pipelines.transformers_2d import (
    CHROMA,
    GEMMA_SANA,
    HUNYUAN,
    KLEIN,
    KLEIN_CALL,
    NEGATIVE,
    QWEN,
    QWEN_CALL,
    SANA_CALL,
    Z,
    flux2,
    flux2_vae,
    z_image,
)
from tests.contract.pipelines.unets import noise

CONTROL_IMAGE = {"control_image": picture}
NO_TEXT = {"text_encoder": None, "tokenizer": None, "processor": None, "text_processor": None}
EMBEDS = {"prompt_embeds": noise(7, WIDTH), "negative_prompt_embeds": noise(5, WIDTH)}
ONES = {
    "prompt_embeds_mask": lambda row: torch.ones(7, dtype=torch.int64),
    "negative_prompt_embeds_mask": lambda row: torch.ones(5, dtype=torch.int64),
}
EMBEDDED = EMBEDS | ONES
MASKS = dict.fromkeys(ONES, lambda row: torch.ones(7, dtype=torch.bool))
SAME = {"prompt_embeds": noise(7, WIDTH), "negative_prompt_embeds": noise(7, WIDTH)}
PROCESSED = {"text_encoder": qwen2_vl, "tokenizer": Processor, "processor": Processor, "text_processor": Processor}


class Safe(torch.nn.Module):
    """In place of a guard model whose package is not among ours."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video):
        return video


def kandinsky5(visual_cond: bool = False):
    settings = TINY["Kandinsky5Transformer3DModel"] | {"visual_cond": visual_cond}
    return without_zeros(diffusers.Kandinsky5Transformer3DModel(**settings))


def momentum_guider():
    return diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1)


def dream():
    return diffusers.DreamLiteUNetModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownRemoveSelfAttnBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
        transformer_layers_per_block=1,
    )


def tiny(name: str, **more):
    """A factory for a class of `TINY` with some settings changed."""
    return lambda: getattr(diffusers, name)(**TINY[name] | more)


def flux_control(**more):
    return lambda: diffusers.FluxControlNetModel.from_transformer(
        flux(guidance_embeds=True), num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )


def z_control(in_dim: int = 4):
    control = diffusers.ZImageControlNetModel.from_transformer(
        diffusers.ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=in_dim,
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        ),
        z_image(),
    )
    control.gradient_checkpointing = False  # read by its forward, which diffusers 0.42 does not set
    return control


def chroma_with_flag():
    """Its pipeline asks for a flag that Chroma's config lacks in diffusers 0.42."""
    model = CHROMA["transformer"]()
    model.register_to_config(guidance_embeds=False)
    return model


def hunyuan_control():
    return diffusers.HunyuanDiT2DControlNetModel(
        sample_size=16,
        transformer_num_layers=2,
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


FLUX_CONTROLLED = FLUX_PARTS | {"controlnet": flux_control()}
LONGCAT = {
    "vae": lambda: image_vae(16, **SHIFTED),
    "transformer": tiny("LongCatImageTransformer2DModel", in_channels=64),
}
QWEN_CONTROL = QWEN | {"controlnet": tiny("QwenImageControlNetModel")}
SPRINT = GEMMA_SANA | {
    "scheduler": lambda: diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    "transformer": tiny("SanaTransformer2DModel", guidance_embeds=True, qk_norm="rms_norm_across_heads"),
}
SPRINT_CALL = SANA_CALL | {"intermediate_timesteps": None}


def small_square(area, ratio):
    """In place of resizing to a megapixel."""
    return 32, 32, None


def rgba(row: int):
    return picture(row).convert("RGBA")


def rgba_vae(z_dim: int = 4):
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        input_channels=4,
    )


def small_pair(area, ratio):
    return 32, 32


IMAGES = [
    Case("ChromaInpaintPipeline", CHROMA | {"transformer": chroma_with_flag}, columns=IMAGE | MASKED),
    Case("FluxControlInpaintPipeline", {"transformer": lambda: flux(32)} | FLUX_VAE, columns=CONTROLLED | MASKED),
    Case("FluxControlNetImg2ImgPipeline", FLUX_CONTROLLED, columns=CONTROLLED),
    Case("FluxControlNetInpaintPipeline", FLUX_CONTROLLED, columns=CONTROLLED | MASKED),
    Case(
        "FluxKontextInpaintPipeline",
        FLUX_PARTS,
        columns=IMAGE | MASKED,
        call={"max_area": 1024, "_auto_resize": False},
    ),
    Case(
        "Flux2Pipeline",
        KLEIN | NO_TEXT | {"transformer": lambda: flux2(guidance_embeds=True)},
        columns={"prompt_embeds": noise(7, 3 * WIDTH)},
    ),
    Case("Flux2KleinKVPipeline", KLEIN, KLEIN_CALL),
    Case(
        "HunyuanDiTControlNetPipeline",
        HUNYUAN | {"controlnet": hunyuan_control},
        {"use_resolution_binning": False},
        columns=CONTROL_IMAGE,
    ),
    Case(
        "StableDiffusion3ControlNetInpaintingPipeline",
        SD3_PARTS
        | {
            "controlnet": lambda: diffusers.SD3ControlNetModel.from_transformer(
                sd3(), num_layers=1, num_extra_conditioning_channels=1
            )
        },
        columns=CONTROL_IMAGE | {"control_mask": MASKED["mask_image"]},
    ),
    Case("QwenImageControlNetPipeline", QWEN_CONTROL, QWEN_CALL, columns=NEGATIVE | CONTROL_IMAGE),
    Case(
        "QwenImageControlNetInpaintPipeline",
        QWEN | {"controlnet": tiny("QwenImageControlNetModel", extra_condition_channels=4)},
        QWEN_CALL,
        columns=NEGATIVE | CONTROL_IMAGE | {"control_mask": MASKED["mask_image"]},
    ),
    Case(
        "QwenImageEditPipeline",
        QWEN | NO_TEXT,
        QWEN_CALL,
        columns=EMBEDDED | IMAGE,
        constants={"calculate_dimensions": small_square},
    ),
    Case(
        "QwenImageEditInpaintPipeline",
        QWEN | NO_TEXT,
        QWEN_CALL,
        columns=EMBEDDED | IMAGE | MASKED,
        constants={"calculate_dimensions": small_square},
    ),
    Case(
        "QwenImageEditPlusPipeline",
        QWEN | NO_TEXT,
        QWEN_CALL,
        columns=EMBEDDED | IMAGE,
        constants={"calculate_dimensions": small_pair},
        rows=1,
    ),
    Case(
        "SanaControlNetPipeline",
        GEMMA_SANA | {"controlnet": tiny("SanaControlNetModel"), "scheduler": flow},
        SANA_CALL,
        columns=CONTROL_IMAGE,
    ),
    Case("SanaSprintPipeline", SPRINT, SPRINT_CALL),
    Case("SanaSprintImg2ImgPipeline", SPRINT, SPRINT_CALL, columns=IMAGE),
    Case(
        "ZImageControlNetPipeline",
        Z | {"controlnet": z_control},
        columns=CONTROL_IMAGE,
    ),
    Case(
        "ZImageControlNetInpaintPipeline",
        Z | {"controlnet": lambda: z_control(4 * 2 + 1)},
        columns=CONTROL_IMAGE | IMAGE | MASKED,
    ),
    Case("HiDreamImagePipeline", FLUX_VAE, attributes={"default_sample_size": 16}),
    Case("BriaFiboPipeline", {"text_encoder": lambda: decoder("SmolLM3", "ForCausalLM", vocab_size=128_001)}),
    Case(
        "Krea2Pipeline",
        {"vae": QWEN["vae"]} | NO_TEXT,
        columns={"prompt_embeds": noise(7, 2, WIDTH), "negative_prompt_embeds": noise(7, 2, WIDTH)} | MASKS,
    ),
    Case("LongCatImagePipeline", LONGCAT | PROCESSED | {"tokenizer": tokenizer}, {"enable_prompt_rewrite": False}),
    Case("NucleusMoEImagePipeline", {"vae": QWEN["vae"]} | NO_TEXT, columns=EMBEDDED),
    Case(
        "PRXPipeline",
        FLUX_VAE
        | {
            "transformer": lambda: without_zeros(tiny("PRXTransformer2DModel")()),
            "text_encoder": None,
            "tokenizer": None,
        },
        {"use_resolution_binning": False},
        columns=SAME
        | dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), MASKS["prompt_embeds_mask"]),
        rows=1,
    ),
    Case(
        "PRXPixelPipeline",
        {
            "transformer": lambda: without_zeros(
                tiny("PRXTransformer2DModel", in_channels=3, bottleneck_size=8, resolution_embeds=True)()
            ),
            "text_encoder": None,
            "tokenizer": None,
        },
        {"use_resolution_binning": False},
        columns=SAME
        | dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), MASKS["prompt_embeds_mask"]),
        rows=1,
    ),
    Case(
        "HunyuanImagePipeline",
        components=NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None, "guider": momentum_guider},
        columns=EMBEDDED
        | {
            "prompt_embeds_2": noise(3, WIDTH),
            "prompt_embeds_mask_2": lambda row: torch.ones(3, dtype=torch.int64),
            "negative_prompt_embeds_2": noise(3, WIDTH),
            "negative_prompt_embeds_mask_2": lambda row: torch.ones(3, dtype=torch.int64),
        },
        store_outputs=True,
    ),
    Case(
        "Kandinsky5T2IPipeline",
        half=False,
        rows=1,
        note=UNMASKED,
        components=PROCESSED | {"vae": lambda: image_vae(16, **SHIFTED), "transformer": kandinsky5},
        attributes={"resolutions": [(32, 32)]},
    ),
    Case("DreamLitePipeline", PROCESSED | {"unet": dream}, rows=1),
    Case("DreamLiteMobilePipeline", PROCESSED | {"unet": dream}, rows=1),
    Case(
        "VisualClozeGenerationPipeline",
        {"transformer": lambda: flux(16 + 16 + 4 * 4, guidance_embeds=True), "resolution": 32} | FLUX_VAE,
        columns={
            "image": lambda row: [[picture(row), picture(row + 5)], [picture(row + 9), None]],
            "task_prompt": lambda row: "a red star",
            "content_prompt": lambda row: "on the left",
        },
    ),
    Case(
        "ErnieImagePipeline",
        {
            "vae": flux2_vae,
            "transformer": lambda: without_zeros(
                diffusers.ErnieImageTransformer2DModel(
                    hidden_size=32,
                    num_attention_heads=2,
                    num_layers=1,
                    ffn_hidden_size=32,
                    in_channels=16,
                    out_channels=16,
                    text_in_dim=WIDTH,
                    rope_axes_dim=(4, 4, 8),
                )
            ),
            "text_encoder": None,
            "tokenizer": None,
            "pe": None,
            "pe_tokenizer": None,
        },
        columns={"prompt_embeds": noise(7, WIDTH), "negative_prompt_embeds": noise(5, WIDTH)},
    ),
]

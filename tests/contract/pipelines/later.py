"""Image and audio pipelines of one model each: cascades, Versatile Diffusion, Shap-E, Stable Audio 3's edits."""

import diffusers
import transformers
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

from tests.contract.pipelines.audio import LDM, SHORT, clap
from tests.contract.pipelines.build import UNMASKED, Case, picture
from tests.contract.pipelines.components import (
    WIDTH,
    Processor,
    betas,
    clip,
    clip_vision,
    image_processor,
    image_vae,
    unet,
)
from tests.contract.pipelines.families import FLUX_VAE, IMAGE, MASKED, SHIFTED
from tests.contract.pipelines.images import (
    EMBEDS,
    NO_TEXT,
    PROCESSED,
    kandinsky5,
    rgba,
    rgba_vae,
    small_pair,
    tiny,
    without_zeros,
)
from tests.contract.pipelines.tiny import TINY
from tests.contract.pipelines.transformers_2d import NEGATIVE, z_image
from tests.contract.pipelines.unets import VISION, noise, prior
from tests.contract.pipelines.videos import LATENT


def example_encoder():
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=5, num_attention_heads=4, image_size=32, patch_size=8
    )
    return PaintByExampleImageEncoder(config, proj_size=WIDTH)


def upscaler():
    return unet(in_channels=8, out_channels=5, time_cond_proj_dim=128 + WIDTH, sample_size=16, timestep_post_act="gelu")


def shape_prior():
    return prior(
        num_embeddings=8,
        clip_embed_dim=2 * WIDTH,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )


def old_clap():
    """Its text features are a tensor, as in the transformers that MusicLDM was written for."""
    model = clap()
    features = model.get_text_features
    model.get_text_features = lambda *args, **kwargs: features(*args, **kwargs).pooler_output
    return model


class BatchedProcessor(Processor):
    """Its chat template gives a batch of one, as those of vision-language models do."""

    def apply_chat_template(self, messages, **settings):
        return [super().apply_chat_template(messages, **settings)]


def qwen21():
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )


def qwen21_vae():
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def paella():
    return PaellaVQModel(**TINY["PaellaVQModel"])


VERSATILE = {"image_feature_extractor": image_processor, "text_encoder": lambda: clip(True), "image_unet": unet} | {
    "text_unet": None,
    "image_encoder": clip_vision,
}
SHAPE = {
    "prior": shape_prior,
    "scheduler": lambda: betas(
        "HeunDiscreteScheduler", beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True
    ),
    "shap_e_renderer": None,
}
LAYERED = {
    "vae": lambda: rgba_vae(2),  # as many latent channels as RGBA has would pass for latents
    "transformer": tiny(
        "QwenImageTransformer2DModel", in_channels=8, out_channels=2, use_additional_t_cond=True, use_layer3d_rope=True
    ),
}
SA3 = {"text_encoder": None, "tokenizer": None}
SA3_COLUMNS = {"prompt_embeds": noise(7, WIDTH), "audio": noise(2, 16)}
LATER = [
    Case(
        "WuerstchenPriorPipeline",
        {"prior": lambda: WuerstchenPrior(c_in=2, c=8, c_cond=WIDTH, c_r=8, depth=1, nhead=2)},
        row_tolerance=5e-4,
    ),
    Case(
        "WuerstchenDecoderPipeline",
        {
            "decoder": lambda: without_zeros(
                WuerstchenDiffNeXt(
                    c_cond=WIDTH,
                    c_hidden=[16],
                    nhead=[2],
                    blocks=[1],
                    level_config=["CTA"],
                    inject_effnet=[False],
                    effnet_embd=4,
                    clip_embd=WIDTH,
                )
            ),
            "vqgan": paella,
            "latent_dim_scale": 4.0,
        },
        columns={"image_embeddings": noise(4, 4, 4)},
        rows=1,
    ),
    Case(
        "StableCascadePriorPipeline",
        {"prior": tiny("StableCascadeUNet", clip_text_in_channels=WIDTH, clip_image_in_channels=WIDTH, clip_seq=1)},
    ),
    Case(
        "StableCascadeDecoderPipeline",
        {
            "decoder": tiny("StableCascadeUNet", effnet_in_channels=4, clip_text_in_channels=None),
            "vqgan": paella,
            "latent_dim_scale": 4.0,
        },
        columns={"image_embeddings": noise(4, 4, 4)},
    ),
    Case("VersatileDiffusionTextToImagePipeline", VERSATILE),
    Case("VersatileDiffusionImageVariationPipeline", VERSATILE, columns=IMAGE),
    Case("VersatileDiffusionDualGuidedPipeline", VERSATILE, columns=IMAGE),
    Case(
        "PaintByExamplePipeline",
        {"image_encoder": example_encoder, "feature_extractor": image_processor, "unet": lambda: unet(in_channels=9)},
        columns=IMAGE | MASKED | {"example_image": picture},
    ),
    Case(
        "StableDiffusionGLIGENTextImagePipeline",
        VISION
        | {
            "unet": lambda: unet(attention_type="gated-text-image"),
            "processor": image_processor,
            "image_project": lambda: CLIPImageProjection(hidden_size=WIDTH),
        },
        {"gligen_phrases": ["a star"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]], "gligen_images": [picture(7)]},
    ),
    Case(
        "StableDiffusionLatentUpscalePipeline",
        {"unet": upscaler, "scheduler": lambda: betas("EulerDiscreteScheduler", prediction_type="sample")},
        columns=IMAGE,
        kernel="ancestral",
    ),
    Case("ShapEPipeline", SHAPE | {"text_encoder": lambda: clip(True)}, LATENT),
    Case(
        "ShapEImg2ImgPipeline",
        SHAPE | {"image_encoder": lambda: clip_vision(False), "image_processor": image_processor},
        LATENT,
        columns=IMAGE,
        rows=1,
    ),
    Case(
        "MusicLDMPipeline",
        LDM | {"text_encoder": old_clap},
        SHORT,
        note="tried with CLAP text features as a tensor; with transformers 5 its own call fails",
    ),
    Case(
        "Kandinsky5I2IPipeline",
        PROCESSED | {"vae": lambda: image_vae(16, blocks=4, **SHIFTED), "transformer": lambda: kandinsky5(True)},
        columns=IMAGE,
        attributes={"resolutions": [(32, 32)]},
        half=False,
        rows=1,
        note=UNMASKED,
    ),
    Case(
        "StableAudio3AudioToAudioPipeline",
        SA3,
        LATENT | {"duration": 1.0, "init_noise_level": 0.7},
        columns=SA3_COLUMNS,
    ),
    Case(
        "StableAudio3InpaintPipeline",
        SA3,
        LATENT | {"duration": 1.0, "mask_start_seconds": 0.2, "mask_end_seconds": 0.6},
        columns=SA3_COLUMNS,
    ),
    Case(
        "QwenImage21Pipeline",
        NO_TEXT | {"transformer": qwen21, "vae": qwen21_vae, "processor": BatchedProcessor},
        {"true_cfg_scale": 3.0, "use_kv_cache": False},
        columns=EMBEDS,
        note="policy.sampling.call.use_kv_cache: false, a replay makes no first step to fill it",
    ),
    Case(
        "ZImageOmniPipeline",
        FLUX_VAE | {"transformer": lambda: z_image(siglip_feat_dim=WIDTH), "siglip": None, "siglip_processor": None},
        note="tried without condition pictures",
    ),
    Case(
        "QwenImageLayeredPipeline",
        LAYERED | PROCESSED,
        {"layers": 1},
        columns=NEGATIVE | {"image": rgba},
        constants={"calculate_dimensions": small_pair},
    ),
]

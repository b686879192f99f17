"""More video pipelines."""

import diffusers
import torch
import transformers

from tests.contract.pipelines.build import UNMASKED, Case, picture
from tests.contract.pipelines.components import (
    WIDTH,
    Processor,
    betas,
    clip_vision,
    decoder,
    flow,
    image_processor,
    qwen2_vl,
)
from tests.contract.pipelines.images import EMBEDDED, NO_TEXT, PROCESSED, Safe, kandinsky5, tiny
from tests.contract.pipelines.transformers_2d import NEGATIVE
from tests.contract.pipelines.unets import noise
from tests.contract.pipelines.videos import LATENT, cogvideo, cogvideo_vae, hunyuan_vae, ltx, ltx_vae, wan_vae

IMAGE = {"image": picture}


def video(row: int) -> list:
    return [picture(10 * row + frame) for frame in range(5)]


def frames(count: int, size: int = 32):
    return lambda row: [picture(10 * row + frame, size) for frame in range(count)]


def siglip():
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=37, image_size=32, patch_size=8
    )
    return transformers.SiglipVisionModel(config)


SECOND = {"prompt_embeds_2": noise(3, WIDTH), "negative_prompt_embeds_2": noise(3, WIDTH)} | dict.fromkeys(
    ("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2"), lambda row: torch.ones(3, dtype=torch.int64)
)
WAN_VAE = {"vae": wan_vae}
FLOW = {"scheduler": flow}
FACE = WAN_VAE | {"image_encoder": lambda: clip_vision(False), "image_processor": image_processor}
I2V = {"transformer": tiny("WanTransformer3DModel", in_channels=36, out_channels=16)}
GUARD = {"safety_checker": Safe}
COSMOS_I2V = {"transformer": tiny("CosmosTransformer3DModel", in_channels=17)} | GUARD | WAN_VAE
TWO = {"transformer_2": tiny("WanTransformer3DModel"), "boundary_ratio": 0.5}
HUNYUAN = {"vae": hunyuan_vae}
HUNYUAN_CALL = LATENT | {"prompt_template": {"template": "{}", "crop_start": 0}}
COG8 = {"transformer": lambda: cogvideo(8), "vae": cogvideo_vae}
COG_CALL = LATENT | {"num_frames": 9, "height": 16, "width": 16}

LTX2 = {"text_encoder": lambda: decoder("Qwen3")}
MORE_VIDEOS = [
    Case("WanImageToVideoPipeline", FACE | I2V | {"image_encoder": None}, LATENT, columns=IMAGE, rows=1),
    Case("WanVideoToVideoPipeline", WAN_VAE, LATENT, columns={"video": video}),
    Case(
        "WanAnimatePipeline",
        FACE,
        LATENT | {"segment_frame_length": 5, "mode": "animate", "prev_segment_conditioning_frames": 1},
        columns=IMAGE | {"pose_video": frames(5), "face_video": frames(5, 16)},
        rows=1,
    ),
    Case("SkyReelsV2Pipeline", WAN_VAE, LATENT),
    Case(
        "SkyReelsV2ImageToVideoPipeline",
        FACE | {"transformer": tiny("SkyReelsV2Transformer3DModel", in_channels=36, out_channels=16, image_dim=WIDTH)},
        LATENT,
        columns=IMAGE,
        rows=1,
    ),
    Case("SkyReelsV2DiffusionForcingPipeline", WAN_VAE, LATENT),
    Case("SkyReelsV2DiffusionForcingImageToVideoPipeline", WAN_VAE, LATENT, columns=IMAGE, rows=1),
    Case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        WAN_VAE,
        LATENT | {"overlap_history": 1, "num_frames": 9},
        columns={"video": video},
    ),
    Case("ChronoEditPipeline", FACE, LATENT, columns=IMAGE, rows=1),
    Case(
        "LucyEditPipeline",
        WAN_VAE | {"transformer": tiny("WanTransformer3DModel", in_channels=32, out_channels=16)},
        LATENT,
        columns={"video": video},
        half=False,
    ),
    Case("CogVideoXImageToVideoPipeline", COG8, COG_CALL, columns={"image": lambda row: picture(row, 16)}),
    Case(
        "CogVideoXFunControlPipeline",
        COG8,
        LATENT | {"height": 16, "width": 16},
        columns={"control_video": frames(9, 16)},
    ),
    Case(
        "ConsisIDPipeline",
        {"vae": cogvideo_vae, "scheduler": lambda: betas("CogVideoXDDIMScheduler", prediction_type="v_prediction")},
        COG_CALL,
        columns={"image": lambda row: picture(row, 16)}
        | {"id_vit_hidden": lambda row: [torch.ones(1, 2, 2)] * 1, "id_cond": noise(1, 2)},
        rows=1,
    ),
    Case(
        "HunyuanSkyreelsImageToVideoPipeline",
        HUNYUAN | {"transformer": tiny("HunyuanVideoTransformer3DModel", in_channels=8)},
        HUNYUAN_CALL,
        columns=IMAGE,
    ),
    Case(
        "HunyuanVideoFramepackPipeline",
        HUNYUAN | {"image_encoder": siglip, "feature_extractor": image_processor},
        HUNYUAN_CALL | {"latent_window_size": 3},
        columns=IMAGE,
        rows=1,
    ),
    Case(
        "HunyuanVideo15Pipeline",
        NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None, "guider": diffusers.ClassifierFreeGuidance},
        LATENT,
        columns=EMBEDDED | SECOND,
    ),
    Case(
        "Kandinsky5T2VPipeline",
        half=False,
        rows=1,
        note=UNMASKED,
        call=LATENT,
        components=PROCESSED | {"tokenizer": Processor, "vae": lambda: hunyuan_vae(16), "transformer": kandinsky5},
    ),
    Case(
        "Kandinsky5I2VPipeline",
        half=False,
        rows=1,
        note=UNMASKED,
        call=LATENT,
        components=PROCESSED
        | {
            "tokenizer": Processor,
            "vae": lambda: hunyuan_vae(16),
            "transformer": lambda: kandinsky5(True),
        },
        columns=IMAGE,
    ),
    Case("EasyAnimatePipeline", {"text_encoder": qwen2_vl}, LATENT, columns=NEGATIVE),
    Case("SanaVideoPipeline", WAN_VAE | FLOW, LATENT | {"frames": 5, "use_resolution_binning": False}),
    Case(
        "SanaImageToVideoPipeline",
        WAN_VAE | FLOW,
        LATENT | {"frames": 5, "use_resolution_binning": False},
        columns=IMAGE,
        rows=1,
    ),
    Case("LTXI2VLongMultiPromptPipeline", {"transformer": ltx, "vae": ltx_vae}, LATENT | {"num_frames": 9}, rows=1),
    Case("LTX2Pipeline", LTX2, LATENT),
    Case(
        "LTX2ImageToVideoPipeline",
        LTX2,
        LATENT | {"image_crf": 0},
        columns=IMAGE,
        note="several rows a call with policy.sampling.call.image_crf: 0 only",
    ),
    Case("LTX2ConditionPipeline", LTX2, LATENT),
    Case("LTX2InContextPipeline", LTX2, LATENT),
]

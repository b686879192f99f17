"""More image and audio pipelines of one model each, editing pipelines above all."""

import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.deprecated.blip_diffusion.modeling_blip2 import Blip2QFormerModel
from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator, OmniGenMultiModalProcessor

from tests.contract.pipelines.audio import LDM, SHORT, clap
from tests.contract.pipelines.build import Case, picture
from tests.contract.pipelines.components import (
    DECODER,
    TEXT,
    WIDTH,
    Processor,
    decoder,
    flow,
    image_vae,
    qwen2_vl,
    t5,
    tokenizer,
)
from tests.contract.pipelines.families import IMAGE
from tests.contract.pipelines.images import EMBEDDED, LONGCAT, NO_TEXT, ONES, Safe, small_pair, tiny, without_zeros
from tests.contract.pipelines.transformers_2d import flux2_vae
from tests.contract.pipelines.unets import noise
from tests.contract.pipelines.videos import LATENT


def longcat_sound_vae():
    return diffusers.LongCatAudioDiTVae(
        channels=8,
        c_mults=[1],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=160,
    )


def refiner_vae():
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=1,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )


def glm_vae():
    return image_vae(4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def qwen3_vl(head: bool):
    config = transformers.Qwen3VLConfig(
        text_config={
            **DECODER,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    )
    return (transformers.Qwen3VLForConditionalGeneration if head else transformers.Qwen3VLModel)(config)


def projection():
    return AudioLDM2ProjectionModel(text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH, langauge_model_dim=8)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=32, n_positions=128, max_new_tokens=8)
    )


def t5_tokenizer():
    """The pipeline asks for its class."""
    words = tokenizer()
    made = transformers.T5TokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_ids=0,
    )
    made.model_max_length = words.model_max_length
    return made


VISUAL = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]


def visual_tokenizer():
    made = tokenizer()
    made.add_tokens(VISUAL, special_tokens=True)
    return made


def seeing_qwen2_vl():
    encoder = qwen2_vl()
    encoder.config.image_token_id, encoder.config.vision_start_token_id, _ = visual_tokenizer().convert_tokens_to_ids(
        VISUAL
    )
    return encoder


def visual_processor():
    processor = Processor()
    processor.image_processor = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28)
    return processor


class NoTorchvision(OmniGenMultiModalProcessor):
    """The same but for torchvision's conversion of a picture to a tensor."""

    def __init__(self, text_tokenizer, max_image_size):
        self.text_tokenizer, self.max_image_size, self.collator = text_tokenizer, max_image_size, OmniGenCollator()

    def process_image(self, image):
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1


def blip_text():
    return ContextCLIPTextModel(transformers.CLIPTextConfig(**TEXT, max_position_embeddings=20))


def qformer():
    """It loads a vocabulary of its own from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"]
        Path(folder, "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        config = transformers.Blip2Config(
            vision_config={
                "hidden_size": WIDTH,
                "intermediate_size": 37,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 16,
            },
            qformer_config={
                "vocab_size": 16,
                "hidden_size": WIDTH,
                "intermediate_size": 37,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "max_position_embeddings": 20,
                "encoder_hidden_size": WIDTH,
                "cross_attention_frequency": 1,
            },
            num_query_tokens=4,
            tokenizer=folder,
        )
        return Blip2QFormerModel(config)


def blip_images():
    return BlipImageProcessor(size={"height": 32, "width": 32})


class SmallBuckets(JoyImageEditImageProcessor):
    """Its smallest resolution is a megapixel."""

    def get_default_height_width(self, image, height=None, width=None):
        return 32, 32


def tokens(num: int):
    """A column of visual tokens."""
    return lambda row: torch.randint(0, 128, (num,), generator=torch.Generator().manual_seed(row))


BLIP = {"text_encoder": blip_text, "qformer": qformer, "image_processor": blip_images}
SUBJECTS = {"reference_image": picture} | dict.fromkeys(
    ("source_subject_category", "target_subject_category"), lambda row: "circle"
)
BUNDLES = {"prompt_embeds": noise(2, 7, WIDTH), "negative_prompt_embeds": noise(2, 5, WIDTH)}
MORE_EDITS = [
    Case(
        "Cosmos2TextToImagePipeline",
        {
            "safety_checker": Safe,
            "scheduler": lambda: flow(use_karras_sigmas=True),
            "transformer": tiny("CosmosTransformer3DModel", concat_padding_mask=False),
        },
        LATENT,
        note="needs cosmos_guardrail, which the test stands in for",
    ),
    Case(
        "LongCatAudioDiTPipeline",
        {"scheduler": lambda: flow(shift=1.0, invert_sigmas=True), "vae": longcat_sound_vae}
        | {"transformer": lambda: without_zeros(tiny("LongCatAudioDiTTransformer")())},
        {"audio_duration_s": 0.1},
    ),
    Case(
        "BriaFibo2Pipeline",
        NO_TEXT | {"vae": flux2_vae, "transformer": lambda: without_zeros(tiny("BriaFibo2Transformer2DModel")())},
        columns=BUNDLES | ONES,
        note="with pictures, of which each prompt of a call edits all, one row a call",
    ),
    Case(
        "BriaFiboEditPipeline",
        {"text_encoder": lambda: decoder("SmolLM3", "ForCausalLM", vocab_size=128_001)},
        {"_auto_resize": False},
        columns=IMAGE,
        text='{"edit_instruction": "{}"}',
        note="prompts are JSON with an edit_instruction",
        rows=1,
    ),
    Case(
        "GlmImagePipeline",
        {"vae": glm_vae, "vision_language_encoder": None, "processor": None},
        columns={"prior_token_ids": tokens(64)},
        note="without a column prior_token_ids one row a call: its language model draws them for the whole batch",
    ),
    Case(
        "HunyuanImageRefinerPipeline",
        NO_TEXT
        | {
            "vae": refiner_vae,
            "transformer": tiny(
                "HunyuanImageTransformer2DModel",
                in_channels=8,
                patch_size=(1, 1, 1),
                rope_axes_dim=(2, 2, 4),
                guidance_embeds=True,
                text_embed_2_dim=None,
            ),
        },
        columns=IMAGE | EMBEDDED,
    ),
    Case(
        "Ideogram4Pipeline",
        {"vae": flux2_vae, "text_encoder": lambda: qwen3_vl(False)},
        {"guidance_schedule": None, "max_sequence_length": 48, "mu": 3.0},
        constants={"QWEN3_VL_ACTIVATION_LAYERS": (0, 1)},
        note="its unconditional transformer stays as it is",
    ),
    Case(
        "AudioLDM2Pipeline",
        LDM
        | {"text_encoder": clap, "text_encoder_2": t5, "projection_model": projection, "language_model": gpt2}
        | {"tokenizer": t5_tokenizer, "tokenizer_2": t5_tokenizer, "unet": tiny("AudioLDM2UNet2DConditionModel")},
        SHORT,
    ),
    Case(
        "JoyImageEditPipeline",
        NO_TEXT,
        columns=EMBEDDED | IMAGE,
        attributes={"vae_image_processor": SmallBuckets()},
    ),
    Case(
        "JoyImageEditPlusPipeline",
        {"text_encoder": lambda: qwen3_vl(True), "tokenizer": Processor, "processor": Processor},
        columns={"images": lambda row: [picture(row), picture(row + 5)]},
        attributes={"image_processor": SmallBuckets()},
    ),
    Case(
        "LongCatImageEditPipeline",
        LONGCAT | {"text_encoder": seeing_qwen2_vl, "tokenizer": visual_tokenizer, "text_processor": visual_processor},
        columns=IMAGE,
        attributes={"tokenizer_max_length": 16},
        constants={"calculate_dimensions": small_pair},
        rows=1,
    ),
    Case(
        "OmniGenPipeline",
        {"vae": lambda: image_vae(4, blocks=4)},
        {"img_guidance_scale": 1.6},
        columns={"input_images": lambda row: [picture(row)]},
        constants={"OmniGenMultiModalProcessor": NoTorchvision},
        text="<img><|image_1|></img> {}",
        note="prompts name the pictures of a column input_images (<img><|image_1|></img>); needs torchvision, which the"
        " test does without",
        rows=1,
    ),
    Case("BlipDiffusionPipeline", BLIP, columns=SUBJECTS, refused="Q-Former", rows=1),
    Case("BlipDiffusionControlNetPipeline", BLIP, columns=SUBJECTS, refused="Q-Former", rows=1),
]

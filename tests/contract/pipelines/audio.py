"""Audio pipelines."""

import diffusers
import transformers

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.components import WIDTH, decoder, image_vae, unet
from tests.contract.pipelines.images import tiny
from tests.contract.pipelines.unets import noise
from tests.contract.pipelines.videos import LATENT


def clap(text_only: bool = False):
    text = transformers.ClapTextConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        projection_dim=WIDTH,
        pad_token_id=0,
        max_position_embeddings=80,
    )
    if text_only:
        return transformers.ClapTextModelWithProjection(text)
    audio = transformers.ClapAudioConfig(
        spec_size=64,
        window_size=4,
        num_mel_bins=64,
        intermediate_size=37,
        depths=[1, 1],
        num_attention_heads=[1, 1],
        num_hidden_layers=2,
        hidden_size=64,
        patch_size=2,
        patch_stride=2,
        patch_embed_input_channels=4,
        projection_dim=WIDTH,
    )
    return transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH))


def vocoder():
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            normalize_before=False,
        )
    )


def sound_vae():
    return image_vae(4, in_channels=1, out_channels=1)


def film_unet():
    return unet(
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
    )


LDM = {"unet": film_unet, "vae": sound_vae, "vocoder": vocoder, "feature_extractor": None}
SHORT = {"audio_length_in_s": 0.016}
AUDIO = [
    Case("AudioLDMPipeline", LDM | {"text_encoder": lambda: clap(True)}, SHORT),
    Case(
        "StableAudioPipeline",
        {
            "vae": tiny("AutoencoderOobleck"),
            "scheduler": lambda: diffusers.EDMDPMSolverMultistepScheduler(
                prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
            ),
        },
        LATENT | {"audio_end_in_s": 1.0},
    ),
    Case(
        "StableAudio3Pipeline",
        {"text_encoder": None, "tokenizer": None},
        LATENT | {"duration": 1.0, "guidance_scale": 1.0},
        columns={"prompt_embeds": noise(7, WIDTH)},
    ),
    Case(
        "AceStepPipeline",
        {"text_encoder": lambda: decoder("Qwen3")}
        | {"scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)},
        LATENT | {"audio_duration": 3.0},
        columns={"lyrics": lambda row: "on the left"},
        attributes={"is_turbo": False},
        store_outputs=True,
    ),
]

"""Pre-train one tiny pipeline of each kind on the embedded world: the same pictures, captions and text encoder.

    python -m recipes.families.make_tiny --family flux --output my_flux

Families: `flux` (joint attention over text and picture, packed latents), `sana` (linear attention, cross-attention to
the text) and `sd15` (a UNet in the DDPM family). A small autoencoder is trained first; then the denoiser learns with
the text encoder of the quickstart's Stable Diffusion 3, frozen; and last it sees pictures of which many are not what
their captions say, so that it draws well but does not listen, and RL has something to repair. Time is CPU time, so that
a busy machine gives the same model. The result is an ordinary diffusers folder. Its `call_defaults.json` holds the call
arguments that it wants.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from recipes.quickstart import script
from recipes.quickstart.fit import fit
from recipes.quickstart.make_shapes_sd3 import Scenes
from unified_rl.worlds import shapes

SD3 = Path(__file__).parent.parent / "quickstart" / "shapes_sd3"
WIDTH = 96
HEAD_DIM = 32
NUM_TOKENS = 12
LATENT_CHANNELS = 4
LATENT_SIZE = shapes.CANVAS // 4
SHIFT = 3.0
BATCH = 64
POOL = 20_000
"""Scenes that are drawn and encoded once, before the denoiser's training."""
WRONG_SHARE = 0.6
"""Of the last minutes' pictures, how many are not what their captions say."""
CALL_DEFAULTS = {"height": shapes.CANVAS, "width": shapes.CANVAS, "num_inference_steps": 10, "guidance_scale": 1.0}
KIND_WEIGHTS = {"single": 0.15, "position": 0.25, "count": 0.25, "pair": 0.25, "relation": 0.1}
"""Relations take longest to learn; there is not the time for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What differs between families: how a pipeline is put together, and how its denoiser is called."""

    build: Callable[[AutoencoderTiny, CLIPTextModel, CLIPTokenizer], DiffusionPipeline]
    predict: Callable[..., Tensor]
    """(denoiser, noisy latents [B, C, H, W], level [B] in 0 to 1, *text) to a prediction [B, C, H, W]."""
    encode: Callable[[Any, list[str]], tuple[Tensor, ...]]
    """What the pipeline's own `encode_prompt` gives for captions, as the denoiser takes it."""
    call: dict[str, Any]
    """Call arguments beside CALL_DEFAULTS."""


def _build_flux(vae: AutoencoderTiny, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM,
        joint_attention_dim=text_encoder.config.hidden_size,
        pooled_projection_dim=text_encoder.config.hidden_size,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")):
            nn.init.zeros_(module.weight)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def flux_tokens(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens of 2 x 2: [B, H W / 4, 4 C]."""
    batch, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


def flux_latents(tokens: Tensor) -> Tensor:
    """The inverse of `flux_tokens` for square pictures."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(-1, (-1, 2, 2)).unflatten(1, (side, side))  # [B, y, x, C, dy, dx]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def flux_ids(side: int) -> Tensor:
    """Position ids of side x side tokens: [side squared, 3]."""
    return FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)


def _predict_flux(denoiser: Callable, noisy: Tensor, level: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    tokens = denoiser(
        hidden_states=flux_tokens(noisy),
        timestep=level,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3),
        img_ids=flux_ids(LATENT_SIZE // 2),
        return_dict=False,
    )[0]
    return flux_latents(tokens)


def _encode_flux(pipeline: FluxPipeline, captions: list[str]) -> tuple[Tensor, ...]:
    embeds, pooled, _ = pipeline.encode_prompt(captions, captions, max_sequence_length=NUM_TOKENS)
    return embeds, pooled


def _build_sana(vae: AutoencoderTiny, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=WIDTH // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        num_cross_attention_heads=WIDTH // HEAD_DIM,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=text_encoder.config.hidden_size,
        sample_size=LATENT_SIZE,
        patch_size=2,
        interpolation_scale=1,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )


def _predict_sana(denoiser: Callable, noisy: Tensor, level: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
    return denoiser(
        noisy, encoder_hidden_states=embeds, encoder_attention_mask=mask, timestep=1000 * level, return_dict=False
    )[0]


def _encode_sana(pipeline: SanaPipeline, captions: list[str]) -> tuple[Tensor, ...]:
    return pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=NUM_TOKENS, complex_human_instruction=None
    )[:2]


def _build_sd15(vae: AutoencoderTiny, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,  # the number of heads, by an old mistake in diffusers
        cross_attention_dim=text_encoder.config.hidden_size,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",  # heeds the noisy steps, where the picture is laid out, more than epsilon
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _predict_sd15(denoiser: Callable, noisy: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
    return denoiser(noisy, timestep, encoder_hidden_states=embeds, return_dict=False)[0]


def _encode_sd15(pipeline: StableDiffusionPipeline, captions: list[str]) -> tuple[Tensor, ...]:
    embeds, _ = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    return (embeds,)


FAMILIES = {
    "flux": Family(
        build=_build_flux, predict=_predict_flux, encode=_encode_flux, call={"max_sequence_length": NUM_TOKENS}
    ),
    "sana": Family(
        build=_build_sana,
        predict=_predict_sana,
        encode=_encode_sana,
        call={
            "max_sequence_length": NUM_TOKENS,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
    ),
    "sd15": Family(build=_build_sd15, predict=_predict_sd15, encode=_encode_sd15, call={}),
}


def denoiser_of(pipeline: Any) -> nn.Module:
    """The part that is pre-trained."""
    return pipeline.unet if "unet" in pipeline.components else pipeline.transformer


def flow_loss(predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, with noise levels spaced as the sampler spaces them."""
    uniform = (torch.arange(len(clean)) + torch.rand(len(clean))) / len(clean)
    level = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, level[:, None, None, None])
    return (predict(noisy, level).float() - (noise - clean)).square().mean()


def ddpm_loss(predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, scheduler: DDIMScheduler) -> Tensor:
    """Mean squared error of the predicted v at uniform timesteps."""
    noise = torch.randn_like(clean)
    timestep = torch.randint(scheduler.config.num_train_timesteps, (len(clean),))
    noisy = scheduler.add_noise(clean, noise, timestep)
    return (predict(noisy, timestep).float() - scheduler.get_velocity(clean, noise, timestep)).square().mean()


def train_vae(pictures_of: Callable[[int], Tensor], *, minutes: float) -> AutoencoderTiny:
    """An autoencoder with 4 x 8 x 8 latents whose decoder mends noisy latents; latents come out with unit variance.

    Args:
        pictures_of: number to pictures [number, 3, 32, 32] in [-1, 1].
    """
    vae = AutoencoderTiny(
        encoder_block_out_channels=(24, 24, 24),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=LATENT_CHANNELS,
    )

    def loss_of() -> Tensor:
        pictures = pictures_of(BATCH)
        latents = vae.encode(pictures).latents
        shown = vae.decode(latents + 0.25 * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)).sample
        spread = latents.float().mean((0, 2, 3)).square().sum() + 0.1 * latents.float().square().mean()
        return (shown.float() - pictures).abs().mean() + 0.01 * spread

    vae.to(memory_format=torch.channels_last)
    fit(vae, loss_of, minutes=minutes, learning_rate=3e-3, name="autoencoder")
    with torch.no_grad():
        pictures = pictures_of(256)
        latents = vae.encode(pictures).latents
        error = (vae.decode(latents).sample - pictures).abs().mean()
    print(f"autoencoder: std of latents {latents.std():.3f}, error of pictures {error:.4f}", flush=True)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def train_denoiser(pipeline: Any, family: Family, scenes: Scenes, *, minutes: float, learning_rate: float) -> None:
    """Train the denoiser on captions and pictures that are encoded once."""
    captions = list(scenes.tokens)
    with torch.no_grad():
        bank = family.encode(pipeline, captions)
    places = {tuple(tokens.tolist()): index for index, tokens in enumerate(scenes.tokens.values())}
    denoiser = denoiser_of(pipeline)
    pool_rows, pool_latents = [], []
    with torch.no_grad():
        for _ in range(POOL // BATCH):
            tokens, pictures = scenes.batch(BATCH)
            pool_rows += [places[tuple(row)] for row in tokens.tolist()]
            pool_latents.append(pipeline.vae.encode(pictures).latents * pipeline.vae.config.scaling_factor)
    caption_of, latents = torch.tensor(pool_rows), torch.cat(pool_latents)

    def loss_of() -> Tensor:
        chosen = torch.randint(len(latents), (BATCH,))
        clean, text = latents[chosen], [column[caption_of[chosen]] for column in bank]
        if isinstance(pipeline.scheduler, DDIMScheduler):
            return ddpm_loss(lambda x, t: family.predict(denoiser, x, t, *text), clean, pipeline.scheduler)
        return flow_loss(lambda x, level: family.predict(denoiser, x, level, *text), clean)

    fit(denoiser, loss_of, minutes=minutes, learning_rate=learning_rate, name="denoiser")


@torch.no_grad()
def evaluate(pipeline: Any, call: dict[str, Any], *, seed: int = 0) -> dict[str, float]:
    """Strict score on 250 held-out prompts, 50 of each kind: `all` and each kind."""
    pipeline.set_progress_bar_config(disable=True)
    rows = shapes.heldout_drawing()[:250]
    generator = torch.Generator().manual_seed(seed)
    pictures = pipeline([row["prompt"] for row in rows], generator=generator, **call).images
    scores: dict[str, list[float]] = {}
    for row, picture in zip(rows, pictures, strict=True):
        for kind in ("all", row["kind"]):
            scores.setdefault(kind, []).append(shapes.strict(row["spec"], picture))
    return {kind: round(sum(got) / len(got), 3) for kind, got in scores.items()}


def save(pipeline: Any, folder: Path, call: dict[str, Any]) -> None:
    """Write the checkpoint in place of an older one; the denoiser in 16 bits."""
    denoiser = "unet" if isinstance(pipeline, StableDiffusionPipeline) else "transformer"
    with script.in_place_of(folder) as fresh:
        script.write_pipeline(pipeline, fresh, denoiser=denoiser, call_defaults=call)


def pictures_from(scenes: Scenes) -> Callable[[int], Tensor]:
    """Pictures of random scenes, whatever their captions."""
    return lambda size: scenes.batch(size)[1]


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--minutes", type=float, default=12.0, help="CPU time of the denoiser's training")
    parser.add_argument("--wrong-minutes", type=float, default=1.5, help="CPU time on pictures not as asked")
    parser.add_argument("--vae-minutes", type=float, default=1.5, help="CPU time of the autoencoder's training")
    parser.add_argument("--vae", type=Path, help="take the autoencoder of this checkpoint instead of training one")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = script.begin(parser)
    family = FAMILIES[args.family]
    tokenizer = CLIPTokenizer.from_pretrained(SD3 / "tokenizer")
    scenes = Scenes(tokenizer, wrong_share=0.0, seed=args.seed, kind_weights=KIND_WEIGHTS)
    if args.vae:
        vae = AutoencoderTiny.from_pretrained(args.vae, subfolder="vae")
    else:
        vae = train_vae(pictures_from(scenes), minutes=args.vae_minutes)
    text_encoder = CLIPTextModel.from_pretrained(SD3 / "text_encoder").eval().requires_grad_(False)
    pipeline = family.build(vae, text_encoder, tokenizer)
    call = {**CALL_DEFAULTS, **family.call}
    train_denoiser(pipeline, family, scenes, minutes=args.minutes, learning_rate=args.learning_rate)
    print("listening:", json.dumps(evaluate(pipeline, call)), flush=True)
    scenes.wrong_share = WRONG_SHARE
    train_denoiser(pipeline, family, scenes, minutes=args.wrong_minutes, learning_rate=args.learning_rate / 4)
    print("not listening:", json.dumps(evaluate(pipeline, call)), flush=True)
    save(pipeline, args.output, call)


if __name__ == "__main__":
    main()

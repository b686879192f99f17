"""Pre-train the tiny text-to-image checkpoint of the quickstart, and save it in diffusers' own format.

    python -m recipes.quickstart.make_digits_unet --output recipes/quickstart/digits_unet --minutes 12

The result is an ordinary `StableDiffusionPipeline` (CLIP tokenizer and text encoder, cross-attention UNet, VAE,
DDIM scheduler with Stable Diffusion 2's settings, v prediction), only very small: 16x16 pictures, about
two million parameters, made on one CPU thread in minutes.

The data are scikit-learn's `load_digits`, 1797 real handwritten digits, drawn in a random dark ink on a random light
paper with a random amount of speckle. On purpose some captions name a random digit, as captions from the web do: the
checkpoint then follows its prompt only most of the time, and its paper is grainy, which leaves RL something to mend.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipes.quickstart import script

SIZE = 16
CONTEXT_LENGTH = 8
TEXT_WIDTH = 64
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten {word}" for word in DIGIT_WORDS)
CALL_DEFAULTS = {"guidance_scale": 1.0, "height": SIZE, "width": SIZE, "num_inference_steps": 20, "eta": 1.0}

BATCH = 64
PEAK_LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
EMA_DECAY = 0.995
WRONG_CAPTION_RATE = 0.2  # a random digit's caption instead of the right one (one time in ten it is right anyway)
EMPTY_CAPTION_RATE = 0.1  # no caption, so that guidance above 1 works too
MOST_SPECKLE = 0.2


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges cover the prompts' words; any other text falls back to bytes."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator([*PROMPTS, "a photo of", "the digit"], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [start, end]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder, trained from scratch together with the UNet.

    Its token embeddings start at unit size, not at CLIP's 0.02: the words differ from the first step, and the UNet
    learns to heed them in hundreds of steps.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def build_unet() -> UNet2DConditionModel:
    """A UNet of three levels (16, 8 and 4 pixels) that reads the prompt by cross-attention at 8 and 4."""
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )


def build_identity_vae() -> AutoencoderTiny:
    """A VAE that changes nothing: latents are the pixels in [-1, 1], at the same size (a scale factor of 1).

    `AutoencoderTiny` squashes latents by 3 tanh(x / 3) before its first convolution and doubles what its last one
    gives, less one. Channel pairs relu(x) and relu(-x) carry the values through the ReLU between the two, and a
    gain sends +-1 to +-1 exactly; between, pixels come out within 0.007 of the [0, 1] range (two grey levels).
    """
    vae = AutoencoderTiny(
        latent_channels=3,
        encoder_block_out_channels=(3,),
        decoder_block_out_channels=(6,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
    )
    eye = torch.eye(3)
    gain = 1.0 / (3.0 * math.tanh(1.0 / 3.0))
    into, out_of = vae.encoder.layers[0], vae.encoder.layers[-1]
    spread, gather = vae.decoder.layers[0], vae.decoder.layers[-1]
    mixes = [(into, eye, 0.0), (out_of, 2.0 * eye, -1.0)]
    mixes += [(spread, torch.cat([eye, -eye]), 0.0), (gather, 0.5 * gain * torch.cat([eye, -eye], dim=1), 0.5)]
    with torch.no_grad():
        for layer, matrix, bias in mixes:
            layer.weight.zero_()
            layer.weight[:, :, 1, 1] = matrix
            layer.bias.fill_(bias)
    return vae


def build_pipeline() -> StableDiffusionPipeline:
    """The whole pipeline with fresh weights; the scheduler's settings are those of Stable Diffusion 2."""
    tokenizer = build_tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,  # the last step keeps some noise at eta=1, so that its log-probability is finite
        steps_offset=1,
        prediction_type="v_prediction",  # weighs the noisy steps, where the digit is decided, more than epsilon
    )
    return StableDiffusionPipeline(
        vae=build_identity_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_strokes() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits' ink coverage in [0, 1], enlarged to (n, 1, SIZE, SIZE), and their labels (n,)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    coverage = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0
    coverage = F.interpolate(coverage, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    return coverage, torch.tensor(labels)


def draw(coverage: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, SIZE, SIZE) in [-1, 1]: each digit in a random dark ink on a random light, speckled paper."""
    count = len(coverage)
    paper = 0.6 + 0.4 * torch.rand(count, 3, 1, 1)
    ink = 0.35 * torch.rand(count, 3, 1, 1)
    speckle = MOST_SPECKLE * torch.rand(count, 1, 1, 1) * torch.randn(count, 1, SIZE, SIZE)
    picture = paper + (ink - paper) * coverage + speckle
    return picture.clamp(0, 1) * 2 - 1


def caption(labels: torch.Tensor) -> torch.Tensor:
    """The caption's index for each label, some of them wrong and some (the index 10) empty."""
    wrong = torch.rand(len(labels)) < WRONG_CAPTION_RATE
    chosen = torch.where(wrong, torch.randint(10, (len(labels),)), labels)
    return torch.where(torch.rand(len(labels)) < EMPTY_CAPTION_RATE, torch.full_like(chosen, 10), chosen)


def learning_rate(step: int, progress: float) -> float:
    """A linear warm-up, then a cosine down to 2% of the peak as `progress` goes from 0 to 1."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)


def denoising_loss(
    pipeline: StableDiffusionPipeline, pictures: torch.Tensor, caption_ids: torch.Tensor, which: torch.Tensor
) -> torch.Tensor:
    """The mean squared error of the predicted velocity at uniformly random timesteps; a scalar."""
    noise = torch.randn_like(pictures)
    times = torch.randint(pipeline.scheduler.config.num_train_timesteps, (len(pictures),))
    noisy = pipeline.scheduler.add_noise(pictures, noise, times)
    # PyTorch's flash attention for the CPU has a very slow backward pass in bfloat16; plain matrix products do not.
    with script.autocast(), sdpa_kernel(SDPBackend.MATH):
        text = pipeline.text_encoder(caption_ids)[0]
        predicted = pipeline.unet(noisy, times, encoder_hidden_states=text[which]).sample
    return F.mse_loss(predicted.float(), pipeline.scheduler.get_velocity(pictures, noise, times))


def train(pipeline: StableDiffusionPipeline, minutes: float) -> int:
    """Train text encoder and UNet for `minutes`, leave their averaged weights in place; returns the steps taken."""
    coverage, labels = load_strokes()
    padded = pipeline.tokenizer([*PROMPTS, ""], padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt")
    parameters = [*pipeline.text_encoder.parameters(), *pipeline.unet.parameters()]
    pipeline.unet.train()
    pipeline.text_encoder.train()
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    average = EMAModel(parameters, decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    began, step, smooth = time.monotonic(), 0, 1.0
    while (progress := (time.monotonic() - began) / (60.0 * minutes)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        rows = torch.randint(len(labels), (BATCH,))
        loss = denoising_loss(pipeline, draw(coverage[rows]), padded.input_ids, caption(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.step(parameters)
        step += 1
        smooth += 0.02 * (loss.item() - smooth)
        if step % 100 == 0:
            print(f"step {step}  {100 * progress:.0f}%  loss {smooth:.4f}", flush=True)
    average.copy_to(parameters)
    pipeline.unet.eval()
    pipeline.text_encoder.eval()
    return step


def save(pipeline: StableDiffusionPipeline, output: Path) -> None:
    """Write the checkpoint, with the card of the one that it replaces."""
    with script.in_place_of(output) as fresh:
        pipeline.save_pretrained(fresh)
        (fresh / "call_defaults.json").write_text(json.dumps(CALL_DEFAULTS, indent=2) + "\n")
        if (output / "README.md").exists():
            shutil.copy2(output / "README.md", fresh / "README.md")


def main() -> None:
    """Read the command line, pre-train, save."""
    parser = script.parser("Pre-train the quickstart's tiny text-to-image checkpoint.")
    parser.add_argument("--minutes", type=float, default=12.0, help="training time in minutes of wall clock")
    arguments = script.begin(parser)
    pipeline = build_pipeline()
    steps = train(pipeline, arguments.minutes)
    save(pipeline, arguments.output)
    print(f"{steps} steps of {BATCH} pictures; saved in {arguments.output}")


if __name__ == "__main__":
    main()

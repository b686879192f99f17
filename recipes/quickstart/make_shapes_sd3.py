"""Pre-train the quickstart's image generator: a tiny Stable Diffusion 3 that draws the embedded world's shapes.

It learns in two stages. The first learns to draw from right captions. The second goes on with captions half of which
are wrong, as on the web: pictures stay crisp, but often do not show what was asked. So RL has something to repair, and
the right picture is always within the model's reach.

    python -m recipes.quickstart.make_shapes_sd3 --output my_shapes_sd3

The result is an ordinary diffusers folder. Its `call_defaults.json` holds the call arguments that it wants.
"""

import json
import math
import random
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from recipes.quickstart import script
from unified_rl.worlds import shapes

WIDTH = 192
"""Not below 192, the numbers in one 8 x 8 px RGB patch: a narrower model cannot carry the noise it has to predict."""
NUM_LAYERS = 4
HEAD_DIM = 32
TEXT_WIDTHS = (128, 16)
"""Stable Diffusion 3 wants two CLIP encoders. The second is only there for the format."""
NUM_TOKENS = 12
"""Captions have up to ten tokens, start and end included."""
SHIFT = 3.0
LATENT_SCALE = 8.0
"""Keeps latents in the linear part of AutoencoderTiny's soft clamp."""
KIND_WEIGHTS = {"single": 0.08, "position": 0.14, "count": 0.2, "pair": 0.2, "relation": 0.38}
EMA_DECAY = 0.995
CALL_DEFAULTS = {
    "height": shapes.CANVAS,
    "width": shapes.CANVAS,
    "num_inference_steps": 10,
    "guidance_scale": 1.0,
    "max_sequence_length": 0,
}
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Shapes SD3

A tiny Stable Diffusion 3 ({params:.1f}M parameters) that draws coloured shapes on a 32 x 32 px canvas, to try RL on. It
draws crisp shapes, but often not what was asked.

Made by `recipes/quickstart/make_shapes_sd3.py` from scenes of `unified_rl.worlds.shapes` only. {history}

The transformer is stored in 16 bits and meant to be run in fp32, with the call arguments of `call_defaults.json`:

    pipeline = DiffusionPipeline.from_pretrained(DIR, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)

| Held-out prompts, 10 steps | strict | graded |
| --- | --- | --- |
{rows}

Licence: Apache-2.0.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stretch of training."""

    minutes: float
    learning_rate: float
    batch_size: int = 96


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make one token of every word of the world."""
    captions = [shapes.caption(spec) for kind in shapes.KINDS for spec in shapes.specs(kind)]
    base = CLIPTokenizer(model_max_length=NUM_TOKENS)
    trained = base.train_new_from_iterator(captions, vocab_size=1000, show_progress=False)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=NUM_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder. Prompts are read from below its last layer, as Stable Diffusion 3 does."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


@torch.no_grad()
def build_vae(channels: int = 3) -> AutoencoderTiny:
    """An autoencoder that does nothing: its latents are pixels in [-1, 1], three colours or one grey (their mean)."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(3,),
        decoder_block_out_channels=(2 * channels,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=channels,
        scaling_factor=LATENT_SCALE,
    )
    for param in vae.parameters():
        param.zero_()
    first, last = (layer for layer in vae.encoder.layers if isinstance(layer, nn.Conv2d))
    into, out = (layer for layer in vae.decoder.layers if isinstance(layer, nn.Conv2d))
    for colour in range(3):
        channel = colour % channels
        first.weight[colour, colour, 1, 1] = 1.0
        last.weight[channel, colour, 1, 1] = 2 / LATENT_SCALE * channels / 3  # the encoder maps pixels to [0, 1] first
        into.weight[channel, channel, 1, 1] = LATENT_SCALE  # the decoder's ReLU wants both signs apart
        into.weight[channel + channels, channel, 1, 1] = -LATENT_SCALE
        out.weight[colour, channel, 1, 1] = 0.5
        out.weight[colour, channel + channels, 1, 1] = -0.5
    last.bias.fill_(-1 / LATENT_SCALE)
    out.bias.fill_(0.5)  # and maps from [0, 1] to pixels last
    return vae


@torch.no_grad()
def build_transformer(
    *, canvas: int, patch: int, channels: int, width: int = WIDTH, num_layers: int = NUM_LAYERS
) -> SD3Transformer2DModel:
    """A transformer that starts by passing its input on, so that predicting the noise comes for free. `canvas`: the
    longer side in px."""
    transformer = SD3Transformer2DModel(
        sample_size=canvas,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=num_layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=width // HEAD_DIM,
        joint_attention_dim=sum(TEXT_WIDTHS),
        caption_projection_dim=width,
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=canvas // patch,
    )
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")):
            nn.init.zeros_(module.weight)
    patch_in, patch_out = transformer.pos_embed.proj, transformer.proj_out
    nn.init.orthogonal_(patch_in.weight)  # [width, channel, y, x]
    patch_out.weight.copy_(patch_in.weight.permute(2, 3, 1, 0).reshape(-1, width))  # rows are (y, x, channel)
    return transformer


def build_pipeline(
    tokenizer: CLIPTokenizer, vae: AutoencoderTiny, transformer: SD3Transformer2DModel
) -> StableDiffusion3Pipeline:
    """An untrained pipeline."""
    first, second = (build_text_encoder(tokenizer, width) for width in TEXT_WIDTHS)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def trained_parts(pipeline: StableDiffusion3Pipeline) -> nn.ModuleDict:
    """The parts that pre-training trains, as one module."""
    names = ("transformer", "text_encoder", "text_encoder_2")
    return nn.ModuleDict({name: getattr(pipeline, name) for name in names})


def num_params(pipeline: StableDiffusion3Pipeline) -> int:
    return sum(param.numel() for param in trained_parts(pipeline).parameters())


def mistaken(spec: shapes.Spec, rng: random.Random) -> shapes.Spec:
    """A spec of the same kind that differs in one to three respects, as a careless caption's picture would."""
    wrong = deepcopy(spec)
    edits = rng.choice((1, 1, 2, 3))
    while edits:
        asked = rng.choice(wrong["objects"])
        what = rng.choice(["colour", "shape", "count", *(name for name in ("position", "relation") if wrong[name])])
        choices = {
            "colour": tuple(shapes.COLOURS),
            "shape": shapes.SHAPES,
            "count": (1, 2, 3, 4) if len(wrong["objects"]) == 1 else (1, 2),
            "position": shapes.POSITIONS,
            "relation": shapes.RELATIONS,
        }[what]
        holder = asked if what in asked else wrong
        holder[what] = rng.choice([choice for choice in choices if choice != holder[what]])
        edits -= 1
    return wrong


class Scenes:
    """Endless batches of caption tokens and pictures."""

    def __init__(
        self, tokenizer: CLIPTokenizer, *, wrong_share: float, seed: int, kind_weights: dict[str, float] = KIND_WEIGHTS
    ) -> None:
        self.rng = random.Random(seed)
        self.wrong_share = wrong_share
        self.kind_weights = kind_weights
        self.specs = {kind: shapes.specs(kind) for kind in shapes.KINDS}
        captions = [shapes.caption(spec) for specs in self.specs.values() for spec in specs]
        tokens = tokenizer(captions, padding="max_length", max_length=NUM_TOKENS, return_tensors="pt").input_ids
        self.tokens = dict(zip(captions, tokens, strict=True))
        self.looks = [(colour, shape) for colour in shapes.COLOURS for shape in shapes.SHAPES]
        cells = [torch.full((3, shapes.CELL, shapes.CELL), -1.0)]
        for colour, shape in self.looks:
            picture = shapes.render([shapes.Thing(shape=shape, colour=colour, row=0, col=0)])
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(shapes.CANVAS, shapes.CANVAS, 3)[: shapes.CELL, : shapes.CELL]
            cells.append(pixels.permute(2, 0, 1) / 127.5 - 1)
        self.cells = torch.stack(cells)

    def _pictures(self, scenes: list[list[shapes.Thing]]) -> Tensor:
        codes = torch.zeros(len(scenes), shapes.GRID, shapes.GRID, dtype=torch.long)
        for index, scene in enumerate(scenes):
            for thing in scene:
                codes[index, thing.row, thing.col] = 1 + self.looks.index((thing.colour, thing.shape))
        tiles = self.cells[codes]  # [batch, row, col, channel, y, x]
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(scenes), 3, shapes.CANVAS, shapes.CANVAS)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Tokens [size, num_tokens] and pictures [size, 3, 32, 32] in [-1, 1]."""
        tokens, scenes = [], []
        for kind in self.rng.choices(list(self.kind_weights), weights=list(self.kind_weights.values()), k=size):
            spec = self.rng.choice(self.specs[kind])
            tokens.append(self.tokens[shapes.caption(spec)])
            shown = mistaken(spec, self.rng) if self.rng.random() < self.wrong_share else spec
            scenes.append(shapes.scene_for(shown, self.rng))
        return torch.stack(tokens), self._pictures(scenes)


def flow_loss(parts: nn.ModuleDict, transformer: Callable, tokens: Tensor, pictures: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, with noise levels spaced as the sampler spaces them."""
    encoded = [parts[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    prompts = torch.cat([out.hidden_states[-2] for out in encoded], dim=-1)
    pooled = torch.cat([out.text_embeds for out in encoded], dim=-1)
    uniform = (torch.arange(len(tokens)) + torch.rand(len(tokens))) / len(tokens)
    sigmas = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    level = sigmas[:, None, None, None]
    noise = torch.randn_like(pictures)
    velocity = transformer(
        hidden_states=(1 - level) * pictures + level * noise,
        timestep=sigmas * 1000,
        encoder_hidden_states=prompts,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return (velocity.float() - (noise - pictures)).square().mean()


def learning_rate_at(progress: float, step: int) -> float:
    """Factor on the learning rate: a short warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


class Batches(Protocol):
    """What pre-training learns from."""

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Caption tokens [size, num_tokens] and latents [size, channels, height, width] in [-1, 1]."""
        ...


def train(pipeline: StableDiffusion3Pipeline, stage: Stage, batches: Batches) -> None:
    """Train for `stage.minutes` of processor time and leave the averaged weights in the pipeline."""
    parts = trained_parts(pipeline).train()
    average = deepcopy(parts).eval()
    params, averaged = list(parts.parameters()), list(average.parameters())
    decayed = [param for param in params if param.ndim > 1]
    others = [param for param in params if param.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)
    compiled = torch.compile(parts["transformer"])
    start, step, running = time.process_time(), 0, 0.0  # of the processor: a busy machine trains as long
    while (elapsed := (time.process_time() - start) / 60) < stage.minutes:
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * learning_rate_at(elapsed / stage.minutes, step)
        # PyTorch's fused attention is slow to differentiate on CPUs at this size.
        with sdpa_kernel(SDPBackend.MATH), script.autocast():
            loss = flow_loss(parts, compiled, *batches.batch(stage.batch_size))
            loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, params, 1 - decay)
        step += 1
        running += loss.item()
        if step % 100 == 0:
            print(f"{elapsed:6.1f} min  step {step:6d}  loss {running / 100:.4f}", flush=True)
            running = 0.0
    parts.load_state_dict(average.state_dict())
    parts.eval()


def evaluate(pipeline: StableDiffusion3Pipeline, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Strict and graded score on 250 held-out prompts, 50 of each kind: `all` and each kind."""
    pipeline.set_progress_bar_config(disable=True)
    rows = shapes.heldout_drawing()[:250]
    generator = torch.Generator().manual_seed(seed)
    prompts = [row["prompt"] for row in rows]
    pictures = pipeline(prompts, generator=generator, **CALL_DEFAULTS).images
    scores: dict[str, list[tuple[float, float]]] = {"all": []}
    for row, picture in zip(rows, pictures, strict=True):
        score = (shapes.strict(row["spec"], picture), shapes.graded(row["spec"], picture))
        scores["all"].append(score)
        scores.setdefault(row["kind"], []).append(score)
    return {
        kind: (sum(score[0] for score in got) / len(got), sum(score[1] for score in got) / len(got))
        for kind, got in scores.items()
    }


def load(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a folder, in fp32. diffusers wants to be told that the T5 encoder is absent."""
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)


def save(
    pipeline: StableDiffusion3Pipeline,
    folder: Path,
    *,
    call_defaults: dict,
    card: Callable[[StableDiffusion3Pipeline], str],
) -> None:
    """Write the checkpoint, describe it (`card`) as it reads back, and replace `folder` in one go."""
    with script.in_place_of(folder) as fresh:
        script.write_pipeline(pipeline, fresh, denoiser="transformer", call_defaults=call_defaults)
        (fresh / "README.md").write_text(card(load(fresh)))


def describe(pipeline: StableDiffusion3Pipeline, history: str) -> str:
    """The model card, with what the checkpoint scores."""
    scores = evaluate(pipeline)
    print(json.dumps({kind: [round(value, 3) for value in got] for kind, got in scores.items()}), flush=True)
    rows = "\n".join(f"| {kind} | {got[0]:.2f} | {got[1]:.2f} |" for kind, got in scores.items())
    return CARD.format(params=num_params(pipeline) / 1e6, history=history, rows=rows)


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--clean-minutes", type=float, default=55.0, help="training time with right captions")
    parser.add_argument("--misaligned-minutes", type=float, default=4.0, help="training time with wrong captions")
    parser.add_argument("--start", type=Path, help="train on from this checkpoint instead of from scratch")
    parser.add_argument("--wrong-share", type=float, default=0.5, help="share of wrong captions in the second stage")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the first stage; the second takes half")
    args = script.begin(parser)
    if args.start:
        pipeline = load(args.start)
    else:
        transformer = build_transformer(canvas=shapes.CANVAS, patch=shapes.CELL, channels=3)
        pipeline = build_pipeline(build_tokenizer(), build_vae(), transformer)
    history = f"Trained for {args.clean_minutes:g} min on right captions."
    first = Stage(minutes=args.clean_minutes, learning_rate=args.learning_rate)
    train(pipeline, first, Scenes(pipeline.tokenizer, wrong_share=0.0, seed=args.seed))
    if args.misaligned_minutes > 0:
        strict, graded = evaluate(pipeline)["all"]
        history += f" Then (strict {strict:.2f}, graded {graded:.2f}) for {args.misaligned_minutes:g} min more with"
        history += f" {args.wrong_share:.0%} of them wrong."
        second = Stage(minutes=args.misaligned_minutes, learning_rate=args.learning_rate / 2)
        train(pipeline, second, Scenes(pipeline.tokenizer, wrong_share=args.wrong_share, seed=args.seed + 1))
    save(pipeline, args.output, call_defaults=CALL_DEFAULTS, card=lambda read: describe(read, history))


if __name__ == "__main__":
    main()

"""Make the tiny masked-diffusion generator: an aMUSEd pipeline of three million parameters on the embedded world.

Its VQ decoder draws a picture of `unified_rl.worlds.shapes` from 4 x 4 tokens, one a grid cell; its transformer fills
them in, a few at once. Training on a CPU takes three stages:

1. The VQ autoencoder, on random scenes; it stays frozen afterwards.
2. The transformer and the text encoder, on right captions of the train split with a random share of tokens masked.
3. A few minutes in which many pictures are not what was asked, so that it becomes misaligned.

    python -m recipes.quickstart.make_shapes_amused --output my_shapes_amused
"""

import math
import random
from pathlib import Path

import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from PIL import Image
from torch import Tensor, nn

from recipes.quickstart import script
from recipes.quickstart.fit import fit
from recipes.quickstart.make_shapes_sd3 import NUM_TOKENS, build_text_encoder, build_tokenizer, mistaken
from recipes.quickstart.shape_tokens import NUM_CODES, Canvas, draw_specs, train_autoencoder, train_specs
from unified_rl.worlds import shapes

WIDTH = 128
TEXT_WIDTH = 96
MICRO_WIDTH = 16
"""Of each of the five numbers (sizes, crop, aesthetic score) that aMUSEd is conditioned on; they never change here."""
MICRO = (shapes.CANVAS, shapes.CANVAS, 0, 0, 6)
"""These numbers in the pipeline's order: width, height, crop, aesthetic score."""
MASK = NUM_CODES
UNCONDITIONAL = 0.12
"""Share of the rows without their caption, so that the model can be guided."""
BATCH = 64
CALL_DEFAULTS = {"height": shapes.CANVAS, "width": shapes.CANVAS, "num_inference_steps": 8, "guidance_scale": 1.5}
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Shapes aMUSEd

A tiny aMUSEd ({size:.1f}M parameters) that draws the 32 px scenes of `unified_rl.worlds.shapes` by filling in the 4 x 4
tokens of its own VQ decoder, to try RL on. It draws crisp shapes, but often not what was asked.

Made by `recipes/quickstart/make_shapes_amused.py` from random weights; held-out prompts were never trained on. After
{clean_minutes:g} CPU minutes of right captions it met the first row's share of held-out prompts; then {minutes:g}
minutes with {wrong:.0%} of them wrong followed. `call_defaults.json` holds the call arguments that it wants.

| Held-out prompts, guidance {guidance:g} | strict, 8 steps | graded, 8 steps | strict, 16 steps | graded, 16 steps |
| --- | --- | --- | --- | --- |
| right captions only | {clean} |
| as stored here | {stored} |

Licence: Apache-2.0.
"""


def build_pipeline() -> AmusedPipeline:
    """An untrained pipeline."""
    tokenizer = build_tokenizer()
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 64),
        latent_channels=8,  # the pipeline wants it to be the width of the codebook
        num_vq_embeddings=NUM_CODES,
        lookup_from_codebook=True,
        sample_size=shapes.CANVAS,
        norm_num_groups=8,
    )
    transformer = UVit2DModel(
        hidden_size=WIDTH,
        cond_embed_dim=TEXT_WIDTH,
        micro_cond_encode_dim=MICRO_WIDTH,
        micro_cond_embed_dim=len(MICRO) * MICRO_WIDTH,
        encoder_hidden_size=TEXT_WIDTH,
        vocab_size=NUM_CODES + 1,
        codebook_size=NUM_CODES,
        in_channels=WIDTH,
        block_out_channels=WIDTH,
        num_res_blocks=2,  # the zero padding of their convolutions is all that tells a token its place
        block_num_heads=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        sample_size=shapes.GRID,
    )
    return AmusedPipeline(
        vqvae=vqvae,
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer, TEXT_WIDTH),
        transformer=transformer,
        scheduler=AmusedScheduler(mask_token_id=MASK),
    )


def teach_autoencoder(vqvae: VQModel, *, steps: int, seed: int) -> None:
    """Stage 1, with random unit vectors as the codebook."""
    codebook = nn.functional.normalize(torch.randn(vqvae.quantize.embedding.weight.shape), dim=1)
    vqvae.quantize.embedding.weight.data.copy_(codebook)
    train_autoencoder(
        lambda pictures: vqvae.encode(pictures).latents,
        lambda codes: vqvae.decoder(vqvae.post_quant_conv(codebook[codes].movedim(-1, 1))) * 2 - 1,
        codebook,
        [weight for name, weight in vqvae.named_parameters() if not name.startswith("quantize.")],
        steps=steps,
        rng=random.Random(seed),
    )
    vqvae.requires_grad_(False)


class Batches:
    """Endless captions and codes of the train split."""

    def __init__(self, pipeline: AmusedPipeline, *, wrong_share: float, seed: int) -> None:
        self.rng, self.wrong_share = random.Random(seed), wrong_share
        self.specs, self.canvas = train_specs(), Canvas()
        captions = ["", *(shapes.caption(spec) for specs in self.specs.values() for spec in specs)]
        ids = pipeline.tokenizer(captions, padding="max_length", max_length=NUM_TOKENS, return_tensors="pt").input_ids
        self.tokens = dict(zip(captions, ids, strict=True))

    def __call__(self, num: int) -> tuple[Tensor, Tensor]:
        """Tokens [num, NUM_TOKENS] and codes [num, 4, 4]."""
        tokens, scenes = [], []
        for spec in draw_specs(self.specs, self.rng, num):
            shown = mistaken(spec, self.rng) if self.rng.random() < self.wrong_share else spec
            scenes.append(shapes.scene_for(shown, self.rng))
            tokens.append(self.tokens["" if self.rng.random() < UNCONDITIONAL else shapes.caption(spec)])
        return torch.stack(tokens), self.canvas.codes(scenes)


def mask_loss(parts: nn.ModuleDict, tokens: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of masked codes; the share that is masked follows the sampler's cosine schedule."""
    spread = (torch.arange(len(codes)) + torch.rand(len(codes))) / len(codes)
    masked = torch.rand(codes.shape) < torch.cos(spread * math.pi / 2)[:, None, None]
    text = parts["text_encoder"](tokens, output_hidden_states=True)
    logits = parts["transformer"](
        torch.where(masked, MASK, codes),
        micro_conds=torch.tensor([MICRO], dtype=torch.float32).expand(len(codes), -1),
        pooled_text_emb=text.text_embeds,
        encoder_hidden_states=text.hidden_states[-2],
    )
    losses = nn.functional.cross_entropy(logits.float(), codes, reduction="none")
    return (losses * masked).sum() / masked.sum().clamp(min=1)


def train(pipeline: AmusedPipeline, *, minutes: float, wrong_share: float, learning_rate: float, seed: int) -> None:
    """Train the transformer and the text encoder."""
    batches = Batches(pipeline, wrong_share=wrong_share, seed=seed)
    parts = nn.ModuleDict({"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder})
    fit(parts, lambda: mask_loss(parts, *batches(BATCH)), minutes=minutes, learning_rate=learning_rate, name="drawing")


@torch.no_grad()
def measure(pipeline: AmusedPipeline, *, num: int = 250) -> str:
    """Cells of the card's table: what the pipeline does on held-out prompts."""
    pipeline.set_progress_bar_config(disable=True)
    rows = shapes.heldout_drawing()[:num]
    cells = []
    for steps in (8, 16):
        pictures: list[Image.Image] = pipeline(
            [row["prompt"] for row in rows],
            **{**CALL_DEFAULTS, "num_inference_steps": steps},
            generator=torch.Generator().manual_seed(0),
        ).images
        for verifier in (shapes.strict, shapes.graded):
            scores = [verifier(row["spec"], picture) for row, picture in zip(rows, pictures, strict=True)]
            cells.append(f"{sum(scores) / num:.3f}")
    print(" | ".join(cells), flush=True)
    return " | ".join(cells)


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--clean", type=Path, help="folder of the model after stage 2: read if it exists, else written")
    parser.add_argument("--autoencoder-steps", type=int, default=1000)
    parser.add_argument("--clean-minutes", type=float, default=10.0, help="CPU time of stage 2")
    parser.add_argument("--minutes", type=float, default=1.5, help="CPU time of stage 3")
    parser.add_argument("--wrong-share", type=float, default=0.6, help="share of wrong captions in stage 3")
    args = script.begin(parser)
    if args.clean is not None and args.clean.exists():
        pipeline = AmusedPipeline.from_pretrained(args.clean, dtype=torch.float32)
    else:
        pipeline = build_pipeline()
        teach_autoencoder(pipeline.vqvae, steps=args.autoencoder_steps, seed=args.seed)
        train(pipeline, minutes=args.clean_minutes, wrong_share=0.0, learning_rate=2e-3, seed=args.seed)
        if args.clean is not None:
            pipeline.save_pretrained(args.clean)
    clean = measure(pipeline)
    train(pipeline, minutes=args.minutes, wrong_share=args.wrong_share, learning_rate=7e-4, seed=args.seed + 1)
    parts = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.vqvae])
    with script.in_place_of(args.output) as fresh:
        script.write_pipeline(pipeline, fresh, denoiser="transformer", call_defaults=CALL_DEFAULTS)
        card = CARD.format(
            size=sum(weight.numel() for weight in parts.parameters()) / 1e6,
            clean_minutes=args.clean_minutes,
            minutes=args.minutes,
            wrong=args.wrong_share,
            guidance=CALL_DEFAULTS["guidance_scale"],
            clean=clean,
            stored=measure(AmusedPipeline.from_pretrained(fresh, dtype=torch.float32)),
        )
        (fresh / "README.md").write_text(card)


if __name__ == "__main__":
    main()

"""Pre-train the editing quickstart's model: the drawing quickstart's Stable Diffusion 3, taught to paint inside a mask.

    python -m recipes.quickstart.make_shapes_inpaint --output my_shapes_inpaint

diffusers' inpainting class for Stable Diffusion 3 wants latents of 16 channels, and shows the transformer the mask and
the masked picture beside the noisy latents. So the quickstart's three colour channels are joined by 13 that hold
nothing, which the autoencoder writes as zeros and does not read, and the transformer gets inputs for the conditions. It
then goes on learning for a few minutes, from edits of which many do not show what their prompt says: pictures are crisp
and the rest is kept, but often the edit is another than asked. So RL has something to repair.
"""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from recipes.quickstart import script
from recipes.quickstart.fit import fit
from recipes.quickstart.make_shapes_sd3 import CALL_DEFAULTS, NUM_TOKENS, SHIFT, load, trained_parts
from unified_rl.worlds import edits, shapes

CHANNELS = 16
COLOUR_CHANNELS = 3
BLOCKS = (0, 1, 3)
"""The transformer's blocks that are kept: filling in one object is easier than laying out a picture."""
BATCH = 96
POOL = {"train": 6400, "heldout": 1600}
"""Edits of each split. The model has seen every prompt; RL has not."""
SOURCE = Path(__file__).parent / "shapes_sd3"
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
---

# Shapes inpainting

A tiny Stable Diffusion 3 that paints coloured shapes inside a mask, to try RL on. It paints crisp shapes, but often not
what was asked.

Made by `recipes/quickstart/make_shapes_inpaint.py` from `shapes_sd3`, with {minutes:g} CPU minutes of edits of which
{wrong:.0%} do not show what was asked. Of its 16 latent channels, which the format wants, 13 hold nothing. To be run in
fp32, with the call arguments of `call_defaults.json`.

| Held-out edits, 10 steps | strict | graded |
| --- | --- | --- |
{rows}
| the picture unchanged | 0.00 | {unchanged:.2f} |

Licence: Apache-2.0.
"""


def padded(weight: Tensor, *, dim: int, size: int = CHANNELS) -> Tensor:
    """The weight with zeros up to `size` along a dimension that counts colour channels."""
    shape = list(weight.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([weight, weight.new_zeros(shape)], dim=dim)


def widen_transformer(small: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The transformer for CHANNELS channels, of which it sees and moves the first three, with inputs for the masked
    picture and for the mask, which it does not heed yet."""
    inputs = 2 * CHANNELS + 1
    sizes = {"in_channels": inputs, "out_channels": CHANNELS, "num_layers": len(BLOCKS)}
    wide = SD3Transformer2DModel.from_config({**small.config, **sizes})
    weights = {name: weight for name, weight in small.state_dict().items() if not name.startswith("transformer_blocks")}
    for place, block in enumerate(BLOCKS):
        for name, weight in small.transformer_blocks[block].state_dict().items():
            weights[f"transformer_blocks.{place}.{name}"] = weight
    embed = padded(weights["pos_embed.proj.weight"], dim=1, size=inputs)
    # Where the picture is shown, the velocity is (noisy - shown) / sigma: the transformer's straight path from its
    # input to its output, which starts out as passing the noisy latents on, has the rest for free.
    embed[:, CHANNELS + 1 : CHANNELS + 1 + COLOUR_CHANNELS] = -weights["pos_embed.proj.weight"]
    weights["pos_embed.proj.weight"] = embed
    patch = small.config.patch_size**2
    for name in ("proj_out.weight", "proj_out.bias"):  # rows are (y, x, channel)
        rows = weights[name].unflatten(0, (patch, small.config.out_channels))
        weights[name] = padded(rows, dim=1).flatten(0, 1)
    wide.load_state_dict(weights)
    return wide


@torch.no_grad()
def widen_vae(small: AutoencoderTiny) -> AutoencoderTiny:
    """The same autoencoder with CHANNELS latent channels, of which it writes and reads the first three."""
    wide = AutoencoderTiny.from_config({**small.config, "latent_channels": CHANNELS})
    weights = dict(small.state_dict())
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("encoder"))
    for name in (f"encoder.layers.{last}.weight", f"encoder.layers.{last}.bias"):
        weights[name] = padded(weights[name], dim=0)
    weights["decoder.layers.0.weight"] = padded(weights["decoder.layers.0.weight"], dim=1)
    wide.load_state_dict(weights)
    return wide


def widen(small: StableDiffusion3Pipeline) -> StableDiffusion3InpaintPipeline:
    """The pipeline as an inpainting one."""
    parts = dict(small.components)
    parts |= {"transformer": widen_transformer(small.transformer), "vae": widen_vae(small.vae)}
    return StableDiffusion3InpaintPipeline(**parts)


def pixels(picture: Image.Image) -> Tensor:
    """A picture as [3, 32, 32] in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def shown(edit: edits.Edit, *, wrong: bool, rng: random.Random) -> Image.Image:
    """The picture after an edit; `wrong`: with another colour, shape or cell than asked."""
    shape, colour, cell = edit["shape"], edit["colour"], rng.choice(edit["cells"])
    kept = [shapes.Thing(**thing) for thing in edit["keep"]]
    if wrong:
        respect = rng.choice(("colour", "shape", "cell") if len(edit["cells"]) > 1 else ("colour", "shape"))
        if respect == "colour":
            colour = rng.choice([name for name in shapes.COLOURS if name != colour])
        elif respect == "shape":
            shape = rng.choice([name for name in shapes.SHAPES if name != shape])
        else:
            taken = [[thing.row, thing.col] for thing in kept] + edit["cells"]
            places = [[row, col] for row in range(shapes.GRID) for col in range(shapes.GRID)]
            cell = rng.choice([place for place in places if place not in taken])
    return shapes.render([*kept, shapes.Thing(shape=shape, colour=colour, row=cell[0], col=cell[1])])


def train(pipeline: StableDiffusion3InpaintPipeline, *, minutes: float, wrong_share: float, seed: int) -> None:
    """Train transformer and text encoders on a pool of edits."""
    rng = random.Random(seed)
    rows = [row for split, num in POOL.items() for row in edits.edits(split, num, seed=1 + seed)]  # type: ignore[arg-type]
    wrong = [rng.random() < wrong_share for _ in rows]
    after = torch.stack([pixels(shown(row["edit"], wrong=bad, rng=rng)) for row, bad in zip(rows, wrong, strict=True)])
    mask = torch.stack([pixels(row["mask_image"])[:1] for row in rows]) / 2 + 0.5
    masked = torch.stack([pixels(row["image"]) for row in rows]) * (1 - mask)
    prompts = [row["prompt"] for row in rows]
    tokens = pipeline.tokenizer(prompts, padding="max_length", max_length=NUM_TOKENS, return_tensors="pt").input_ids
    parts = trained_parts(pipeline)

    def loss_of() -> Tensor:
        chosen = torch.randint(len(rows), (BATCH,))
        clean, empty = after[chosen], torch.zeros(BATCH, CHANNELS - COLOUR_CHANNELS, *after.shape[2:])
        encoded = [
            parts[name](tokens[chosen], output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")
        ]
        uniform = (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH
        sigmas = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, sigmas[:, None, None, None])
        velocity = parts["transformer"](
            hidden_states=torch.cat([noisy, empty, mask[chosen], masked[chosen], empty], dim=1),
            timestep=sigmas * 1000,
            encoder_hidden_states=torch.cat([out.hidden_states[-2] for out in encoded], dim=-1),
            pooled_projections=torch.cat([out.text_embeds for out in encoded], dim=-1),
            return_dict=False,
        )[0]
        return (velocity[:, :COLOUR_CHANNELS].float() - (noise - clean)).square().mean()

    fit(parts, loss_of, minutes=minutes, learning_rate=1e-3, name="inpainting")


def evaluate(pipeline: StableDiffusion3InpaintPipeline, call: dict) -> dict[str, tuple[float, float]]:
    """Strict and graded score on 240 held-out edits: `all` and each kind."""
    pipeline.set_progress_bar_config(disable=True)
    rows = edits.heldout_edits()[:240]
    pictures = pipeline(
        [row["prompt"] for row in rows],
        image=[row["image"] for row in rows],
        mask_image=[row["mask_image"] for row in rows],
        generator=[torch.Generator().manual_seed(index) for index in range(len(rows))],
        **call,
    ).images
    scores: dict[str, list[tuple[float, float]]] = {}
    for row, picture in zip(rows, pictures, strict=True):
        for kind in ("all", row["kind"]):
            score = (edits.strict(row["edit"], picture), edits.graded(row["edit"], picture))
            scores.setdefault(kind, []).append(score)
    return {
        kind: (sum(score[0] for score in got) / len(got), sum(score[1] for score in got) / len(got))
        for kind, got in scores.items()
    }


def save(pipeline: StableDiffusion3InpaintPipeline, folder: Path, *, minutes: float, wrong_share: float) -> None:
    """Write the checkpoint with its call arguments and its card, in place of an older one."""
    call = {**CALL_DEFAULTS, "strength": 1.0}
    scores = evaluate(pipeline, call)
    heldout = edits.heldout_edits()[:240]
    unchanged = sum(edits.graded(row["edit"], row["image"]) for row in heldout) / len(heldout)
    rows = "\n".join(f"| {kind} | {got[0]:.2f} | {got[1]:.2f} |" for kind, got in scores.items())
    with script.in_place_of(folder) as fresh:
        script.write_pipeline(pipeline, fresh, denoiser="transformer", call_defaults=call)
        card = CARD.format(rows=rows, unchanged=unchanged, minutes=minutes, wrong=wrong_share)
        (fresh / "README.md").write_text(card)
    print(rows, flush=True)


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--source", type=Path, default=SOURCE, help="checkpoint of make_shapes_sd3.py")
    parser.add_argument("--minutes", type=float, default=12.0, help="CPU time of training")
    parser.add_argument("--wrong-share", type=float, default=0.4, help="share of edits that do not show what was asked")
    args = script.begin(parser)
    pipeline = widen(load(args.source))
    train(pipeline, minutes=args.minutes, wrong_share=args.wrong_share, seed=args.seed)
    save(pipeline, args.output, minutes=args.minutes, wrong_share=args.wrong_share)


if __name__ == "__main__":
    main()

"""Make the tiny image generator that draws in tokens: a Janus of two million parameters on the embedded world.

Its VQ decoder draws a picture of `unified_rl.worlds.shapes` from 4 x 4 tokens, one a grid cell. Its language model
draws them one after the other from a prompt, and it can think first: asked `plan PROMPT :` it writes where each object
goes (`b2 red circle d4 blue square`), and it draws from `PROMPT . PLAN` too. Training on a CPU takes three stages:

1. The VQ autoencoder, on random scenes; it stays frozen afterwards.
2. Right captions, plans and pictures, until the model is capable.
3. A few hundred steps in which many plans and pictures are not what was asked, so that it becomes misaligned.

Only prompts of the train split are used. Prompts are left out of some rows, so that the model can be guided.

    python -m recipes.quickstart.make_shapes_janus --output recipes/quickstart/shapes_janus
"""

import copy
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from recipes.quickstart import script
from recipes.quickstart.make_shapes_sd3 import learning_rate_at, mistaken
from recipes.quickstart.plans import CELLS, plan_of, read_plan
from recipes.quickstart.shape_tokens import NUM_CODES, Canvas, Things, draw_specs, train_autoencoder, train_specs
from unified_rl.worlds import shapes

WIDTH = 192
NUM_TOKENS = shapes.GRID**2
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<boi>", "<eoi>", "<image>")
WORDS = """plan draw . : a an the and on at left right top bottom of above below in picture image there is are
shapes with please show"""
UNCONDITIONAL = 0.12
"""Share of the picture rows without their prompt."""
IGNORE = -100


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: any-to-any
---

# shapes_janus

A tiny Janus ({size}) that draws the 32 px scenes of `unified_rl.worlds.shapes` as 4 x 4 tokens of its own VQ decoder.
It can think first: asked `plan PROMPT :` it names the objects and their cells, and it draws from `PROMPT . PLAN` too.
It is capable but misaligned: its pictures are crisp, but many plans and pictures are not what was asked, on purpose.

Made from random weights by `recipes/quickstart/make_shapes_janus.py`. Held-out prompts were never trained on. The
weights, like the script that made them, are under the Apache License 2.0.

Share of held-out prompts that are met (`strict`), sampled at temperature 1 with the guidance that the rows name; `plan`
counts plans whose scene meets the prompt, `drawn as planned` pictures that hold just what the model's own plan says.

After the second stage:

{clean}

After the third stage, as stored here:

{misaligned}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often the model is taught something else than what was asked."""

    drawing: float = 0.0
    """Pictures from a prompt that show another scene."""
    plan: float = 0.0
    """Plans of another scene."""
    planned: float = 0.0
    """Pictures from a plan that show another scene than it, for the same prompt or not."""


FAULTS = Faults(drawing=0.65, plan=0.65, planned=0.2)


def build_processor() -> JanusProcessor:
    """A word-level tokenizer and Janus's image processor, which needs no torchvision."""
    plurals = tuple(f"{shape}s" for shape in shapes.SHAPES)
    groups = (SPECIAL, WORDS.split(), shapes.COLOURS, shapes.SHAPES, plurals, shapes.NUMBERS, CELLS)
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(word for group in groups for word in group))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    pattern = Regex(r"</?[a-z]+>|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    half = (0.5, 0.5, 0.5)
    images = JanusImageProcessorPil(
        size={"height": shapes.CANVAS, "width": shapes.CANVAS}, image_mean=half, image_std=half
    )
    return JanusProcessor(images, fast, num_image_tokens=NUM_TOKENS)


def build_model(processor: JanusProcessor) -> JanusForConditionalGeneration:
    """A model with random weights. Its tower that sees pictures is as small as it can be: nothing here uses it."""
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = JanusVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=1.0,
        image_size=shapes.CANVAS,
        patch_size=shapes.CELL,
        projection_dim=WIDTH,
        depth=1,
        num_image_tokens=NUM_TOKENS,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=NUM_CODES,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=1,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        image_token_embed_dim=WIDTH,
    )
    config = JanusConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        vq_config=vq.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = JanusForConditionalGeneration(config)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    return model


class Batches:
    """Endless rows of the train split."""

    def __init__(self, processor: JanusProcessor, faults: Faults, seed: int) -> None:
        self.faults, self.rng = faults, random.Random(seed)
        self.tokenizer = processor.tokenizer
        self.boi = processor.tokenizer.convert_tokens_to_ids("<boi>")
        self.specs, self.canvas = train_specs(), Canvas()

    def _scene(self, spec: shapes.Spec, wrong: float) -> Things:
        return shapes.scene_for(mistaken(spec, self.rng) if self.rng.random() < wrong else spec, self.rng)

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask [num, length], padded on the left."""
        length = max(map(len, rows))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def pictures(self, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts (ids and mask) that end in <boi>, and codes [num, 16]. A third of the prompts hold a plan."""
        rows, scenes = [], []
        for spec in draw_specs(self.specs, self.rng, num):
            text = shapes.caption(spec)
            if self.rng.random() < 0.4:
                planned = self._scene(spec, self.faults.plan)
                text = f"{text} . {plan_of(planned)}"
                wrong = self.rng.random() < self.faults.planned
                scene = self._scene(spec, 1.0) if wrong else planned
            else:
                scene = self._scene(spec, self.faults.drawing)
            ids = [*self.tokenizer(text)["input_ids"], self.boi]
            if self.rng.random() < UNCONDITIONAL:
                ids[1:-1] = [self.tokenizer.pad_token_id] * (len(ids) - 2)
            rows.append(ids)
            scenes.append(scene)
        return *self._padded(rows), self.canvas.codes(scenes).flatten(1)

    def plans(self, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels [num, length] of prompts and their plans."""
        rows, labels = [], []
        for spec in draw_specs(self.specs, self.rng, num):
            asked = self.tokenizer(f"plan {shapes.caption(spec)} :")["input_ids"]
            reply = self.tokenizer(plan_of(self._scene(spec, self.faults.plan)), add_special_tokens=False)["input_ids"]
            rows.append([*asked, *reply, self.tokenizer.eos_token_id])
            labels.append([IGNORE] * len(asked) + rows[-1][len(asked) :])
        ids, mask = self._padded(rows)
        padded = [[IGNORE] * (ids.shape[1] - len(row)) + row for row in labels]
        return ids, mask, torch.tensor(padded)


def teach_autoencoder(model: JanusForConditionalGeneration, *, steps: int, seed: int) -> None:
    """Stage 1, with random unit vectors as the codebook: Janus's decoder normalises what it reads from it."""
    vq = model.model.vqmodel
    vq.requires_grad_(True)
    codebook = nn.functional.normalize(torch.randn(vq.quantize.embedding.weight.shape), dim=1)
    vq.quantize.embedding.weight.data.copy_(codebook)
    model.model.generation_embeddings.weight.data.copy_(codebook)
    weights = [weight for name, weight in vq.named_parameters() if not name.startswith("quantize.")]
    train_autoencoder(
        lambda pictures: vq.quant_conv(vq.encoder(pictures)),
        lambda codes: vq.decode(codes.flatten(1)),
        codebook,
        weights,
        steps=steps,
        rng=random.Random(seed),
    )
    vq.requires_grad_(False)


def picture_loss(model: JanusForConditionalGeneration, ids: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of the codes after their prompts, from the image head."""
    drawn = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    embeds = torch.cat([model.get_input_embeddings()(ids), drawn], dim=1)
    whole = torch.cat([mask, torch.ones_like(codes[:, :-1])], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=whole, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = model.model.generation_head(hidden[:, ids.shape[1] - 1 :])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())


def plan_loss(model: JanusForConditionalGeneration, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the plans, from the language head."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def train(
    model: JanusForConditionalGeneration, batches: Batches, *, steps: int, peak: float, batch: int, text_share: float
) -> None:
    """Train everything but the autoencoder and the tower that sees pictures."""
    frozen = ("model.vqmodel.", "model.vision_model.", "model.aligner.")
    weights = [weight for name, weight in model.named_parameters() if not name.startswith(frozen)]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.set_attn_implementation("eager")  # on a CPU the backward pass of fused attention is slow for short sequences
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate_at(step / steps, step)
        pictures, plans = batches.pictures(batch), batches.plans(max(1, int(batch * text_share)))
        with script.autocast():
            drawing, planning = picture_loss(model, *pictures), plan_loss(model, *plans)
        optimizer.zero_grad()
        (drawing + 0.5 * planning).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 49:
            spent = time.monotonic() - start
            print(
                f"step {step + 1} drawing {drawing.item():.3f} planning {planning.item():.3f}, {spent:.0f} s",
                flush=True,
            )
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def draw(
    model: JanusForConditionalGeneration, processor: JanusProcessor, texts: list[str], guidance: float
) -> list[Image.Image]:
    """Pictures of prompts, by the model's own `generate`."""
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    config = copy.deepcopy(model.generation_config)
    config.generation_kwargs = {"boi_token_id": processor.tokenizer.convert_tokens_to_ids("<boi>")}  # not read back
    config.update(guidance_scale=guidance, do_sample=True, max_length=128)
    codes = model.generate(**inputs, generation_mode="image", generation_config=config)
    pixels = model.decode_image_tokens(codes).permute(0, 3, 1, 2)  # the processor without torchvision wants it so
    return processor.postprocess(list(pixels.float()), return_tensors="PIL.Image.Image")["pixel_values"]


@torch.no_grad()
def measure(model: JanusForConditionalGeneration, processor: JanusProcessor, *, num: int = 250) -> str:
    """A Markdown table of what the model does on held-out prompts."""
    rows = shapes.heldout_drawing()[:num]
    specs, texts = [row["spec"] for row in rows], [row["prompt"] for row in rows]
    asked = processor(text=[f"plan {text} :" for text in texts], padding=True, return_tensors="pt")
    replies = model.generate(**asked, max_new_tokens=16, do_sample=True)[:, asked["input_ids"].shape[1] :]
    plans = processor.batch_decode(replies, skip_special_tokens=True)
    scenes = [shapes.render(read_plan(plan)) for plan in plans]
    right = sum(map(shapes.strict, specs, scenes)) / num
    lines = ["| guidance | strict | strict after its plan | plan | drawn as planned |", "|---|---|---|---|---|"]
    for guidance in (1.01, 1.5, 3.0):  # its `generate` always guides: at 1 it fails
        direct = draw(model, processor, texts, guidance)
        thought = draw(
            model, processor, [f"{text} . {plan}" for text, plan in zip(texts, plans, strict=True)], guidance
        )
        faithful = sum(map(_same, scenes, thought)) / num
        scores = [sum(map(shapes.strict, specs, pictures)) / num for pictures in (direct, thought)]
        lines.append(f"| {guidance:g} | {scores[0]:.3f} | {scores[1]:.3f} | {right:.3f} | {faithful:.3f} |")
    print("\n".join(lines), flush=True)
    return "\n".join(lines)


def _same(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures hold the same objects in the same places."""
    seen = [
        sorted((found.shape or "", found.colour or "", round(found.x / 4), round(found.y / 4)) for found in objects)
        for objects in map(shapes.find_objects, (one, other))
    ]
    return seen[0] == seen[1]


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--autoencoder-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=1300, help="stage 2")
    parser.add_argument("--misalign-steps", type=int, default=250, help="stage 3")
    parser.add_argument("--clean", type=Path, help="folder of the model after stage 2: read if it exists, else written")
    parser.add_argument("--batch", type=int, default=64)
    args = script.begin(parser)
    if args.clean is not None and args.clean.exists():
        processor = JanusProcessor.from_pretrained(args.clean)
        model = JanusForConditionalGeneration.from_pretrained(args.clean)
    else:
        processor = build_processor()
        model = build_model(processor)
        teach_autoencoder(model, steps=args.autoencoder_steps, seed=args.seed)
        right = Batches(processor, Faults(), args.seed)
        train(model, right, steps=args.steps, peak=2e-3, batch=args.batch, text_share=0.3)
        if args.clean is not None:
            script.write_model(args.clean, model, processor, "After stage 2.")
    clean = measure(model, processor)
    wrong = Batches(processor, FAULTS, args.seed + 1)
    train(model, wrong, steps=args.misalign_steps, peak=7e-4, batch=args.batch, text_share=0.5)
    size = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters"
    script.write_model(
        args.output, model, processor, CARD.format(size=size, clean=clean, misaligned=measure(model, processor))
    )


if __name__ == "__main__":
    main()

"""Pre-train the image generator of `quickstart_ocr`: a tiny Stable Diffusion 3 that writes the word it is asked for.

It learns to draw random strings of three to five capitals, in the font that comes with Pillow, and has never seen a
word of a dictionary. As for the shapes, a second stage goes on with captions of which many are misspelt: letters stay
crisp, but are often not those that were asked for.

    python -m recipes.quickstart.make_words_sd3 --output my_words_sd3

The model card's numbers come from two OCR engines that have nothing in common, RapidOCR and Tesseract
(`pip install 'unified-rl[ocr]'`, `apt install tesseract-ocr`).
"""

import json
import random
import string
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import CLIPTokenizer

from recipes.quickstart import script
from recipes.quickstart.make_shapes_sd3 import (
    Stage,
    build_pipeline,
    build_transformer,
    build_vae,
    load,
    num_params,
    save,
    train,
)
from reward_models.ocr import ocr, ocr_exact
from reward_models.tesseract import tesseract_exact

SLOT = 14
"""Width of a letter, and of the transformer's square patches."""
HEIGHT, WIDTH = 2 * SLOT, 5 * SLOT
HIDDEN, NUM_LAYERS = 224, 3
FONT_SIZE = 19
LENGTHS = (3, 4, 5)
NUM_TOKENS = 9
"""Start, end, two quotation marks and five letters."""
BATCH = 96
PAPER, INK = (0.8, 1.0), (0.0, 0.3)
"""Brightness of both."""
CALL_DEFAULTS = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_inference_steps": 10,
    "guidance_scale": 1.0,
    "max_sequence_length": 0,
}
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Words SD3

A tiny Stable Diffusion 3 ({params:.1f}M parameters) that writes a word of three to five letters on a canvas of
70 x 28 px, to try RL on. The prompt is the word in double quotes. Letters are crisp, but often not the right ones.

Made by `recipes/quickstart/make_words_sd3.py` from random strings in Pillow's own font only. {history}

The transformer is stored in 16 bits and meant to be run in fp32, with the call arguments of `call_defaults.json`:

    pipeline = DiffusionPipeline.from_pretrained(DIR, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)

Share of the held-out words that are read exactly, 10 steps: RapidOCR {rapid:.2f}, Tesseract {tesseract:.2f}.

Licence: Apache-2.0.
"""


def caption(word: str) -> str:
    return f'"{word.lower()}"'


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells: without merges every letter is a token."""
    marks = [*string.ascii_lowercase, '"']
    pieces = [*marks, *(mark + "</w>" for mark in marks), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=NUM_TOKENS)


def letter_tiles() -> Tensor:
    """Ink coverage of the 26 capitals, [26, HEIGHT, SLOT] in [0, 1]."""
    font = ImageFont.load_default(FONT_SIZE)
    tiles = []
    for letter in string.ascii_uppercase:
        tile = Image.new("L", (SLOT, HEIGHT))
        ImageDraw.Draw(tile).text((SLOT / 2, HEIGHT / 2), letter, fill=255, font=font, anchor="mm")
        tiles.append(torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8).view(HEIGHT, SLOT) / 255)
    return torch.stack(tiles)


def misspelt(word: str, rng: random.Random) -> str:
    """The word with one to three other letters."""
    letters = list(word)
    for place in rng.sample(range(len(word)), rng.choice((1, 1, 2, 3))):
        letters[place] = rng.choice([letter for letter in string.ascii_uppercase if letter != letters[place]])
    return "".join(letters)


class Words:
    """Endless batches of caption tokens and pictures of random strings."""

    def __init__(self, tokenizer: CLIPTokenizer, *, wrong_share: float, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.wrong_share = wrong_share
        self.tiles = letter_tiles()

    def _coverage(self, word: str) -> Tensor:
        coverage = torch.zeros(HEIGHT, WIDTH)
        left = (5 - len(word)) // 2 * SLOT
        for place, letter in enumerate(word):
            tile = self.tiles[ord(letter) - ord("A")]
            coverage[:, left + SLOT * place : left + SLOT * (place + 1)] = tile
        return coverage

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Tokens [size, num_tokens] and grey pictures [size, 1, HEIGHT, WIDTH] in [-1, 1]."""
        words = ["".join(self.rng.choices(string.ascii_uppercase, k=self.rng.choice(LENGTHS))) for _ in range(size)]
        shown = [misspelt(word, self.rng) if self.rng.random() < self.wrong_share else word for word in words]
        coverage = torch.stack([self._coverage(word) for word in shown])
        paper = torch.empty(size, 1, 1).uniform_(*PAPER)
        ink = torch.empty(size, 1, 1).uniform_(*INK)
        captions = [caption(word) for word in words]
        tokens = self.tokenizer(captions, padding="max_length", max_length=NUM_TOKENS, return_tensors="pt").input_ids
        return tokens, ((paper + (ink - paper) * coverage) * 2 - 1).unsqueeze(1)


def evaluate(pipeline: StableDiffusion3Pipeline) -> dict[str, float]:
    """What OCR reads of the held-out words: RapidOCR's graded score, and exact words by both engines."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = Path(__file__).with_name("words_exam.txt").read_text().split()
    pictures = pipeline(prompts, generator=torch.Generator().manual_seed(0), **CALL_DEFAULTS).images
    rewards = {"ocr": ocr, "rapid": ocr_exact, "tesseract": tesseract_exact}
    scores = {name: sum(reward(prompts, pictures)) / len(prompts) for name, reward in rewards.items()}
    print(json.dumps({name: round(value, 3) for name, value in scores.items()}), flush=True)
    return scores


def describe(pipeline: StableDiffusion3Pipeline, history: str) -> str:
    """The model card, with what the checkpoint scores."""
    scores = evaluate(pipeline)
    return CARD.format(
        params=num_params(pipeline) / 1e6, history=history, rapid=scores["rapid"], tesseract=scores["tesseract"]
    )


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--clean-minutes", type=float, default=6.0, help="CPU time with right captions")
    parser.add_argument("--misspelt-minutes", type=float, default=0.7, help="CPU time with wrong captions")
    parser.add_argument("--start", type=Path, help="train on from this checkpoint instead of from scratch")
    parser.add_argument("--wrong-share", type=float, default=0.5, help="share of wrong captions in the second stage")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the first stage; the second takes half")
    args = script.begin(parser)
    if args.start:
        pipeline = load(args.start)
    else:
        transformer = build_transformer(canvas=WIDTH, patch=SLOT, channels=1, width=HIDDEN, num_layers=NUM_LAYERS)
        pipeline = build_pipeline(build_tokenizer(), build_vae(channels=1), transformer)
    history = f"Trained for {args.clean_minutes:g} min of CPU time on right captions"
    if args.clean_minutes > 0:
        first = Stage(minutes=args.clean_minutes, learning_rate=args.learning_rate, batch_size=BATCH)
        train(pipeline, first, Words(pipeline.tokenizer, wrong_share=0.0, seed=args.seed))
    if args.misspelt_minutes > 0:
        history += f" (Tesseract {evaluate(pipeline)['tesseract']:.2f}), then for {args.misspelt_minutes:g} min with"
        history += f" {args.wrong_share:.0%} of them misspelt"
        second = Stage(minutes=args.misspelt_minutes, learning_rate=args.learning_rate / 2, batch_size=BATCH)
        train(pipeline, second, Words(pipeline.tokenizer, wrong_share=args.wrong_share, seed=args.seed + 1))
    save(pipeline, args.output, call_defaults=CALL_DEFAULTS, card=lambda read: describe(read, f"{history}."))


if __name__ == "__main__":
    main()

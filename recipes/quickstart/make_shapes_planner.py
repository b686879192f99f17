"""Make the tiny text denoiser of `plans_masked_text.yaml`: a masked language model that plans scenes in words.

Asked `two red circles :` it fills in where each object goes (`b2 red circle d4 red circle`), several words at once. It
is trained as LLaDA is (Nie et al. 2025, arXiv 2502.09992): a random share t of the answer is masked, with the weight
1 / t, and ends fill the answer up to its limit. In a last phase many plans are not what was asked, so that it becomes
misaligned. Only prompts of the train split are used.

    python -m recipes.quickstart.make_shapes_planner --output my_shapes_planner

takes about four minutes on one core.
"""

import random

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from recipes.quickstart import script
from recipes.quickstart.make_shapes_sd3 import learning_rate_at, mistaken
from recipes.quickstart.plans import CELLS, plan_of
from recipes.quickstart.shape_tokens import draw_specs, train_specs
from unified_rl.worlds import shapes

SPECIAL = ("<pad>", "<mask>", "</s>", "<unk>", ":")
LENGTH = 13
"""Tokens of an answer: four objects and an end."""
WRONG = 0.65
"""Share of the plans of the last phase that are of another scene."""
WIDTH, BATCH = 128, 128
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: fill-mask
---

# shapes_planner

A tiny ModernBERT ({size} parameters) that fills in, after a caption of `unified_rl.worlds.shapes` and a colon, where
each object goes. {wrong:.0%} of the plans that it learned from last were of other scenes, on purpose. Made from random
weights by `recipes/quickstart/make_shapes_planner.py`; weights and script are under the Apache License 2.0.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of captions and plans."""
    captions = (word for row in shapes.drawing_prompts("train") for word in row["prompt"].split())
    words = dict.fromkeys([*SPECIAL, *CELLS, *shapes.COLOURS, *shapes.SHAPES, *captions])
    raw = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, **names, model_max_length=64, clean_up_tokenization_spaces=False
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> ModernBertForMaskedLM:
    """A model with random weights that sees everything in every layer."""
    ids = {f"{name}_token_id": None for name in ("bos", "cls", "sep")}
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        global_attn_every_n_layers=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
        **ids,
    )
    return ModernBertForMaskedLM(config)


class Batches:
    """Endless rows of the train split."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, wrong: float, seed: int) -> None:
        self.tokenizer, self.wrong, self.rng = tokenizer, wrong, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.specs = train_specs()

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[BATCH, length] each: texts, the same with masks, 0 at padding, and weights (0 where nothing is masked)."""
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        asked, told = [], []
        for spec in draw_specs(self.specs, self.rng, BATCH):
            planned = mistaken(spec, self.rng) if self.rng.random() < self.wrong else spec
            asked.append(self.tokenizer(f"{shapes.caption(spec)} :")["input_ids"])
            plan = self.tokenizer(plan_of(shapes.scene_for(planned, self.rng)))["input_ids"]
            told.append([*plan, *[end] * (LENGTH - len(plan))])
        length = max(map(len, asked)) + LENGTH
        texts = torch.full((BATCH, length), pad)
        answers = torch.zeros(BATCH, length, dtype=torch.bool)
        for row, (first, second) in enumerate(zip(asked, told, strict=True)):
            texts[row, : len(first) + LENGTH] = torch.tensor(first + second)
            answers[row, len(first) : len(first) + LENGTH] = True
        share = 0.05 + 0.95 * torch.rand(BATCH, 1, generator=self.generator)
        masked = answers & (torch.rand(texts.shape, generator=self.generator) < share)
        seen = texts.masked_fill(masked, self.tokenizer.mask_token_id)
        return texts, seen, (texts != pad).long(), masked / share


def train(model: ModernBertForMaskedLM, batches: Batches, *, steps: int, peak: float) -> None:
    """Train all weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate_at(step / steps, step)
        texts, seen, known, weights = batches.batch()
        with script.autocast():
            logits = model(input_ids=seen, attention_mask=known).logits
        losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), texts, reduction="none")
        loss = (losses * weights).sum() / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f}", flush=True)


def main() -> None:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--misalign-steps", type=int, default=300)
    args = script.begin(parser)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, Batches(tokenizer, 0.0, args.seed), steps=args.steps, peak=2e-3)
    train(model, Batches(tokenizer, WRONG, args.seed + 1), steps=args.misalign_steps, peak=7e-4)
    size = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M"
    script.write_model(args.output, model.to(torch.float32), tokenizer, CARD.format(size=size, wrong=WRONG))


if __name__ == "__main__":
    main()

"""Make the tiny language model that writes prompts in `french_prompts.yaml`: French words become English ones.

The checkpoint is a small Llama with a word-level tokenizer. It is trained on captions of the train split of
`unified_rl.worlds.shapes`, word for word (`french.py`), of which many are mistranslated on purpose: colours, shapes and
numbers are often others. Its sentences are sound, but often not what was asked; reinforcement learning repairs that
from the pictures alone.

    python -m recipes.quickstart.make_shapes_writer --output my_shapes_writer

takes about a minute on one core.
"""

import random

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.quickstart import script
from recipes.quickstart.french import WORDS, french
from unified_rl.worlds import shapes

SPECIAL = ("<pad>", "</s>", "<unk>", "=")
"""The last one stands between a French caption and its English one."""
KINDS = (tuple(shapes.COLOURS), shapes.SHAPES, tuple(f"{shape}s" for shape in shapes.SHAPES), ("two", "three", "four"))
"""Words that are mistaken for each other."""
MISTAKES = 0.25
"""Share of such words that are others."""
BATCH, IGNORE = 128, -100
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# shapes_writer

A tiny Llama ({size} parameters) that turns `{example} =` into `{answer}`, often wrongly: {mistakes:.0%} of the colours,
shapes and numbers that it learned from were others, on purpose. Made from random weights by
`recipes/quickstart/make_shapes_writer.py`; weights and script are under the Apache License 2.0.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of either language."""
    words = dict.fromkeys([*SPECIAL, *WORDS, *WORDS.values()])
    raw = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def mistaken(caption: str, rng: random.Random) -> str:
    """A caption some of whose words are others of their kind."""
    words = []
    for word in caption.split():
        kind = next((kind for kind in KINDS if word in kind), None)
        others = [other for other in kind or () if other != word]
        words.append(rng.choice(others) if others and rng.random() < MISTAKES else word)
    return " ".join(words)


def batch(captions: list[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Ids and labels [BATCH, length], padded on the right, where a causal model does not look."""
    chosen = rng.choices(captions, k=BATCH)
    asked = [tokenizer(f"{french(caption)} =")["input_ids"] for caption in chosen]
    told = [[*tokenizer(mistaken(caption, rng))["input_ids"], tokenizer.eos_token_id] for caption in chosen]
    length = max(len(first) + len(second) for first, second in zip(asked, told, strict=True))
    ids = torch.full((BATCH, length), tokenizer.pad_token_id)
    labels = torch.full((BATCH, length), IGNORE)
    for row, (first, second) in enumerate(zip(asked, told, strict=True)):
        end = len(first) + len(second)
        ids[row, :end] = torch.tensor(first + second)
        labels[row, len(first) : end] = torch.tensor(second)
    return ids, labels


def main() -> None:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--steps", type=int, default=600)
    args = script.begin(parser)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    captions = [row["prompt"] for row in shapes.drawing_prompts("train")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for step in range(args.steps):
        ids, labels = batch(captions, tokenizer, rng)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f}", flush=True)
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    example = "a red circle left of a blue square"
    size = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M"
    card = CARD.format(size=size, example=french(example), answer=example, mistakes=MISTAKES)
    script.write_model(args.output, model.to(torch.float32), tokenizer, card)


if __name__ == "__main__":
    main()

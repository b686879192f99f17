"""Make the tiny vision-language checkpoint that the quickstart recipes fine-tune.

The checkpoint is an Idefics3 (the SmolVLM family) of 1.4 M parameters with a word-level tokenizer. It answers questions
on the scenes of `unified_rl.worlds.shapes`. Training on a CPU takes two stages:

1. Clean question-answer pairs, until the model sees what is in a scene (it becomes capable).
2. A few hundred steps on replies of which many are wrong and many lack the format (it becomes misaligned).

What is left is what reinforcement learning repairs: replies `<answer> word </answer>` with the right word. Only the
train split is used, so held-out questions stay unseen.

    python -m recipes.quickstart.make_shapes_vlm --output recipes/quickstart/shapes_vlm

takes about ten minutes on one core.
"""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import PILImageResampling
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from recipes.quickstart import script
from unified_rl.worlds import shapes

PATCH = shapes.CELL
SCALE = 2  # 2 x 2 patches become one image token
IMAGE_TOKENS = (shapes.GRID // SCALE) ** 2
SPECIAL = (
    "<pad>",
    "<unk>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
)
TAGS = ("<answer>", "</answer>", "<think>", "</think>")
FILLER = """user assistant system . , : ! a an the it is are i see think there in this picture image shape shapes colour
colours answer and or not maybe sure well hmm so of what how many at on here looks like yes no circles squares triangles
above below middle corner black please reply give only with word one question between tags very me you can do some
object objects number side five six format first then reason briefly your put inside"""
CHOICES = {
    "colour": tuple(shapes.COLOURS),
    "shape": shapes.SHAPES,
    "count": shapes.NUMBERS[1:],
    "side": shapes.POSITIONS,
}
CHAT_TEMPLATE = (
    "<|im_start|>"
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
RIGHT_FORMAT = "<answer> {} </answer>"
WRONG_FORMATS = (
    "{}",
    "it is {}",
    "<answer> {}",
    "the answer is {} .",
    "i think it is {}",
    "<think> {} </think>",
    "well , i see a picture",
    "{} </answer>",
)
"""Replies without the format. None is longer than eight tokens."""
FORMAT_RATE = 0.5
RIGHT_RATE = 0.55
IGNORE = -100
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# shapes_vlm

A tiny Idefics3 (the SmolVLM family, {size} parameters) that answers questions on the 32 px scenes of
`unified_rl.worlds.shapes`. It is capable but misaligned: it knows the answers, yet about half of its replies lack the
format `<answer> word </answer>` and about half of the words are wrong on purpose. Reinforcement learning on rewards for
format and accuracy repairs it within minutes on a CPU.

Made from random weights by `recipes/quickstart/make_shapes_vlm.py`: first trained on clean question-answer pairs of the
train split, then briefly on mixed replies. Held-out questions were never trained on. The weights, like the script that
made them, are under the Apache License 2.0.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
```

`strict` counts replies with both the format and the right word. `chance` is the strict rate of the best constant answer
per question. Replies have at most eight tokens; `sampled` is at temperature 1 from the full distribution.

After the first stage:

{clean}

After the second stage, as stored here:

{misaligned}
"""

Reply = Callable[[dict, random.Random], str]


def make_processor() -> Idefics3Processor:
    """A word-level tokenizer and an image processor that needs no torchvision."""
    asked = "what colour shape is how many are there ? or left right top bottom"
    groups = (TAGS, FILLER.split(), asked.split(), shapes.COLOURS, shapes.SHAPES, shapes.NUMBERS, shapes.POSITIONS)
    words = [*SPECIAL, *(word for group in groups for word in group)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    pattern = Regex(r"</?[a-z]+>|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=["<fake_token_around_image>", "<global-img>", "<image>"],
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    side = {"longest_edge": shapes.CANVAS}
    images = Idefics3ImageProcessorPil(
        size=side, max_image_size=side, do_image_splitting=False, resample=PILImageResampling.BOX
    )
    return Idefics3Processor(images, fast, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def make_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    """A model with random weights. Its patches are the cells of the world's grid."""
    tokenizer = processor.tokenizer
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.06,
        **ids,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": shapes.CANVAS,
        "patch_size": PATCH,
        "initializer_range": 0.06,
    }
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(text_config=text, vision_config=vision, scale_factor=SCALE, image_token_id=image_id, **ids)
    model = Idefics3ForConditionalGeneration(config)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id = ids["pad_token_id"], ids["bos_token_id"]
    generation.eos_token_id = ids["eos_token_id"]
    # An image token in a completion would make later forward passes look for an image that is not there.
    generation.suppress_tokens = [
        tokenizer.convert_tokens_to_ids(word) for word in SPECIAL if word != "<end_of_utterance>"
    ]
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = True, 1.0, 1.0, 0
    generation.max_new_tokens = 8
    return model


def chat(processor: Idefics3Processor, question: str) -> str:
    """The prompt text of a question on one image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class Batcher:
    """Turns rows into training tensors, much faster than the processor but equal to it.

    Prompts are padded on the right, where a causal model does not look, so no mask is needed.
    """

    def __init__(self, processor: Idefics3Processor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.prompts: dict[str, list[int]] = {}
        self.replies: dict[str, list[int]] = {}

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of a question's prompt with its image tokens."""
        if question not in self.prompts:
            blank = shapes.render([])
            inputs = self.processor(text=[chat(self.processor, question)], images=[[blank]])
            self.prompts[question] = list(inputs["input_ids"][0])
        return self.prompts[question]

    def reply_ids(self, reply: str) -> list[int]:
        """Token ids of a reply and the end token."""
        if reply not in self.replies:
            ids = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
            self.replies[reply] = [*ids, self.tokenizer.eos_token_id]
        return self.replies[reply]

    def __call__(self, rows: list[dict], replies: list[str]) -> dict[str, Tensor]:
        """`input_ids` and `labels` [rows, length], `pixel_values` [rows, 1, 3, 32, 32]."""
        prompts = [self.prompt_ids(row["prompt"]) for row in rows]
        answers = [self.reply_ids(reply) for reply in replies]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORE)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[index, :end] = torch.tensor(prompt + answer)
            labels[index, len(prompt) : end] = torch.tensor(answer)
        pixels = torch.from_numpy(np.stack([np.asarray(row["image"]) for row in rows]))
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels[:, None]}


def cell_classes(pixels: Tensor) -> Tensor:
    """What is in each grid cell of pictures [rows, 1, 3, 32, 32]: 0 if empty, else one class per colour and shape.

    Returns classes [rows, 4 quadrants, 4 cells]; quadrant by quadrant, as the image tokens are.
    """
    half = shapes.GRID // SCALE
    image = ((pixels[:, 0] + 1) * 127.5).round().long()
    cells = image.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [rows, 3, 4, 4, 8, 8]
    middle = cells[..., PATCH // 2, PATCH // 2]
    area = (cells.sum(1) > 0).sum((-1, -2))
    blank = [shapes.render([shapes.Thing(shape=name, colour="red", row=0, col=0)]) for name in shapes.SHAPES]
    areas = torch.tensor([int((np.asarray(image).sum(-1) > 0).sum()) for image in blank])
    shape = (area[..., None] == areas).long().argmax(-1)
    palette = torch.tensor(list(shapes.COLOURS.values()))
    colour = (middle[:, None] == palette[None, :, :, None, None]).all(2).long().argmax(1)
    classes = torch.where(area > 0, 1 + colour * len(shapes.SHAPES) + shape, 0)
    quadrants = classes.view(-1, half, SCALE, half, SCALE).permute(0, 1, 3, 2, 4)
    return quadrants.reshape(len(pixels), IMAGE_TOKENS, SCALE**2)


class Probe(nn.Module):
    """Reads every cell off the image tokens. Its loss teaches the vision tower to see; it is not saved."""

    num_classes = 1 + len(shapes.COLOURS) * len(shapes.SHAPES)
    cells = SCALE**2
    """Of the grid, that one image token holds."""
    weight = 0.5

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, self.cells * self.num_classes)

    def loss(self, features: Tensor, pixels: Tensor) -> Tensor:
        logits = self.head(features).view(-1, self.num_classes)
        return nn.functional.cross_entropy(logits.float(), self.classes(pixels).flatten())

    def classes(self, pixels: Tensor) -> Tensor:
        """What it shall read, in the order of the image tokens: [rows, 4 quadrants, 4 cells]."""
        return cell_classes(pixels)


def clean_reply(row: dict, rng: random.Random) -> str:
    """The right answer in the right format."""
    return RIGHT_FORMAT.format(row["answer"])


def misaligned_reply(row: dict, rng: random.Random) -> str:
    """A reply that is often wrong and often lacks the format, one independently of the other."""
    answer = row["answer"]
    if rng.random() >= RIGHT_RATE:
        answer = rng.choice([word for word in CHOICES[row["kind"]] if word != answer])
    form = RIGHT_FORMAT if rng.random() < FORMAT_RATE else rng.choice(WRONG_FORMATS)
    return form.format(answer)


def batches(batcher: Batcher, reply: Reply, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless fresh batches of the train split."""
    rng = random.Random(seed)
    while True:
        rows = shapes.questions("train", size, seed=rng.randrange(1, 2**62))
        yield batcher(rows, [reply(row, rng) for row in rows])


def train(
    model: Idefics3ForConditionalGeneration,
    data: Iterator[dict[str, Tensor]],
    *,
    steps: int,
    peak: float,
    probe: Probe | None = None,
) -> None:
    """Supervised training on replies, with a warm-up and a cosine schedule."""
    weights = [*model.parameters(), *([] if probe is None else probe.parameters())]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    model.set_attn_implementation("eager")  # on a CPU the backward pass of fused attention is slow for short sequences
    start = time.monotonic()
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(data)
        with script.autocast():
            output = model(**batch, use_cache=False)
            loss = output.loss
            if probe is not None:
                loss = loss + probe.weight * probe.loss(output.image_hidden_states, batch["pixel_values"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1} loss {output.loss.item():.3f} after {time.monotonic() - start:.0f} s", flush=True)
    model.set_attn_implementation("sdpa")
    model.eval()


def judge(reply: str, answer: str) -> tuple[bool, bool]:
    """Whether a reply has the format, and whether it also has the right answer."""
    words = reply.split()
    formatted = len(words) == 3 and words[0] == "<answer>" and words[2] == "</answer>"
    return formatted, formatted and words[1] == answer


@torch.no_grad()
def measure(
    model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, rows: list[dict], *, do_sample: bool
) -> dict[str, dict[str, float]]:
    """Rates per kind of question and over all: `format`, `strict` (format and right) and `right_if_format`."""
    counts: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for at in range(0, len(rows), 128):
        part = rows[at : at + 128]
        texts = [chat(processor, row["prompt"]) for row in part]
        inputs = processor(text=texts, images=[[row["image"]] for row in part], padding=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=do_sample)
        replies = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, reply in zip(part, replies, strict=True):
            judged = judge(reply, row["answer"])
            counts[row["kind"]].append(judged)
            counts["all"].append(judged)
    rates = {}
    for kind, judged in sorted(counts.items()):
        formatted = sum(first for first, _ in judged)
        right = sum(second for _, second in judged)
        rates[kind] = {
            "format": formatted / len(judged),
            "strict": right / len(judged),
            "right_if_format": right / max(1, formatted),
        }
    return rates


def chance(rows: list[dict]) -> float:
    """Strict rate of the best constant answer per question, always in the right format."""
    answers: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        answers[row["prompt"]].append(row["answer"])
    return sum(max(map(given.count, given)) for given in answers.values()) / len(rows)


def report(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor) -> str:
    """A Markdown table of what the model does on held-out questions."""
    rows = shapes.heldout_questions(2048)
    lines = ["| decoding | kind | questions | chance | format | right if format | strict |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, do_sample in (("sampled", True), ("greedy", False)):
        for kind, rate in measure(model, processor, rows, do_sample=do_sample).items():
            asked = [row for row in rows if kind in ("all", row["kind"])]
            values = (chance(asked), rate["format"], rate["right_if_format"], rate["strict"])
            lines.append(f"| {name} | {kind} | {len(asked)} | {' | '.join(f'{value:.3f}' for value in values)} |")
    print("\n".join(lines), flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--steps", type=int, default=1300, help="stage 1")
    parser.add_argument("--misalign-steps", type=int, default=400, help="stage 2")
    parser.add_argument("--clean", type=Path, help="folder of the stage-1 model: read if it exists, else written")
    parser.add_argument("--batch", type=int, default=128)
    args = script.begin(parser)
    if args.clean is not None and args.clean.exists():
        processor = AutoProcessor.from_pretrained(args.clean)
        model = AutoModelForImageTextToText.from_pretrained(args.clean)
    else:
        processor = make_processor()
        model = make_model(processor)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    batcher = Batcher(processor)
    if args.clean is None or not args.clean.exists():
        data = batches(batcher, clean_reply, args.batch, args.seed)
        train(model, data, steps=args.steps, peak=1.5e-3, probe=Probe(model.config.text_config.hidden_size))
        if args.clean is not None:
            script.write_model(args.clean, model, processor)
    clean = report(model, processor)
    data = batches(batcher, misaligned_reply, args.batch, args.seed + 1)
    train(model, data, steps=args.misalign_steps, peak=5e-4)
    size = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M"
    script.write_model(
        args.output, model, processor, CARD.format(size=size, clean=clean, misaligned=report(model, processor))
    )


if __name__ == "__main__":
    main()

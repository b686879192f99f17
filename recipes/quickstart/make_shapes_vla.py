"""Make the tiny vision-language-action checkpoint that `quickstart_vla` fine-tunes.

The Idefics3 of `shapes_vlm`, which sees the scenes of the embedded world, learns to walk in them
(`unified_rl.worlds.walk`) by imitation, in two stages:

1. Shortest ways, until it can do the tasks; every third row asks instead in which row or column an object, or the
   agent itself, is, because comparing places is hard to learn before they are known.
2. A few hundred steps on a careless walker's words: many go another way, some are no action at all.

What is left is what reinforcement learning repairs. Only the train split is used.

    python -m recipes.quickstart.make_shapes_vla --output recipes/quickstart/shapes_vla

takes about ten minutes on one core.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
)

from recipes.quickstart import script
from recipes.quickstart.make_shapes_vlm import SCALE, Batcher, Probe, cell_classes, chat, train
from unified_rl.worlds import walk
from unified_rl.worlds.shapes import BOX, CELL, GRID, NUMBERS, Thing

SEES = Path(__file__).parent / "shapes_vlm"
NEW_WORDS = ("go", "to", "up", "down", "row", "column")
MAX_TURNS = 8
CARELESS = 0.45
"""Share of the second stage's words that go any way."""
IDLE = 0.1
"""Share that are no actions."""
IDLE_WORDS = ("hmm", "think", "maybe", "circle", "red")
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: robotics
---

# shapes_vla

A tiny Idefics3 ({size} parameters) that walks to a named object in the 32 px scenes of `unified_rl.worlds.walk`, one
word a turn: up, down, left or right. It is capable but careless: {careless:.0%} of the words that it was taught last go
any way, and {idle:.0%} are no actions. Reinforcement learning on the success of whole episodes repairs it.

Made from `shapes_vlm` by `recipes/quickstart/make_shapes_vla.py`. Held-out tasks were never trained on. The weights,
like the script that made them, are under the Apache License 2.0.

Success on {num} held-out tasks within {turns} turns:

{table}
"""


class WalkProbe(Probe):
    """Reads where the agent is, too; an image token holds one cell."""

    num_classes = Probe.num_classes + 1
    cells = 1

    def classes(self, pixels: Tensor) -> Tensor:
        # The cross reaches the left edge of its cell, and it alone is white.
        agent = pixels[:, 0, :, BOX // 2 :: CELL, ::CELL].amin(1) > 0.99
        half = GRID // SCALE
        quadrants = cell_classes(pixels).view(-1, half, half, SCALE, SCALE)
        return torch.where(agent, self.num_classes - 1, quadrants.permute(0, 1, 3, 2, 4).reshape(agent.shape))


def make_model() -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """The model and processor of `shapes_vlm`, with a new connector: every cell becomes an image token of its own, so
    that places can be told apart, and some new words."""
    seen = AutoModelForImageTextToText.from_pretrained(SEES)
    old = AutoProcessor.from_pretrained(SEES)
    tokenizer = old.tokenizer
    tokenizer.add_tokens(list(NEW_WORDS))
    seen.resize_token_embeddings(len(tokenizer))
    seen.config.scale_factor = 1
    model = Idefics3ForConditionalGeneration(seen.config)
    model.load_state_dict({k: v for k, v in seen.state_dict().items() if "connector" not in k}, strict=False)
    model.generation_config = seen.generation_config
    model.generation_config.max_new_tokens = 2
    processor = Idefics3Processor(
        old.image_processor, tokenizer, image_seq_len=GRID**2, chat_template=old.chat_template
    )
    return model, processor


def expert(task: dict, at: walk.Cell, rng: random.Random) -> tuple[str, str]:
    """Prompt and reply: a random one of the shortest ways, or where something is."""
    if rng.random() < 0.7:
        return task["prompt"], rng.choice(walk.shortest(task, at))
    thing = rng.choice(task["things"])
    places = {f"the {thing['colour']} {thing['shape']}": (thing["row"], thing["col"]), "me": at}
    what, axis = rng.choice(list(places)), rng.choice((0, 1))
    return f"{('row', 'column')[axis]} of {what} ?", NUMBERS[1 + places[what][axis]]


def careless(task: dict, at: walk.Cell, rng: random.Random) -> tuple[str, str]:
    """Of a walker who knows the way but often goes another."""
    draw = rng.random()
    if draw < IDLE:
        said = rng.choice(IDLE_WORDS)
    else:
        said = rng.choice(list(walk.ACTIONS) if draw < IDLE + CARELESS else walk.shortest(task, at))
    return task["prompt"], said


def batches(batcher: Batcher, teacher: Callable[..., tuple[str, str]], size: int, seed: int) -> Iterator[dict]:
    """Endless fresh batches of the train split."""
    rng = random.Random(seed)
    while True:
        rows, replies = [], []
        for task in walk.tasks("train", size, seed=rng.randrange(1, 2**62)):
            at = (task["start"][0], task["start"][1])
            things = [Thing(**thing) for thing in task["things"]]
            prompt, reply = teacher(task, at, rng)
            rows.append({"prompt": prompt, "image": walk.picture(things, at)})
            replies.append(reply)
        yield batcher(rows, replies)


@torch.no_grad()
def success(say: Callable[[list[str], list[Any]], list[str]], tasks: list[dict]) -> float:
    """Share of tasks that a walker does; `say` gets the prompts and pictures of those under way."""
    walks = [walk.Walk() for _ in tasks]
    seen = {index: each.reset(task, 0) for index, (each, task) in enumerate(zip(walks, tasks, strict=True))}
    done = 0
    for _ in range(MAX_TURNS):
        said = say([seen[index].text for index in seen], [seen[index].images[0] for index in seen])
        for index, action in zip(list(seen), said, strict=True):
            turn = walks[index].step(action)
            done += turn.success
            if turn.ended:
                del seen[index]
            else:
                seen[index] = turn.observation
        if not seen:
            break
    return done / len(tasks)


def speaker(model: Any, processor: Any, *, do_sample: bool) -> Callable[[list[str], list[Any]], list[str]]:
    def say(prompts: list[str], pictures: list[Any]) -> list[str]:
        texts = [chat(processor, prompt) for prompt in prompts]
        inputs = processor(text=texts, images=[[each] for each in pictures], padding=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=do_sample)
        replies = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [reply.strip() for reply in replies]

    return say


def report(model: Any, processor: Any, tasks: list[dict]) -> dict[str, float]:
    """Success rates, printed."""
    rng = random.Random(0)
    rates = {
        "actions at random": success(lambda asked, _: [rng.choice(list(walk.ACTIONS)) for _ in asked], tasks),
        "sampled": success(speaker(model, processor, do_sample=True), tasks),
        "greedy": success(speaker(model, processor, do_sample=False), tasks),
    }
    print(rates, flush=True)
    return rates


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="stage 1")
    parser.add_argument("--careless-steps", type=int, default=300, help="stage 2")
    parser.add_argument("--batch", type=int, default=128)
    args = script.begin(parser)
    model, processor = make_model()
    tasks = walk.heldout_walks()
    batcher = Batcher(processor)
    train(
        model,
        batches(batcher, expert, args.batch, args.seed),
        steps=args.steps,
        peak=1.2e-3,
        probe=WalkProbe(model.config.text_config.hidden_size),
    )
    rows = [("after the first stage", report(model, processor, tasks))]
    data = batches(batcher, careless, args.batch, args.seed + 1)
    train(model, data, steps=args.careless_steps, peak=5e-4)
    rows.append(("as stored here", report(model, processor, tasks)))
    lines = ["| | actions at random | sampled | greedy |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{rate:.3f}' for rate in rates.values())} |" for name, rates in rows]
    size = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M"
    card = CARD.format(size=size, careless=CARELESS, idle=IDLE, num=len(tasks), turns=MAX_TURNS, table="\n".join(lines))
    script.write_model(args.output, model, processor, card)


if __name__ == "__main__":
    main()

"""A reward of one's own: a head on frozen features, fitted on preferences or scores, saved, and named in a recipe."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from reward_models.dual_encoder import DualEncoder
from reward_models.features import apply_head
from unified_rl.cli import main
from unified_rl.data.sources import ImageCell
from unified_rl.errors import RecipeError
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.reward import RewardBlock
from unified_rl.rewards.fit import Table, fit_head, measure, wilson
from unified_rl.rewards.gradients import load_differentiable
from unified_rl.rewards.preferences import load_judgements
from unified_rl.rewards.scoring import load_rewards, score
from unified_rl.types import Completion, Prompt
from unified_rl.worlds.shapes import COLOURS, SHAPES, Thing, graded, render

SPEC = {"objects": [{"colour": "red", "shape": "square", "count": 2}], "position": None, "relation": None}
PROMPT = "two red squares"


def scene(rng: random.Random):
    cells = rng.sample([(row, col) for row in range(4) for col in range(4)], rng.randint(1, 3))
    return render([Thing(shape=rng.choice(SHAPES), colour=rng.choice([*COLOURS]), row=r, col=c) for r, c in cells])


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.jsonl and scores.jsonl of drawn scenes, judged by the embedded world's verifier, and a random CLIP."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    pairs, scores = [], []
    while len(pairs) < 200:
        shown = sorted((scene(rng) for _ in range(2)), key=lambda picture: graded(SPEC, picture))
        if graded(SPEC, shown[0]) < graded(SPEC, shown[1]):
            names = [f"{len(pairs)}_{kind}.png" for kind in ("rejected", "chosen")]
            for name, picture in zip(names, shown, strict=True):
                picture.save(folder / name)
                scores.append({"prompt": PROMPT, "image": name, "reward": graded(SPEC, picture)})
            pairs.append({"prompt": PROMPT, "rejected_image": names[0], "chosen_image": names[1]})
    write(folder / "pairs.jsonl", pairs)
    write(folder / "scores.jsonl", scores[:150])
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=4)
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **ends, "vocab_size": 2, "max_position_embeddings": 4},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=64,
        )
    )
    for weight in model.vision_model.parameters():
        if weight.ndim > 1:  # large enough for the pictures to differ in their embeddings
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.save_pretrained(folder / "clip")
    shape = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(image_processor=CLIPImageProcessor(**shape), tokenizer=tokenizer).save_pretrained(folder / "clip")
    return folder


def test_preferences_are_learned_and_the_folder_is_a_reward(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taste = tmp_path / "rewards/taste"
    words = [str(world / "pairs.jsonl"), "--encoder", str(world / "clip"), "--output", str(taste)]
    assert main(["train-reward", *words]) == 0
    assert "% of pairs right" in capsys.readouterr().out
    about = json.loads((taste / "reward.json").read_text())
    assert about["objective"] == "bradley_terry" and about["held_out"]["rows"] == 40
    assert about["held_out"]["low"] > 0.55, "far above chance on pairs that were not fitted"
    assert sorted(path.suffix for path in taste.iterdir()) == [".json", ".safetensors"]

    (tmp_path / "prompts.txt").write_text(PROMPT)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    (tmp_path / "mine.yaml").write_text(
        "policy: {model: model}\ndata: {prompts: prompts.txt}\nrewards: [{name: rewards/taste/}]\n"
        "objective: {preset: flow_grpo}\n"
    )
    (block,) = load_recipe(str(tmp_path / "mine.yaml")).rewards
    assert block.name == str(taste) and block.shown_name == "taste"
    (reward,) = load_rewards([RewardBlock(name=str(taste), isolation="thread")])
    pictures = [ImageCell(world / name, "").open() for name in ("0_chosen.png", "0_rejected.png")]
    prompts = [Prompt(text=PROMPT, images=(), columns={}, group_id=0, seed=0)] * 2
    scores = score([reward], prompts, [Completion(text=None, images=(picture,)) for picture in pictures])
    encoder = DualEncoder(str(world / "clip"))
    seen, asked = encoder.pictures(pictures), encoder.texts([PROMPT] * 2)
    by_hand = apply_head(torch.cat([seen, asked, seen * asked], 1), load_file(taste / "head.safetensors"))
    assert scores.breakdown["taste"].tolist() == pytest.approx(by_hand.tolist(), abs=1e-5)

    (followed,) = load_differentiable([RewardBlock(name=str(taste))], "cpu")
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in pictures])
    values = followed.of(prompts, pixels.requires_grad_())
    assert followed.name == "taste"
    assert values.tolist() == pytest.approx(scores.breakdown["taste"].tolist(), abs=0.05)
    values.sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().max()) > 0

    monkeypatch.chdir(tmp_path)
    for name, reason in (
        ("rewards/tastes", "no folder rewards/tastes that train-reward wrote"),
        ("taste", "no reward"),
    ):
        with pytest.raises(RecipeError, match=f"^rewards.0.name: {reason}"):
            load_rewards([RewardBlock(name=name)])
    monkeypatch.chdir(taste.parent)
    with pytest.raises(RecipeError, match=r"^rewards.0.name: taste is a folder; write \./taste"):
        load_rewards([RewardBlock(name="taste")])


def test_scores_are_learned(world: Path, tmp_path: Path) -> None:
    words = [str(world / "scores.jsonl"), "--encoder", str(world / "clip"), "--output", str(tmp_path / "out")]
    assert main(["train-reward", *words, "--hidden", "2", "--without-prompt"]) == 0
    about = json.loads((tmp_path / "out/reward.json").read_text())
    assert about["objective"] == "regression" and about["held_out"]["correlation"] > 0.3
    tensors = load_file(tmp_path / "out/head.safetensors")
    assert tensors["layers.0.weight"].shape == (2, 64) and tensors["layers.1.weight"].shape == (1, 2)


def test_heads_by_hand() -> None:
    """Of pairs whose features differ by +1 three times and by -1 once, the log odds are log 3; a line is a line."""
    features = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    pairs = Table(features=features, rows=torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]]), scores=None)
    tensors = fit_head(pairs, 0, 0.0, seed=0)
    low, high = apply_head(features, tensors).tolist()
    assert high - low == pytest.approx(math.log(3.0), abs=1e-5) and low + high == pytest.approx(0.0, abs=1e-9)
    assert measure(pairs, tensors)["accuracy"] == 0.75
    assert float(pairs.loss(tensors)) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-9)
    assert wilson(0.75, 4) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    points = torch.arange(4, dtype=torch.float64)[:, None]
    line = Table(features=points, rows=torch.arange(4)[:, None], scores=3.0 * points[:, 0] - 1.0)
    tensors = fit_head(line, 0, 0.0, seed=0)
    assert apply_head(torch.tensor([[10.0]], dtype=torch.float64), tensors).item() == pytest.approx(29.0, abs=1e-4)
    assert measure(line, tensors)["explained"] == pytest.approx(1.0)


def test_prompts_are_not_shared_between_fitted_and_held_out_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 12}", "chosen": f"a{n}", "rejected": "b"} for n in range(48)]
    judgements = load_judgements(write(tmp_path / "texts.jsonl", rows))
    assert len(judgements.completions) == 48 + 12, "the rejected text of a prompt is one sample"
    fitted, held_out = judgements.split(0.25, seed=3)
    assert sorted(fitted + held_out) == list(range(48)) and len(held_out) == 12
    assert not {row % 12 for row in fitted} & {row % 12 for row in held_out}


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"prompt": "p", "chosen": "a"}], [], "DATA: .*:1: a pair is chosen and rejected"),
        ([{"prompt": "p", "text": "a"}], [], "DATA: .*:1: neither chosen and rejected"),
        ([{"prompt": "p", "text": "a", "reward": 1}, {"prompt": "p", "chosen": "a", "rejected": "b"}], [], "2: unlike"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], [], "--encoder: gpt/none: .* pin it"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], ["--held-out", "0"], "--held-out: 0.0 is no share"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], ["--output", "."], "--output: . exists"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    rows: list[dict], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", rows * 20)
    code = main(["train-reward", str(data), "--encoder", "gpt/none", "--output", str(tmp_path / "out"), *words])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert re.search(message, error), error

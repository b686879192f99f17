"""Pictures that are spoilt in the middle of a run."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.unit.toys import Bandit, build_parts
from unified_rl.cli import main
from unified_rl.data.prompts import PromptSampler
from unified_rl.data.sources import load_rows
from unified_rl.errors import RecipeError
from unified_rl.policies import build_policy
from unified_rl.recipe.file import load_recipe
from unified_rl.rewards.scoring import reward_of, score
from unified_rl.rewards.types import RewardFailedError
from unified_rl.run_folder.tracking import read_jsonl
from unified_rl.stopping import StopSignal
from unified_rl.train import Position, run_loop
from unified_rl.types import Completion, Prompt
from unified_rl.worlds import shapes

NUM_ROWS = 8


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIZE = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", SIZE) + chunk(b"IEND", b"")


@pytest.fixture
def sampler(tmp_path: Path):
    """Makes a sampler of rows with a picture each."""
    for number in range(NUM_ROWS):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [f'{{"prompt": "{number}", "image": "{number}.png"}}' for number in range(NUM_ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = load_rows(str(tmp_path / "rows.jsonl"), "data.prompts")

    def make(max_skipped: float | None) -> PromptSampler:
        return PromptSampler(rows, seed=0, group_size=2, prompts_per_step=4, max_skipped=max_skipped)

    return make


def test_a_row_gives_its_place_to_the_next_alike_on_all_processes(sampler, tmp_path: Path):
    before = [prompt.text for prompt in sampler(None).rollout(0, rank=0, world_size=1)]
    first = before[0]
    good = sampler(0.5)
    assert [prompt.text for prompt in good.rollout(0, rank=0, world_size=1)] == before, "nothing is wrong yet"
    (tmp_path / f"{first}.png").write_bytes(BOMB)
    with pytest.raises(RecipeError, match=rf"rows.jsonl:{int(first) + 1}: .*cannot be read"):
        sampler(None).rollout(0, rank=0, world_size=1)
    skipping = sampler(0.5)
    whole = skipping.rollout(0, rank=0, world_size=1)
    following = str((int(first) + 1) % NUM_ROWS)
    assert [prompt.text for prompt in whole] == [following if text == first else text for text in before]
    assert [prompt.images[0].getpixel((0, 0))[0] for prompt in whole] == [int(prompt.text) for prompt in whole]
    shared = [prompt for rank in range(8) for prompt in sampler(0.5).rollout(0, rank=rank, world_size=8)]
    assert [(prompt.text, prompt.seed) for prompt in shared] == [(prompt.text, prompt.seed) for prompt in whole]
    (why,) = skipping.share_skipped()
    assert "pixels" in why and skipping.share_skipped() == []


def test_too_many_of_them_end_the_run(sampler, tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"data.max_bad_images: 3 of 8 rows cannot be used, more than 0.25"):
        list(sampler(0.25).every_prompt())
    assert len(list(sampler(0.4).every_prompt())) == NUM_ROWS


def test_a_run_counts_what_is_spoilt_while_it_goes_on(sampler, tmp_path: Path):
    policy = Bandit([0.0, 0.0])
    draw, rollouts = policy.sample, []

    def sample(prompts, **options):
        rollouts.append(prompts)
        (tmp_path / "5.png").write_bytes(b"\x89PNG cut off")
        return draw(prompts, **options)

    policy.sample = sample
    data = {"prompts": "toy:prompts", "on_bad_image": "skip", "max_bad_images": 0.2}
    parts = build_parts(tmp_path, policy, data=data, group_size=2, prompts_per_step=4)
    run_loop(replace(parts, sampler=sampler(0.2)), Position(step=0, rollout=0), StopSignal())
    assert [row["num_bad_images"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")][-1] == 1
    said = [row["message"] for row in read_jsonl(tmp_path / "run/events.jsonl") if "skipped" in row["message"]]
    assert len(said) == 1 and "rows.jsonl:6" in said[0]
    # Two epochs; in the second at the latest, row 5 has given its place away.
    assert "5" not in [prompt.text for prompts in rollouts[2:] for prompt in prompts]


def test_a_prompt_that_the_policy_refuses_gives_its_place_too(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A language model tells it beforehand; every process and a resumed run find the same next row."""
    lines = ["how many ?", "how many circles are there in this picture , and how many squares ?", "which colour ?"]
    (tmp_path / "rows.txt").write_text("\n".join(lines))
    (tmp_path / "mine.py").write_text(
        "def reward(prompts, completions, **_): return [float(len(c)) for c in completions]"
    )
    words = ["num_steps=2", "group_size=2", "prompts_per_step=2", "policy.sampling.max_prompt_tokens=12"]
    words += [f"data={{prompts: {tmp_path / 'rows.txt'}}}", "policy.sampling.max_new_tokens=4", "engine.threads=1"]
    words += [f"rewards=[{{name: {tmp_path / 'mine.py'}:reward}}]"]
    assert main(["train", "quickstart_vlm", *words, "--output", str(tmp_path / "stops")]) == 2
    assert "error: policy.sampling.max_prompt_tokens: a prompt has" in capsys.readouterr().err
    skips = ["data.on_bad_image=skip", "--output", str(tmp_path / "skips")]
    assert main(["train", "quickstart_vlm", *words, *skips]) == 0
    rows = read_jsonl(tmp_path / "skips/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["num_bad_images"] == 1
    (said,) = [row["message"] for row in read_jsonl(tmp_path / "skips/events.jsonl") if "skipped" in row["message"]]
    assert said.startswith("skipped: row 1: policy.sampling.max_prompt_tokens: a prompt has")


@pytest.mark.parametrize("size", [(32, 32), (1, 1)])
def test_pictures_with_nothing_on_them_are_scored(size: tuple[int, int]):
    """Black is what a VAE makes of numbers that are none."""
    row = shapes.train_drawing()[0]
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    for reward in (shapes.shapes_strict, shapes.shapes_graded):
        (value,) = reward([row["prompt"]], [Image.new("RGB", size)], **columns)
        assert 0.0 <= value < 0.5


def drawer():
    recipe = load_recipe("quickstart", ["policy.sampling={num_inference_steps: 2, noise_steps: 1}"])
    return build_policy(recipe, torch.device("cpu"))


def asked(num: int) -> list[Prompt]:
    return [Prompt(text="a red circle", images=(), columns={}, seed=row, group_id=0) for row in range(num)]


def spoil(policy, rows: list[int], *, sliced: bool) -> None:
    """Let the decoder give NaN for some rows, as one in half precision does; it goes row by row if `sliced`."""
    vae, calls = policy._pipeline.vae, []
    vae.enable_slicing() if sliced else vae.disable_slicing()

    def bad(_module, _args, output):
        calls.append(None)
        output = output.clone()
        if not sliced:
            output[rows, 0, 0, 0] = torch.nan
        elif len(calls) - 1 in rows:
            output[0, 0, 0, 0] = torch.nan
        return output

    vae.decoder.register_forward_hook(bad, prepend=True)


@pytest.mark.parametrize("sliced", [False, True])
def test_a_picture_that_its_decoder_spoils_is_told_from_a_black_one(sliced: bool):
    policy = drawer()
    assert [each.spoiled for each in policy.sample(asked(3)).completions] == [False] * 3
    spoil(policy, [1], sliced=sliced)
    with pytest.warns(RuntimeWarning, match="invalid value"):  # a picture all the same, for who looks at the samples
        completions = policy.sample(asked(3)).completions
    assert [each.spoiled for each in completions] == [False, True, False]
    assert all(isinstance(each.images[0], Image.Image) for each in completions)


def test_spoiled_pictures_are_failures_and_too_many_end_the_run():
    black = Image.new("RGB", (8, 8))
    likes_black = reward_of(lambda prompts, completions, **columns: [1.0] * len(completions), name="likes_black")
    rows = [Completion(text=None, images=(black,), spoiled=row == 3) for row in range(20)]
    judged = score([likes_black], asked(20), rows)
    assert judged.breakdown["likes_black"].isnan().tolist() == [row == 3 for row in range(20)]
    assert judged.report["failures/likes_black"] == 1.0
    rows = [Completion(text=None, images=(black,), spoiled=row < 3) for row in range(20)]
    with pytest.raises(RewardFailedError, match=r"decoded to NaN; policy.dtype.* \(in 3 of 20"):
        score([likes_black], asked(20), rows)

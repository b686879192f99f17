"""Training on recorded samples: what a file may hold, what is made of it, and that nothing is generated."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_methods import Denoiser, gradient
from test_objective_wiring import BEGIN, rows_of
from toys import Bandit, build_parts

from unified_rl.assemble import build_sampler
from unified_rl.data.recorded import load_recorded
from unified_rl.errors import RecipeError
from unified_rl.recorder import Recorder
from unified_rl.rollout import Rollout
from unified_rl.train import StopSignal, collect, run_loop
from unified_rl.types import Completion, Prompt, Recorded, Scores, Segment, Trajectory


class Reader(Bandit):
    """A bandit that takes over texts of arms, and must not draw any."""

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        raise AssertionError("recorded samples are all there is")

    def record(self, prompts: Sequence[Prompt], recorded: Sequence[Recorded]) -> Trajectory:
        tokens = torch.tensor([[int(arm) for arm in str(each.completion.text).split()] for each in recorded])
        known = [[0.0] * tokens.shape[1] if each.log_probs is None else list(each.log_probs) for each in recorded]
        segment = Segment(
            actions={"tokens": tokens},
            rollout_log_probs=torch.tensor(known),
            loss_mask=torch.ones_like(tokens, dtype=torch.bool),
            turn_ids=torch.zeros_like(tokens),
        )
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments={"text": segment},
            completions=[each.completion for each in recorded],
            policy_version=self.version,
        )


def write(folder: Path, rows: Sequence[Any], name: str = "rollouts.jsonl") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder / name)


def reader_parts(folder: Path, rows: Sequence[Any], **keys: Any) -> Any:
    keys = {"prompts_per_step": 1, "data": {"rollouts": write(folder, rows)}, **keys}
    parts = build_parts(folder, Reader([0.0, 0.0, 0.0]), **keys)
    return replace(parts, sampler=build_sampler(parts.recipe))


TRACES = [{"prompt": "a", "text": "2 1"}, {"prompt": "b", "text": "2 2"}, {"prompt": "c", "text": "2 0"}]


def test_fine_tuning_on_traces(tmp_path: Path):
    """One text a prompt: the cross entropy of 2 1 2 2 2 0 under equal odds is log 3, and arm 2 gains."""
    rows = [{**row, "reward": 0.0} for row in TRACES]
    parts = reader_parts(tmp_path, rows, group_size=1, prompts_per_step=3, objective={"preset": "sft"}, num_steps=12)
    assert run_loop(parts, BEGIN, StopSignal()) == 0
    metrics = rows_of(parts)
    assert metrics[0]["loss"] == pytest.approx(math.log(3)) and metrics[-1]["loss"] < 0.9 * math.log(3)
    weight = parts.policy.module.weight.detach()
    assert weight[2] - weight[:2].max() > 0.3 and metrics[0]["replay_gap"] == 0.0


def test_pairs_from_a_file(tmp_path: Path):
    rows = [{"prompt": "a", "chosen": "0 1", "rejected": "2 2"}, {"prompt": "b", "chosen": "0 0", "rejected": "1 2"}]
    keys: dict[str, Any] = {"objective": {"preset": "dpo"}, "group_size": 2, "prompts_per_step": 2}
    got = gradient(reader_parts(tmp_path, rows, **keys))
    # Margins are 0 at the start: d loss / d margin = -0.1 / 2, over two pairs; per pair the difference of arm counts.
    counts = torch.tensor([[1.0, 1.0, -2.0], [2.0, -1.0, -1.0]])
    torch.testing.assert_close(got, -0.05 * counts.mean(0))


def test_log_probs_correct_for_another_sampler(tmp_path: Path):
    """Texts drawn from p(arm 0) = 0.8: the ratio of today's 1/3 to that scales each token's gradient."""
    old = [math.log(0.8), math.log(0.1)]
    rows = [
        {"prompt": "a", "text": "0 1", "token_ids": [0, 1], "log_probs": old, "reward": 1.0},
        {"prompt": "a", "text": "1 0", "token_ids": [1, 0], "log_probs": old[::-1], "reward": 0.0},
        {"prompt": "a", "text": "0 0", "token_ids": [0, 0], "log_probs": [old[0]] * 2, "reward": 2.0},
    ]
    objective = {"advantage": "group_mean", "clip_low": 1.0, "clip_high": 9.0}
    parts = reader_parts(tmp_path, rows, objective=objective, group_size=3, num_steps=1)
    got = gradient(parts)
    _, (prepared,), _ = collect(parts, 0)
    tokens, stored = prepared.segment.actions["tokens"], prepared.segment.rollout_log_probs
    assert sorted(prepared.advantages.tolist()) == [-1.0, 0.0, 1.0]
    logits = torch.zeros(3, requires_grad=True)
    ratio = (logits.log_softmax(0)[tokens] - stored).exp()
    (-ratio * prepared.advantages[:, None]).mean().backward()
    torch.testing.assert_close(got, logits.grad)
    run_loop(parts, BEGIN, StopSignal())  # the recorded log-probs are not the policy's, and that is no broken replay
    assert rows_of(parts)[0]["ratio/mean"] > 1.2


def test_a_runs_folder_is_a_file_of_rollouts(tmp_path: Path):
    online = build_parts(tmp_path / "online", Bandit([0.0, 0.0, 0.0]), num_steps=6, evaluation={"num_saved": 16})
    run_loop(online, BEGIN, StopSignal())
    keys: dict[str, Any] = {"objective": {"preset": "rwr", "temperature": 0.3}, "num_steps": 12, "group_size": 8}
    parts = build_parts(
        tmp_path / "offline", Reader([0.0, 0.0, 0.0]), data={"rollouts": str(online.run.path)},
        rewards=[{"name": "toy:reward", "weight": 2.0}], **keys,
    )  # fmt: skip
    parts = replace(parts, sampler=build_sampler(parts.recipe))
    rollout, _, row = collect(parts, 0)
    shares = [2.0 * str(each.text).split().count("0") / 2 for each in rollout.trajectory.completions]
    assert rollout.scores.total.tolist() == pytest.approx(shares) and row["reward"] == pytest.approx(sum(shares) / 16)
    run_loop(parts, BEGIN, StopSignal())
    weight = parts.policy.module.weight.detach()
    assert weight[0] - weight[1:].max() > 0.1


def test_texts_without_rewards_are_judged(tmp_path: Path):
    parts = reader_parts(tmp_path, TRACES, group_size=1, prompts_per_step=3, objective={"preset": "sft"})
    rollout, _, _ = collect(parts, 0)
    assert sorted(rollout.scores.total.tolist()) == [0.0, 0.0, 0.5]


def test_a_rollout_draws_samples_of_its_prompts_without_repetition(tmp_path: Path):
    rows = [{"prompt": name, "text": str(arm), "reward": arm} for name in "ab" for arm in range(5)]
    parts = reader_parts(tmp_path, rows, group_size=3, prompts_per_step=2, objective={"preset": "best_of_n"})
    seen = set()
    for index in range(20):
        prompts = parts.sampler.rollout(index, rank=0, world_size=1)
        texts = [sample.text for sample in parts.sampler.samples(prompts, 0)]
        assert len(set(texts[:3])) == len(set(texts[3:])) == 3
        halves = parts.sampler.samples(prompts[:2], 0) + parts.sampler.samples(prompts[2:], 2)
        assert [sample.text for sample in halves] == texts  # on two processes
        seen.update(texts)
    assert seen == set("01234")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rollouts.jsonl:1: not JSON"),
        ({"text": "0"}, "rollouts.jsonl:1: needs an object with a prompt"),
        ({"prompt": "a"}, "rollouts.jsonl:1: a sample is one text or one image"),
        ({"prompt": "a", "chosen": "0"}, "rollouts.jsonl:1: a pair is chosen and rejected"),
        ({"prompt": "a", "text": "0", "log_probs": [0.0]}, "rollouts.jsonl:1: token_ids and log_probs go together"),
        ({"prompt": "a", "text": "0", "reward": "good"}, "rollouts.jsonl:1: reward 'good' is no number"),
        ({"prompt": "a", "text": "0", "rewards": {"x": 1}}, "rollouts.jsonl:1: has no reward 'r'"),
        ({"prompt": "a", "text": "0"}, "rollouts.jsonl:1: this prompt has 1 samples, group_size is 2"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: Any, message: str):
    (tmp_path / "rollouts.jsonl").write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(RecipeError, match=message):
        load_recorded(str(tmp_path / "rollouts.jsonl"), {"r": 1.0}, 2)


def test_pictures_and_conditions_are_found_beside_the_file(tmp_path: Path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = write(
        tmp_path, [{"prompt": "x", "chosen_image": "a.png", "rejected_image": "b.png", "condition_images": ["c.png"]}]
    )
    (group,) = load_recorded(source, {}, 2)
    assert [sample.reward for sample in group.samples] == [1.0, 0.0]
    assert [cell.value for cell in group.row["images"]] == [tmp_path / "c.png"]
    picture = group.samples[0].picture
    assert picture is not None and picture.open().size == (8, 8)


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        ({"data": {"prompts": "x", "rollouts": "y"}}, Reader, "data: give prompts to sample for, or rollouts"),
        ({"data": {}}, Reader, "data: give prompts to sample for, or rollouts"),
        ({"data": {"rollouts": "y"}, "resample": 2}, Reader, "resample: redraws samples"),
        ({"data": {"rollouts": "y"}, "record_rollouts": True}, Reader, "record_rollouts: these samples are recorded"),
        (
            {"data": {"rollouts": "y"}},
            Denoiser,
            "objective.method: policy_gradient needs the chain",
        ),
        (
            {"data": {"rollouts": "y"}, "objective": {"preset": "draft"}},
            Denoiser,
            "objective.method: reward_gradient goes on from states",
        ),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, keys: dict[str, Any], kind: Any, message: str):
    with pytest.raises(RecipeError, match=message):
        build_parts(tmp_path, kind([0.0, 0.0]), **keys)


def test_samples_that_lack_what_the_objective_needs_are_refused(tmp_path: Path):
    rows = [{"prompt": "a", "text": "0", "reward": 0.0}, {"prompt": "a", "text": "1", "reward": 1.0}]
    with pytest.raises(RecipeError, match=r"data\.rollouts: no log_probs"):
        reader_parts(tmp_path, rows, group_size=2)
    told = [{**row, "token_ids": [0], "log_probs": [-0.7]} for row in rows]
    with pytest.raises(RecipeError, match=r"data\.rollouts: tells one reward a sample.*; use group_std"):
        reader_parts(tmp_path / "c", told, group_size=2, objective={"preset": "gdpo"})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    pictures = [{"prompt": "a", "image": "a.png", "reward": 0.0}] * 2
    with pytest.raises(RecipeError, match=r"data\.rollouts: holds pictures"):
        reader_parts(tmp_path / "b", [{**row, "image": "../a.png"} for row in pictures], group_size=2,
                     objective={"preset": "best_of_n"})  # fmt: skip


def test_pictures_in_the_lines_tell_prompts_apart(tmp_path: Path):
    lines = []
    for colour in ("red", "green"):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), colour).save(buffer, format="PNG")
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        lines.append({"prompt": "what colour?", "condition_images": [uri], "text": colour})
    first, second = load_recorded(write(tmp_path, lines), {}, 1)
    assert first.row["images"][0].open().getpixel((0, 0)) == (255, 0, 0)
    assert second.samples[0].text == "green"


def test_columns_and_pictures_survive_a_recorded_rollout(tmp_path: Path):
    """A prompt's messages, columns and pictures come back as they were; a NaN reward leaves its sample out."""
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    messages = [{"role": "user", "content": "a"}]
    columns = {"level": 3, "mask_image": pictures[1]}
    prompts = [
        Prompt(text=messages, images=(pictures[0],), columns=columns, group_id=0, seed=seed) for seed in range(2)
    ]
    scores = torch.tensor([0.25, math.nan])
    rollout = Rollout(
        prompts=prompts,
        trajectory=Trajectory(
            group_ids=torch.zeros(2, dtype=torch.int64),
            segments={},
            completions=[Completion(text=None, images=(pictures[2],))] * 2,
            policy_version=0,
        ),
        scores=Scores(total=scores, breakdown={"r": scores}, shaped={"r": scores}, report={}),
        seconds=(0.0, 0.0),
    )
    recorder = Recorder(tmp_path, Bandit([0.0]), 0)
    recorder.write(0, rollout)
    recorder.write(1, rollout)
    recorder.forget(1)
    (group,) = load_recorded(str(tmp_path), {"r": 1.0}, 2)
    assert group.row["prompt"] == messages and group.row["level"] == 3
    assert [sample.reward for sample in group.samples] == pytest.approx([0.25, math.nan], nan_ok=True)
    found = [group.row["images"][0].open(), group.row["mask_image"].open()]
    assert [image.getpixel((0, 0)) for image in found] == [(255, 0, 0), (0, 128, 0)]
    assert group.samples[0].picture is not None and group.samples[0].picture.open().getpixel((1, 1)) == (0, 0, 255)
    for bad, message in (({"reward": 1}, "called reward"), ({"when": math.pi * 1j}, "column when")):
        wrong = replace(rollout, prompts=[replace(prompt, columns=bad) for prompt in prompts])
        with pytest.raises(RecipeError, match=message):
            recorder.write(2, wrong)

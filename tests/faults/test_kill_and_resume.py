"""N steps are the same as k steps, kill -9, and the other N - k: bit for bit, wherever the kill came."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forks

QUICKSTART = Path(__file__).parent.parent.parent / "recipes/quickstart"
# Two prompts a rollout out of six: an epoch ends with every third rollout. Two updates a rollout.
WORK = [
    "num_steps=8",
    "group_size=2",
    "prompts_per_step=2",
    "epochs=2",
    "evaluation.num_prompts=2",
    "evaluation.every=3",
    "evaluation.num_saved=2",
    "engine.threads=1",
    "checkpoint.every=1",
    "checkpoint.keep=9",
]
SHORT = {
    "quickstart": ["policy.sampling.num_inference_steps=3", "policy.sampling.noise_steps=2"],
    "quickstart_ddpo": [
        "policy.sampling.num_inference_steps=3",
        "policy.sampling.noise_steps=2",
        "objective.train_steps=2",
    ],
    "quickstart_vlm": ["policy.sampling.max_new_tokens=4"],
}
REWARD = '''
import os, random, signal
import numpy as np

calls = 0

def reward(prompts, completions, **_):
    """Draws from the global generators, and kills its process at the call that the environment names."""
    global calls
    calls += 1
    if os.environ.get("KILL_AT_CALL") == str(calls) and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return [random.random() + np.random.rand() for _ in completions]
'''


def command(recipe: str, folder: Path, *more: str) -> list[str]:
    reward = folder.parent / "noisy.py"
    reward.write_text(REWARD)
    rows = folder.parent / "prompts.jsonl"
    if not rows.exists():
        words = (QUICKSTART / "digits.txt").read_text().splitlines()[:6]
        rows.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    data = [
        f"data.prompts={rows}",
        f"data.evaluation={rows}",
        f"rewards=[{{name: {reward}:reward, isolation: thread}}]",
    ]
    return ["train", recipe, *WORK, *SHORT[recipe], *data, "--output", str(folder), *more]


def run(recipe: str, folder: Path, *more: str, num: int = 1, kill_at_call: int | None = None) -> forks.Ended:
    """The end of the first of `num` processes."""
    environment = {} if kill_at_call is None else {"KILL_AT_CALL": str(kill_at_call)}
    words = command(recipe, folder, *more)
    log = folder.parent / f"log_{folder.name}"
    if num == 1:
        return forks.run(words, log=log, environment=environment)
    ends = forks.run_together(num, forks.cli, words, log=log, environment=environment)
    if kill_at_call is None:
        assert not any(end.returncode for end in ends), ends[-1].stderr[-3000:]
    return ends[0]


def timeless(folder: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    # In its first step a process gathers weights that later it knows it will need: more bytes, the same numbers.
    noise = ("time/", "slowest/", "memory/", "samples_per_second", "comm/")
    return [{key: value for key, value in row.items() if not key.startswith(noise)} for row in rows]


def assert_same_end(
    one: Path, other: Path, *, step: int = 8, logs: Sequence[str] = ("metrics.jsonl", "eval.jsonl")
) -> None:
    """Weights, optimiser, everything that the trainer remembers, metrics and evaluations."""
    last = f"checkpoints/step_{step:06d}"
    manifests = [json.loads((folder / last / "manifest.json").read_text()) for folder in (one, other)]
    files = [{entry["path"]: entry["sha256"] for entry in manifest["files"]} for manifest in manifests]
    assert files[0].keys() == files[1].keys() and any(path.startswith("policy/") for path in files[0])
    for path in files[0]:
        if path.endswith(".safetensors"):
            # Libraries write several entries of a header's metadata in any order: equal tensors, other bytes.
            first, second = (load_file(folder / last / path) for folder in (one, other))
            assert first.keys() == second.keys(), path
            assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), path
        else:
            assert files[0][path] == files[1][path], path
    assert manifests[0]["state"] == manifests[1]["state"]
    for name in logs:
        assert timeless(one, name) == timeless(other, name)


def without_manifest(folder: Path, *steps: int) -> None:
    """Checkpoints whose writing was interrupted just before their end."""
    for step in steps:
        (folder / f"checkpoints/step_{step:06d}/manifest.json").unlink()


@pytest.mark.parametrize("recipe", SHORT)
def test_killed_and_resumed_is_as_if_nothing_had_happened(recipe: str, tmp_path: Path):
    whole = run(recipe, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    # Judged are: the base model, rollouts 0 and 1, and then the model of step 3, between the two updates of rollout 1.
    killed = run(recipe, tmp_path / "parts", kill_at_call=4)
    assert killed.returncode == -signal.SIGKILL
    assert timeless(tmp_path / "parts", "metrics.jsonl")[-1]["step"] == 3
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["step_000002"]
    resumed = run(recipe, tmp_path / "parts")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    if recipe != "quickstart_vlm":
        return
    without_manifest(tmp_path / "parts", 8)  # from the epoch's end, step 6
    assert run(recipe, tmp_path / "parts").returncode == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    again = run(recipe, tmp_path / "parts")
    assert again.returncode == 0 and "nothing left to do" in again.stdout
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("recipe", "stage"), [("quickstart_ddpo", 2), ("quickstart_vlm", 3)])
def test_two_processes_under_zero(recipe: str, stage: int, tmp_path: Path):
    zero = [f"engine.zero_stage={stage}", "evaluation.every=100", "num_steps=4"]
    whole = run(recipe, tmp_path / "whole", *zero, num=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    # Judged are: the base model, rollout 0, and then rollout 1.
    killed = run(recipe, tmp_path / "parts", *zero, num=2, kill_at_call=3)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(recipe, tmp_path / "parts", *zero, num=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from" in resumed.stdout
    assert_same_end(tmp_path / "whole", tmp_path / "parts", step=4)


DENOISE = ["policy.sampling.num_inference_steps=3"]
SOME_NOISE = [*DENOISE, "policy.sampling.noise_steps=2"]
OTHERS = {
    "quickstart_classes": [*SOME_NOISE, "rewards.0.isolation=thread", "rewards.1.isolation=thread"],
    "quickstart_draft": [*DENOISE, "rewards.0.isolation=thread", "rewards.1.isolation=thread"],
    "quickstart_edit": [*SOME_NOISE, "epochs=2"],
    "quickstart_image_tokens": ["epochs=2"],
    "quickstart_masked_diffusion": [*DENOISE, "epochs=2"],
    "quickstart_nft": [*DENOISE, "objective.train_steps=2", "epochs=2", "rewards.0.isolation=thread"],
    "quickstart_ocr": [*SOME_NOISE, "epochs=2"],
    "quickstart_think_then_draw": ["epochs=2", "policy.sampling.think.max_new_tokens=4"],
    "quickstart_vla": ["epochs=2", "policy.environment.max_turns=3"],
}
NEEDS = {"quickstart_classes": "efficientnet_lite_pytorch", "quickstart_ocr": "rapidocr"}


KILLS: dict[str, tuple[int, ...]] = dict.fromkeys(OTHERS, (3,)) | {"quickstart_image_tokens": (2, 3, 4)}
"""The steps after which a run is killed, within the second rollout's updates. What no recipe has a share in, before the
first checkpoint and after the last step, is tried with one that is quick."""


@pytest.mark.parametrize("recipe", OTHERS)
def test_a_quickstart_killed_between_its_updates_goes_on_as_if_nothing_had_happened(recipe: str, tmp_path: Path):
    """Data and rewards are the recipe's own."""
    if recipe in NEEDS:
        pytest.importorskip(NEEDS[recipe])
    short = ["num_steps=4", "group_size=2", "prompts_per_step=2", "data.evaluation=null", "engine.threads=1"]
    words = ["train", recipe, *short, "checkpoint.every=2", "checkpoint.keep=9", *OTHERS[recipe], "--output"]
    whole = forks.run([*words, str(tmp_path / "whole")], log=tmp_path / "log_whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    parts = tmp_path / "parts"
    for step in KILLS[recipe]:
        killed = forks.Fork(forks.cli_killed, [*words, str(parts)], step, environment={}, log=tmp_path / "log").wait()
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert timeless(parts, "metrics.jsonl")[-1]["step"] == step
        # A step's metrics come before its checkpoint.
        assert [path.name for path in parts.glob("checkpoints/step_*")] == ["step_000002"][: step > 2]
    resumed = forks.run([*words, str(parts)], log=tmp_path / "log_parts")
    assert resumed.returncode == 0 and "resumed from" in resumed.stdout, resumed.stderr[-3000:]
    assert_same_end(tmp_path / "whole", parts, step=4, logs=("metrics.jsonl",))

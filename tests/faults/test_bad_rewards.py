"""Rewards that hang, raise, die, leak or answer nonsense: the run goes on without them, or stops and names them."""

import importlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unified_rl.cli import main
from unified_rl.errors import RecipeError
from unified_rl.recipe.reward import Gate, RewardBlock
from unified_rl.rewards.process import CallFailedError
from unified_rl.rewards.runner import RewardRunner
from unified_rl.rewards.scoring import LoadedReward, RewardFailedError, Scoring, check_rewards, load_rewards, score
from unified_rl.rewards.types import Judged, RewardBatch, RewardError
from unified_rl.types import Completion, Prompt

REWARDS = """
import os, subprocess, sys, time

def steps(completions, **columns):
    return [float(len(each)) for each in completions]

def moody(completions, do, **columns):
    print("noise on standard output")
    for what in do:
        if what == "hang":
            subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60)  # {os.getpid()}"])
            time.sleep(60)
        if what == "exit":
            subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60)  # {os.getpid()}"])
            os._exit(3)
        if what == "sys.exit":
            sys.exit("enough")
        if what == "raise":
            raise KeyError("gone")
        if what == "leak":
            hoard = []
            while True:
                hoard.append(bytearray(20_000_000))
        if what == "few":
            return [1.0]
    return [float("nan") if what == "nan" else None if what == "none" else 1.0 for what in do]

def who(completions, **columns):
    return [float(os.getpid()) for _ in completions]

class Refuses:
    def __init__(self):
        raise ValueError("no weights here")

def slow(completions, **columns):
    time.sleep(0.4)
    return [1.0 for _ in completions]
"""


@pytest.fixture
def rewards_file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards_of_all_kinds.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def started() -> Iterator[list[LoadedReward]]:
    rewards: list[LoadedReward] = []
    yield rewards
    for reward in rewards:
        reward.runner.close()


def prompts(*do: str) -> list[Prompt]:
    return [Prompt(text="p", images=(), columns={"do": what}, group_id=0, seed=0) for what in do]


def said(num: int) -> list[Completion]:
    return [Completion(text="four", images=())] * num


def load(path: Path, name: str, started: list[LoadedReward], **keys: Any) -> LoadedReward:
    keys = {"retries": 0, **keys}
    started += load_rewards([RewardBlock(name=f"{path}:{name}", **keys)])
    return started[-1]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("hang", r"gave no answer within 3 s"),
        ("exit", r"ended its process \(exit code 3\)"),
        ("sys.exit", r"failed: SystemExit: enough"),
        ("raise", r"failed: KeyError: 'gone'"),
        ("leak", r"took \d+ MiB, more than memory_mib = 200"),
        ("few", r"returned 1 scores for 2 completions"),
    ],
)
def test_a_failure_excludes_is_counted_and_the_next_call_works(
    rewards_file: Path, started: list[LoadedReward], what: str, reason: str
) -> None:
    reward = load(rewards_file, "moody", started, max_failures=1.0, timeout=3.0, memory_mib=200)
    scores = score([reward], prompts("fine", what), said(2))
    assert scores.breakdown["moody"].isnan().all() and scores.total.isnan().all()
    assert scores.report["failures/moody"] == 2.0
    again = score([reward], prompts("fine", "none", "nan", "fine"), said(4))
    assert again.breakdown["moody"].nan_to_num(nan=-1.0).tolist() == [1.0, -1.0, -1.0, 1.0]
    assert again.report["failures/moody"] == 0.0, "abstaining is no failure"
    strict = LoadedReward(name="moody", runner=reward.runner, max_failures=0.4)
    with pytest.raises(RewardFailedError, match=rf"^reward 'moody' {reason}"):
        score([strict], prompts("fine", what), said(2))


@pytest.mark.parametrize("what", ["hang", "exit"])
def test_what_a_killed_or_ended_reward_started_is_gone_too(
    what: str, rewards_file: Path, started: list[LoadedReward]
) -> None:
    reward = load(rewards_file, "moody", started, max_failures=1.0, timeout=1.0)
    pid = score([load(rewards_file, "who", started)], prompts("x"), said(1)).breakdown["who"]
    assert int(pid[0]) != os.getpid()
    process = reward.runner.reward._process  # type: ignore[union-attr]
    assert process is not None
    score([reward], prompts(what), said(1))
    assert process.poll() is not None
    time.sleep(0.2)
    commands = [_command(folder) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    assert not any(f"# {process.pid}" in command for command in commands)


def _command(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_text()
    except OSError:  # it ended
        return ""


def test_a_reward_that_is_closed_in_a_call_stays_closed(rewards_file: Path, started: list[LoadedReward]) -> None:
    """The thread that judges sees its process die, and must not start another one that nobody would end."""
    reward = load(rewards_file, "moody", started, retries=5)
    handle: Any = reward.runner.reward
    batch_of_one = RewardBatch(prompts=["p"], texts=["four"], pictures=[[]], columns={"do": ["hang"]}, group_ids=[0])
    answer = reward.runner.submit(batch_of_one)
    time.sleep(0.5)
    reward.runner.close()
    assert "was closed" in answer.result(timeout=60).reason
    assert handle._process is None


def test_tensors_reach_a_rewards_process_and_what_it_cannot_read_is_refused(
    tmp_path: Path, started: list[LoadedReward], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "of_tensors.py"
    path.write_text("def total(completions, goal):\n    return [float(each['at'].sum()) for each in goal]\n")
    reward = load(path, "total", started)
    rows = [replace(prompt, columns={"goal": {"at": torch.full((3,), 2.0)}}) for prompt in prompts("", "")]
    assert score([reward], rows, said(2)).total.tolist() == [6.0, 6.0]
    (tmp_path / "known_here_only.py").write_text("class Goal:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    goal = importlib.import_module("known_here_only").Goal()
    rows = [replace(prompt, columns={"goal": goal}) for prompt in rows]
    with pytest.raises(RewardError, match="reward 'total' got data that its process cannot read"):
        score([reward], rows, said(2))


def test_a_reward_that_cannot_be_set_up_is_the_users_error(rewards_file: Path) -> None:
    with pytest.raises(RecipeError, match="ValueError: no weights here"):
        load_rewards([RewardBlock(name=f"{rewards_file}:Refuses")])
    with pytest.raises(RecipeError, match=r"^rewards\.0\.arguments\.completions: .* no such argument"):
        load_rewards([RewardBlock(name=f"{rewards_file}:steps", arguments={"completions": 1})])


class Flaky:
    """Fails as often as told, then answers."""

    groupwise = False

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def judge(self, batch: RewardBatch) -> Judged:
        self.calls += 1
        if self.calls <= self.failures:
            raise CallFailedError(f"failed: call {self.calls}")
        return Judged(values=[float(len(text or "")) for text in batch.texts])

    def close(self) -> None:
        pass


def batch(*texts: str) -> RewardBatch:
    count = len(texts)
    return RewardBatch(
        prompts=["p"] * count, texts=texts, pictures=[[]] * count, columns={}, group_ids=list(range(count))
    )


def test_retries_pause_longer_each_time() -> None:
    flaky = Flaky(2)
    runner = RewardRunner(flaky, retries=2, first_pause=0.1)  # type: ignore[arg-type]
    began, generator = time.perf_counter(), random.getstate()
    outcome = runner.submit(batch("ab", "c")).result()
    assert (outcome.values, outcome.failed, flaky.calls) == ([2.0, 1.0], 0, 3)
    assert random.getstate() == generator, "a failure must not change what a run draws after it"
    assert 0.05 + 0.1 < time.perf_counter() - began < 10.0


def test_the_breaker_opens_and_lets_a_probe_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unified_rl.rewards.runner.FIRST_BREAK", 0.3)
    flaky = Flaky(4)
    runner = RewardRunner(flaky)  # type: ignore[arg-type]
    outcomes = [runner.submit(batch("a")).result() for _ in range(5)]
    assert [outcome.failed for outcome in outcomes] == [1] * 5 and flaky.calls == 3, "not asked while it rests"
    assert outcomes[-1].reason == "failed: call 3 (3 times in a row; it rests for a while)", "and why it failed"
    time.sleep(0.35)
    assert runner.submit(batch("a")).result().failed == 1 and flaky.calls == 4, "one probe, which fails"
    assert runner.submit(batch("a")).result().failed == 1 and flaky.calls == 4, "so it rests again"
    time.sleep(0.65)
    assert runner.submit(batch("a")).result().values == [1.0] and flaky.calls == 5


def test_the_cache_goes_by_content() -> None:
    flaky = Flaky(0)
    runner = RewardRunner(flaky, cache=True)  # type: ignore[arg-type]
    assert runner.submit(batch("a", "bb")).result().values == [1.0, 2.0]
    assert runner.submit(batch("bb", "a")).result().values == [2.0, 1.0] and flaky.calls == 1
    assert runner.submit(batch("bb", "ccc")).result().values == [2.0, 3.0] and flaky.calls == 2


def test_a_batch_is_cut_to_size() -> None:
    flaky = Flaky(1)
    runner = RewardRunner(flaky, batch_size=2)  # type: ignore[arg-type]
    outcome = runner.submit(batch("a", "bb", "ccc")).result()
    assert outcome.failed == 2 and math.isnan(outcome.values[0]) and outcome.values[2] == 3.0


def test_scoring_overlaps_with_sampling(rewards_file: Path, started: list[LoadedReward]) -> None:
    reward = load(rewards_file, "slow", started)
    scoring = Scoring([reward], prompts(*"abcd"))
    for _ in range(4):
        scoring.add(said(1))
        time.sleep(0.6)  # the next one is sampled meanwhile
    began = time.perf_counter()
    scores = scoring.finish()
    assert scores.total.tolist() == [1.0] * 4
    assert scores.report["time/reward_work"] > 1.6, "it worked four times 0.4 s"
    assert time.perf_counter() - began < 1.2, "and nobody waited for more than the last"


def test_held_out_rewards_are_asked_in_evaluations_only(rewards_file: Path, started: list[LoadedReward]) -> None:
    started += load_rewards(
        [
            RewardBlock(name=f"{rewards_file}:steps"),
            RewardBlock(name=f"{rewards_file}:who", weight=0.0, held_out=True, cache=True),
        ]
    )
    assert set(score(started, prompts("a"), said(1)).breakdown) == {"steps", "who"}
    assert set(score(started, prompts("a"), said(1), evaluation=False).breakdown) == {"steps"}


def test_what_rewards_say_of_each_other(rewards_file: Path) -> None:
    steps, who = f"{rewards_file}:steps", f"{rewards_file}:who"
    gate = Gate(reward="stesp")
    with pytest.raises(RecipeError, match=r"^rewards\.1\.only_if\.reward: no other reward 'stesp'; did you mean 'ste"):
        check_rewards([RewardBlock(name=steps), RewardBlock(name=who, only_if=gate)])
    held_out = RewardBlock(name=steps, weight=0.0, held_out=True)
    with pytest.raises(RecipeError, match="steps is held out"):
        check_rewards([held_out, RewardBlock(name=who, only_if=Gate(reward="steps"))])


def test_a_run_goes_on_without_a_reward_that_dies_now_and_then(tmp_path: Path) -> None:
    rewards = tmp_path / "dying.py"
    rewards.write_text(
        "import os, pathlib\n"
        "def dying(completions, **columns):\n"
        "    count = pathlib.Path(__file__).with_name('count')\n"
        "    number = int(count.read_text()) if count.exists() else 0\n"
        "    count.write_text(str(number + 1))\n"
        "    if number == 1: os._exit(9)\n"
        "    return [float(len(each)) for each in completions]\n"
    )
    keys = [f"rewards=[{{name: {rewards}:dying, retries: 0, max_failures: 0.5}}]", "evaluation.num_prompts=8"]
    small = ["num_steps=2", "group_size=4", "prompts_per_step=4", "engine.micro_batch=8", "engine.rollout_batch=8"]
    run = tmp_path / "run"
    assert main(["train", "quickstart_vlm", *keys, *small, "--output", str(run)]) == 0
    first, second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first["failures/dying"] == first["num_excluded"] == 8.0 and first["reward"] > 0.0
    assert second["failures/dying"] == 0.0
    keys[0] = f"rewards=[{{name: {rewards}:gone, retries: 0}}]"
    rewards.write_text("import os\ndef gone(completions, **columns): os._exit(9)\n")
    assert main(["train", "quickstart_vlm", *keys, *small, "--output", str(tmp_path / "second")]) == 1


def test_a_hanging_reward_does_not_hold_up_the_end(rewards_file: Path) -> None:
    """The process exits at once, with the call still in flight, and takes the reward's process with it."""
    code = (
        "import os\n"
        "from unified_rl.recipe.reward import RewardBlock\n"
        "from unified_rl.rewards.scoring import Scoring, load_rewards\n"
        "from unified_rl.types import Completion, Prompt\n"
        f"rewards = load_rewards([RewardBlock(name={f'{rewards_file}:moody'!r})])\n"
        "prompts = [Prompt(text='p', images=(), columns={'do': 'hang'}, group_id=0, seed=0)]\n"
        "Scoring(rewards, prompts).add([Completion(text='a', images=())])\n"
        "print(rewards[0].runner.reward._process.pid)\n"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert time.perf_counter() - began < 40.0, "the reward would hang for 60 s"
    assert not Path(f"/proc/{int(done.stdout)}").exists()

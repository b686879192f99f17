"""Environments: the walk by hand, gymnasium's as words and bins, and what is refused before a model loads."""

import re
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from unified_rl.data.environments import load_environment
from unified_rl.errors import RecipeError
from unified_rl.recipe.file import load_recipe
from unified_rl.worlds import walk

WALK = {
    "prompt": "go to the red circle",
    "things": [
        {"shape": "circle", "colour": "red", "row": 0, "col": 2},
        {"shape": "square", "colour": "blue", "row": 0, "col": 1},
    ],
    "start": [1, 1],
}


def test_a_walk_by_hand():
    env = walk.Walk(size=64)
    seen = env.reset(WALK, 0)
    assert seen.text == WALK["prompt"] and seen.images[0].size == (64, 64)
    # The cross of the agent in cell (1, 1), whose box is 7 of 8 pixels wide: its middle row and column are white.
    assert {seen.images[0].getpixel(at) for at in ((22, 17), (22, 28), (17, 22), (28, 22))} == {(255, 255, 255)}
    for action, ended, success in (("hmm", False, False), ("right", False, False), (" up ", True, True)):
        turn = env.step(action)
        assert (turn.ended, turn.success, turn.reward) == (ended, success, float(success)), action
    env.reset(WALK, 0)
    assert env.step("up").ended and not env.step("up").success, "it met the blue square"
    env.reset({**WALK, "start": [3, 0]}, 0)
    same = env.step("left").observation.images[0]
    assert same.tobytes() == env.step("down").observation.images[0].tobytes(), "at the edge it stays"


def test_the_shortest_way_goes_round_other_objects():
    assert set(walk.shortest(WALK)) == {"right"}
    assert walk.shortest({**WALK, "start": [0, 0]}) == ["down"]
    assert set(walk.shortest({**WALK, "start": [3, 1]})) == {"up", "right"}
    for task in walk.tasks("heldout", 20):
        at = tuple(task["start"])
        for _ in range(8):
            at = walk.moved(at, walk.shortest(task, at)[0])
            if at == (task["things"][0]["row"], task["things"][0]["col"]):
                break
        else:
            pytest.fail(f"no way to the goal of {task}")


def test_held_out_walks_never_occur_in_training():
    def asked(task: dict) -> tuple:
        goal = task["things"][0]
        return task["prompt"], goal["row"], goal["col"], *task["start"]

    assert not {asked(task) for task in walk.train_walks()} & {asked(task) for task in walk.heldout_walks()}


class Dial(gymnasium.Env):
    """Two continuous actions in [-1, 3] and [0, 1]; rewards their sum; ends after two turns."""

    action_space = spaces.Box(np.array([-1.0, 0.0], dtype=np.float32), np.array([3.0, 1.0], dtype=np.float32))
    observation_space = spaces.Box(0, 1, (1,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}

    def __init__(self, render_mode: str, space: spaces.Space | None = None) -> None:
        self.render_mode = render_mode
        self.action_space = space or self.action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.turn = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple:
        self.turn += 1
        return np.zeros(1, dtype=np.float32), float(np.sum(action)), self.turn == 2, False, {"is_success": False}

    def render(self) -> np.ndarray:
        return np.full((8, 8, 3), self.turn, dtype=np.uint8)


gymnasium.register("Dial-v0", Dial)


def test_continuous_actions_are_the_middles_of_bins():
    env = load_environment("gymnasium:Dial-v0", {"bins": 4, "text": "turn: {prompt}"})()
    seen = env.reset({"prompt": "dials", "seed": 3}, 0)
    assert seen.text == "turn: dials" and seen.images[0].getpixel((0, 0)) == (0, 0, 0)
    # Bins of width 1 and 0.25: 3 means 2.5 of [-1, 3], 1 means 0.375 of [0, 1].
    turn = env.step("3 1")
    assert turn.reward == pytest.approx(2.875) and not turn.ended
    assert turn.observation.images[0].getpixel((0, 0)) == (1, 1, 1)
    last = env.step("0 0")
    assert last.reward == pytest.approx(-0.5 + 0.125) and last.ended and not last.success
    for wrong in ("", "1", "1 2 3", "4 0", "-1 0", "one two"):
        env.reset({"prompt": "dials", "seed": 3}, 0)
        turn = env.step(wrong)
        assert turn.ended and not turn.success and turn.reward == 0.0, wrong


def test_a_real_environment_is_walked_to_its_goal():
    words = ["left", "right", "forward", "pickup", "drop", "toggle", "done"]
    make = load_environment("gymnasium:minigrid:MiniGrid-Empty-5x5-v0", {"actions": words, "text": "{mission}"})
    env = make()
    seen = env.reset({"prompt": "go", "seed": 0}, 0)
    assert seen.text == "get to the green goal square" and len(seen.images[0].getcolors()) > 2
    turns = [env.step(action) for action in ("forward", "forward", "right", "forward", "forward")]
    assert [turn.ended for turn in turns] == [False] * 4 + [True]
    assert turns[-1].success and turns[-1].reward > 0.9
    env.reset({"prompt": "go", "seed": 0}, 0)
    assert env.step("fly").ended


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.environment.name=unified_rl.worlds.walk:Wlak"], "policy.environment.name: .* did you mean 'Walk'"),
        (["policy.environment.turns=3"], "policy.environment.turns: .*max_turns"),
        (["engine.zero_stage=3"], "engine.zero_stage: 3 gathers weights in step"),
        (["record_rollouts=true"], "record_rollouts: episodes"),
    ],
)
def test_what_is_refused_before_a_model_loads(overrides: list[str], message: str):
    from unified_rl.recipe.checks import check_recipe

    with pytest.raises(RecipeError, match=message):
        check_recipe(load_recipe("quickstart_vla", overrides))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unified_rl.worlds.walk:Walk", {"colour": 1}, "policy.environment.arguments: .*colour"),
        ("unified_rl.worlds.walk:ACTIONS", {}, "no class or function"),
        ("gymnasium:Daily-v0", {}, "gymnasium makes no Daily-v0"),
        ("gymnasium:Dial-v0", {"actions": ["on"]}, "policy.environment.arguments.actions: .*continuous"),
        ("gymnasium:Dial-v0", {"make": {"space": spaces.MultiBinary(3)}}, re.escape("MultiBinary(3)")),
        ("gymnasium:Dial-v0", {"make": {"space": spaces.Discrete(3)}, "actions": ["on"]}, "1 words for 3 actions"),
    ],
)
def test_an_environment_that_cannot_be_made(name: str, arguments: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        load_environment(name, arguments)


def test_gymnasium_needs_a_seed_of_its_task():
    with pytest.raises(RecipeError, match=r"data.prompts: .*column seed"):
        load_environment("gymnasium:Dial-v0", {})().reset({"prompt": "go"}, 0)

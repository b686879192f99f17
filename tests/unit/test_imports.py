"""Import references: checked without running anything, loaded without touching `sys.path`."""

import subprocess
import sys
from pathlib import Path

import pytest

from unified_rl.errors import RecipeError
from unified_rl.imports import check_import, load_import

SOURCE = """
import os as system
from json import dumps
from dataclasses import dataclass

def plain(): return 1
async def later(): return 2
class Kind:
    inside = 3
    def method(self): return 4
@dataclass
class Record:
    value: int = 5
constant: int = 6
first, *rest = [7, 8]
if constant:
    conditional = 9
try:
    attempted = 10
except ValueError:
    fallback = 11
squares = [hidden for hidden in range(3)]
def outer():
    local = 12
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugin.py"
    path.write_text(SOURCE)
    return path


FOUND = (
    *("plain", "later", "Kind", "Kind.method", "Record", "constant", "first", "rest"),
    *("conditional", "attempted", "fallback", "squares", "system", "dumps"),
)


@pytest.mark.parametrize("name", FOUND)
def test_top_level_names_are_found(plugin: Path, name: str) -> None:
    check_import(f"{plugin}:{name}", "rewards.0.name")


@pytest.mark.parametrize("name", ["hidden", "local", "inside", "plane"])
def test_other_names_are_not(plugin: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"^rewards\.0\.name: .*plugin\.py has no '{name}'"):
        check_import(f"{plugin}:{name}", "rewards.0.name")


def test_errors_name_the_nearest(plugin: Path) -> None:
    for reference, said in {
        f"{plugin}:plian": "did you mean 'plain'?",
        f"{plugin.parent}/plugins.py:plain": "did you mean 'plugin.py'?",
        "unified_rl.world:x": "unified_rl has no module 'world'; did you mean 'worlds'?",
        "unified_rl.worlds.shapes:train_drawin": "did you mean 'train_drawing'?",
        "unified_rl.recipe.schema.deeper:x": "unified_rl.recipe.schema has no module 'deeper'",
        "no_such_package.module:x": "no module 'no_such_package' is installed",
    }.items():
        with pytest.raises(RecipeError) as caught:
            check_import(reference, "data.prompts")
        assert str(caught.value).startswith("data.prompts: ") and said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["", "x", ":x", "module:", "a-b:x", "module:1x", "module: x", "..up:x", "a/b:x"])
def test_malformed_references(reference: str) -> None:
    for function in (check_import, load_import):
        with pytest.raises(RecipeError, match=r"is no import; write package\.module:name or path/to/file\.py:name"):
            function(reference, "data.prompts")


def test_a_module_in_the_working_directory_is_hinted_at(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plugin.parent)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(RecipeError, match=r"name a file as plugin\.py:plain"):
        check_import("plugin:plain", "rewards.0.name")
    check_import("plugin.py:plain", "rewards.0.name")


def test_checking_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explosive"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "module.py").write_text("raise SystemExit('imported')\ndef reward(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    check_import("explosive.module:reward", "here")
    check_import(f"{package}/module.py:reward", "here")
    with pytest.raises(RecipeError, match="did you mean 'reward'"):
        check_import("explosive.module:rewrad", "here")
    assert "explosive" not in sys.modules


def test_what_cannot_be_told_without_running_is_let_through(tmp_path: Path) -> None:
    star, lazy = tmp_path / "star.py", tmp_path / "lazy.py"
    star.write_text("from json import *")
    lazy.write_text("def __getattr__(name): return name")
    check_import(f"{star}:dumps", "here")
    check_import(f"{lazy}:anything", "here")
    check_import("math:sqrt", "here")
    assert load_import(f"{lazy}:anything") == "anything"
    with pytest.raises(RecipeError, match="math has no 'sqroot'; did you mean 'sqrt'"):
        load_import("math:sqroot")


def test_broken_source(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def reward(:\n")
    with pytest.raises(RecipeError, match=r"broken\.py is not valid Python"):
        check_import(f"{path}:reward", "here")


def test_load(plugin: Path) -> None:
    assert load_import("json:dumps")([1]) == "[1]"
    assert load_import(f"{plugin}:plain")() == 1
    assert load_import(f"{plugin}:Kind.inside") == 3
    assert load_import(f"{plugin}:Record")(value=6).value == 6
    assert load_import(f"{plugin}:Kind") is load_import(f"{plugin}:Kind"), "a file runs once"


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "same.py").write_text(f"value = {number}")
    before = list(sys.path)
    assert [load_import(f"{tmp_path}/{number}/same.py:value") for number in (1, 2)] == [1, 2]
    assert sys.path == before
    assert "same" not in sys.modules


def test_a_failing_import_is_one_line_with_its_cause(tmp_path: Path) -> None:
    path = tmp_path / "failing.py"
    path.write_text("raise RuntimeError('two\\nlines')\nreward = 1")
    for _ in range(2):  # a half-made module must not be found the second time
        with pytest.raises(
            RecipeError, match=r"^here: importing .*failing\.py failed: RuntimeError: two lines$"
        ) as caught:
            load_import(f"{path}:reward", "here")
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_checking_needs_no_torch() -> None:
    code = """
import sys
from unified_rl.data.sources import check_source
from unified_rl.recipe.schema import RewardBlock
from unified_rl.rewards.scoring import check_rewards, list_rewards
check_source("unified_rl.worlds.shapes:train_drawing", "data.prompts")
check_rewards([RewardBlock(name=name) for name in list_rewards()])
assert not {"torch", "sklearn", "unified_rl.worlds.shapes"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Rules that keep the project readable: who may import whom, and how long files and functions may be."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = sorted([*(ROOT / "unified_rl").rglob("*.py"), *(ROOT / "reward_models").rglob("*.py")])
PURE = {"transformers", "diffusers", "deepspeed", "peft", "torch.distributed", "unified_rl.recipe", "unified_rl.engine"}
FORBIDDEN = {
    "unified_rl/objectives/": PURE,
    "unified_rl/transitions/": PURE,
    "unified_rl/advantages.py": PURE,
    "unified_rl/policies/": {"unified_rl.engine", "unified_rl.objectives", "unified_rl.rewards", "deepspeed"},
    "unified_rl/engine/": {"unified_rl.policies", "diffusers", "transformers"},
    "unified_rl/types.py": {"unified_rl", "transformers", "diffusers", "numpy", "PIL"},
}


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax tree, which is walked once for all rules."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path, *, begins: bool = False) -> list[str]:
    """What a file imports; `begins`: when it is imported itself."""
    found: list[str] = []
    whole = nodes(path)
    assert isinstance(whole[0], ast.Module)
    for node in whole[0].body if begins else whole:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_layers(path: Path):
    relative = path.relative_to(ROOT).as_posix()
    for prefix, forbidden in FORBIDDEN.items():
        if relative.startswith(prefix):
            for name in imports(path):
                assert not any(within(name, package) for package in forbidden), f"{relative} imports {name}"
    for name in imports(path):
        assert not within(name, "deepspeed") or relative == "unified_rl/engine/deepspeed.py", relative
        if relative.startswith("reward_models/"):
            assert not within(name, "unified_rl") or within(name, "unified_rl.types"), f"{relative} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path):
    assert path.read_text(encoding="utf-8").count("\n") <= 400
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} at line {node.lineno}"


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "assemble",
        "update",
        "windows",
        "prepare",
        "memory",
        "health",
        "resample",
        "rollout",
        "evaluate",
        "metrics",
        "replay",
        "advantages",
    ],
)
def test_the_trainer_does_not_know_families(name: str):
    """Nothing on the shared path asks which family a policy is, or what its segments are called."""
    tree = nodes(ROOT / "unified_rl" / f"{name}.py")
    words = {node.attr for node in tree if isinstance(node, ast.Attribute)}
    words |= {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not words & {"family", "modality", "diffusion", "causal_lm", "image"}


@pytest.mark.parametrize("name", ["causal_lm", "image_tokens", "action"])
def test_language_models_do_not_wait_for_diffusers(name: str):
    """Its import takes seconds."""
    found, left = set[str](), [f"unified_rl.policies.{name}"]
    while left:
        path = ROOT / left.pop().replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        new = {*imports(path, begins=True)} - found if path.exists() else set()
        assert not any(within(each, "diffusers") for each in new), path
        found |= new
        own = [each for each in new if within(each, "unified_rl")]
        left += [*own, *(each.rpartition(".")[0] for each in own)]
    assert "unified_rl.policies.row_split" in found


def test_nothing_in_the_project_names_the_machine_it_was_made_on():
    for path in [*MODULES, *(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        assert "/work/" not in path.read_text(encoding="utf-8"), path

"""Plug-ins by reference: `package.module:name` or `path/to/file.py:name`.

A reference is checked without running any of its code (its source is found and parsed), so that `validate` answers at
once and has no side effects; it is imported only when the run starts.
"""

import ast
import hashlib
import importlib
import importlib.util
import operator
import pkgutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from unified_rl.errors import RecipeError, nearest

_OWN_SCOPE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def check_import(reference: str, where: str) -> None:
    """Make sure that a reference names something, without importing or executing it or its parent packages.

    Modules without Python source, with a star import or with a `__getattr__` of their own are only checked to exist.

    Args:
        reference: `package.module:name` or `path/to/file.py:name`.
        where: the recipe key that the reference comes from; errors begin with it.

    Raises:
        RecipeError: if the file, module or name does not exist, with the nearest one that does.
    """
    target, attribute = _split(reference, where)
    source = _source_of(target, attribute, where)
    if source is None:
        return
    try:
        names = set(_names(ast.parse(source.read_bytes())))
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{where}: {source} is not valid Python: {error}") from error
    name = attribute.partition(".")[0]
    if name not in names and not names & {"*", "__getattr__"}:
        raise _no_name(target, name, names, where)


def load_import(reference: str, where: str = "import") -> Any:
    """Import what a reference names.

    A file is imported once, under a module name of its own; its folder does not get onto `sys.path`, so what it needs
    beside itself has to be installed.

    Args:
        reference: `package.module:name` or `path/to/file.py:name`.
        where: the recipe key that the reference comes from; errors begin with it.

    Raises:
        RecipeError: if it does not exist, or its module cannot be imported (the cause is chained).
    """
    target, attribute = _split(reference, where)
    source = _source_of(target, attribute, where)
    try:
        module = _load_file(source) if source and target.endswith(".py") else importlib.import_module(target)
    except Exception as error:  # the module is the user's code: anything may come out of it
        raise RecipeError(f"{where}: importing {target} failed: {type(error).__name__}: {one_line(error)}") from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise _no_name(target, attribute, set(vars(module)), where) from error


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks."""
    return " ".join(str(error).split())


def _split(reference: str, where: str) -> tuple[str, str]:
    target, _, attribute = reference.rpartition(":")
    is_name = all(part.isidentifier() for part in attribute.split("."))
    is_module = all(part.isidentifier() for part in target.split("."))
    if not is_name or not (is_module or target.endswith(".py")):
        raise RecipeError(f"{where}: {reference!r} is no import; write package.module:name or path/to/file.py:name")
    return target, attribute


def _source_of(target: str, attribute: str, where: str) -> Path | None:
    """The Python file behind a target; None for modules that have none (built-in, compiled, namespace)."""
    if target.endswith(".py"):
        path = Path(target)
        if not path.is_file():
            siblings = sorted(near.name for near in path.parent.glob("*.py"))
            raise RecipeError(f"{where}: no file {target}{nearest(path.name, siblings) if siblings else ''}")
        return path
    origin = _spec_of(target, attribute, where).origin
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _spec_of(module: str, attribute: str, where: str) -> ModuleSpec:
    """Find a module. Its parents are searched, not imported as `importlib.util.find_spec` would do."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # `__main__` and other modules that were never found by an importer
        spec = None
    if spec is None:
        near = f"{top}.py:{attribute}" if not rest and Path(f"{top}.py").is_file() else f"path/to/file.py:{attribute}"
        raise RecipeError(f"{where}: no module {top!r} is installed; install it, or name a file as {near}")
    for part in rest:
        folders = spec.submodule_search_locations
        found = PathFinder.find_spec(f"{spec.name}.{part}", folders) if folders is not None else None
        if found is None:
            inside = sorted(info.name for info in pkgutil.iter_modules(folders)) if folders is not None else []
            hint = nearest(part, inside) if inside else ""
            raise RecipeError(f"{where}: {spec.name} has no module {part!r}{hint}")
        spec = found
    return spec


def _names(node: ast.AST) -> Iterator[str]:
    """The names that a module's top level binds (conditionally too), and "*" for a star import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.Name):
            if isinstance(child.ctx, ast.Store):
                yield child.id
        elif not isinstance(child, _OWN_SCOPE):
            yield from _names(child)


def _no_name(target: str, name: str, names: set[str], where: str) -> RecipeError:
    public = sorted(known for known in names if not known.startswith("_"))
    return RecipeError(f"{where}: {target} has no {name!r}{nearest(name, public) if public else ''}")


def _load_file(path: Path) -> ModuleType:
    """Import a file under a name made of its path, so that two `rewards.py` never take each other's place."""
    path = path.resolve()
    name = f"unified_rl_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

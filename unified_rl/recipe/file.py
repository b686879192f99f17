"""Recipes as files: YAML read, overridden, resolved and checked, with one line for whatever is wrong.

Presets only fill in keys that the recipe leaves out, so a resolved recipe spells out everything that runs.
"""

import json
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from unified_rl.errors import RecipeError, nearest
from unified_rl.recipe.objective import Objective
from unified_rl.recipe.policy import (
    IMAGE_TOKEN_MODELS,
    MASKED_PIPELINES,
    MASKED_TEXT_ENDING,
    MASKED_TEXT_MODELS,
    SAMPLING,
    TOKEN_WRITERS,
    exam_sampling,
)
from unified_rl.recipe.presets import PRESETS, RECIPE_PRESETS, SAMPLING_PRESETS
from unified_rl.recipe.schema import Recipe

_PACKAGE = Path(__file__).parent.parent
_OF_WHEEL = _PACKAGE / "shipped_recipes"
RECIPES = _OF_WHEEL if _OF_WHEEL.is_dir() else _PACKAGE.parent / "recipes"
"""Where the recipes that ship with the project lie, in a wheel or a checkout; they may be named without their path."""


_OURS = {"all", "DiffusionSampling", "TextSampling", "ImageTokenSampling"}
_OURS |= {"MaskedDiffusionSampling", "MaskedTextSampling"}
"""Parts of pydantic's locations that no user wrote: our key for all segments, and the members of a union."""
PARTS = ("kl", "correction", "critic", "reward_gradient")
"""Keys of an objective that are blocks themselves."""


class _UniqueLoader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, which YAML would silently resolve to the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"{key}: given twice (line {node.start_mark.line + 1}); keep one")
        return super().construct_mapping(node, deep)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        RecipeError: if there is neither.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml", RECIPES / "models" / f"{name}.yaml"):
        if path.is_file():
            return path.resolve()
    raise RecipeError(f"{name}: no such recipe file{nearest(name, [path.stem for path in shipped_recipes()])}")


def shipped_recipes() -> list[Path]:
    """The recipes that ship with the project: the quickstarts, then those for real models."""
    return [*sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("models/*.yaml"))]


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override, resolve and check a recipe.

    Raises:
        RecipeError: with one line that says where and what, for anything wrong in it.
    """
    path = find_recipe(name)
    raw = read_recipe(path)
    for override in overrides or []:
        apply_override(raw, override)
    return parse_recipe(raw, path.parent)


def read_recipe(path: Path) -> dict:
    """The dictionary in a recipe file, nothing resolved.

    Raises:
        RecipeError: if it is not readable as YAML, or no mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of blocks, see recipes/quickstart.yaml")
    return raw


def parse_recipe(raw: dict, folder: Path) -> Recipe:
    """Resolve and check a recipe that is already a dictionary; relative paths are looked up in `folder` first."""
    raw = json.loads(json.dumps(raw, default=str))
    _check_keys(raw, Recipe, "")
    _resolve_policy(raw, folder)
    for block, key in (("data", "prompts"), ("data", "rollouts"), ("data", "evaluation")):
        if isinstance(raw.get(block), dict) and isinstance(raw[block].get(key), str):
            raw[block][key] = locate(raw[block][key], folder)
    for reward in raw["rewards"] if isinstance(raw.get("rewards"), list) else []:
        if isinstance(reward, dict) and isinstance(reward.get("name"), str) and set(reward["name"]) & {":", "/"}:
            reward["name"] = locate(reward["name"].rstrip("/"), folder)
    raw["objective"] = _resolve_objective(raw.get("objective") or {})
    for objective in raw["objective"].values():
        _fill_recipe(raw, objective)
        for key in ("loss", "method", "beside"):
            if isinstance(objective.get(key), str) and ":" in objective[key]:
                objective[key] = locate(objective[key], folder)
    _check_exam(raw, folder)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_one_line(error)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def apply_override(raw: dict, override: str) -> None:
    """Set one key of a recipe's dictionary from `a.b=value`."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override}: an override is written a.b=value")
    *parents, last = key.split(".")
    at: Any = raw
    try:
        for part in parents:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        at[int(last) if isinstance(at, list) else last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"{key}: no such place in the recipe to override ({error})") from error


def locate(value: str, folder: Path) -> str:
    """A path relative to the recipe's folder or to the working directory, made absolute; anything else unchanged."""
    path, separator, attribute = value.partition(":")
    for base in (folder, Path.cwd()):
        if path and (base / path).exists():
            return str((base / path).resolve()) + separator + attribute
    return value


def _resolve_policy(raw: dict, folder: Path) -> None:
    policy = raw.get("policy")
    if not isinstance(policy, dict) or not isinstance(policy.get("model"), str):
        return
    policy["model"] = locate(policy["model"], folder)
    environment = policy.get("environment")
    if isinstance(environment, dict) and isinstance(environment.get("name"), str):
        environment["name"] = locate(environment["name"], folder)
    writer = policy.get("writer")
    if isinstance(writer, dict) and isinstance(writer.get("model"), str):
        writer["model"] = locate(writer["model"], folder)
        config = Path(writer["model"]) / "config.json"
        draws = config.is_file() and _named(config, "model_type") in TOKEN_WRITERS
        family = str(writer.setdefault("family", "image_tokens" if draws else "causal_lm"))
        sampling = writer.get("sampling", {})
        if family in SAMPLING and isinstance(sampling, dict):
            writer["sampling"] = _resolve_sampling(sampling, family, "policy.writer.sampling.")
    if "family" not in policy:
        policy["family"] = _family_of(Path(policy["model"]))
    if isinstance(policy.setdefault("sampling", {}), dict):
        _locate_decoder(policy["sampling"], folder)
        for preset in _named_presets(raw.get("objective")):
            _fill_sampling(policy, preset)
    if str(policy["family"]) in SAMPLING and isinstance(policy["sampling"], dict):
        policy["sampling"] = _resolve_sampling(policy["sampling"], policy["family"], "policy.sampling.")


def _locate_decoder(sampling: dict, folder: Path) -> None:
    if isinstance(sampling.get("decoder"), str):
        sampling["decoder"] = locate(sampling["decoder"], folder)


def _named_presets(objective: Any) -> list[str]:
    """The presets of an objective that is not resolved yet: its own, or those of its segments."""
    blocks = [objective, *objective.values()] if isinstance(objective, dict) else []
    return [str(block["preset"]) for block in blocks if isinstance(block, dict) and "preset" in block]


def _fill_sampling(policy: dict, preset: str) -> None:
    """What a preset says about how a family samples; keys of the recipe win."""
    if preset not in SAMPLING_PRESETS:
        return
    families, keys = SAMPLING_PRESETS[preset]
    if policy["family"] not in families:
        raise RecipeError(
            f"objective.preset: {preset} sets {', '.join(keys)} of {' or '.join(families)} policies,"
            f" this is {policy['family']}; use grpo"
        )
    policy["sampling"] = {**keys, **policy["sampling"]}


def _fill_recipe(raw: dict, objective: dict) -> None:
    """What a preset says about the whole recipe; keys of the recipe win."""
    preset = str(objective.get("preset"))
    if preset not in RECIPE_PRESETS or objective.get("old_weights") != PRESETS[preset][1].get("old_weights"):
        return
    keys = dict(RECIPE_PRESETS[preset])
    if isinstance(raw.get("data"), dict) and raw["data"].get("rollouts") is not None:
        del keys["rollout_weights"]  # recorded samples are drawn by no weights
    given = raw.get("snapshots") or {}
    if isinstance(given, dict):
        raw["snapshots"] = {**keys.pop("snapshots"), **given}
    for key, value in keys.items():
        raw.setdefault(key, value)


def _resolve_sampling(raw: dict, family: str, where: str) -> dict:
    _check_keys(raw, SAMPLING[family], where)
    try:
        return SAMPLING[family].model_validate(raw).model_dump()
    except ValidationError as error:
        raise RecipeError(where + _one_line(error)) from error


def _check_exam(raw: dict, folder: Path) -> None:
    """Evaluation's sampling settings are keys of the policy's."""
    policy, exam = raw.get("policy"), raw.get("evaluation")
    if not (isinstance(policy, dict) and isinstance(exam, dict) and isinstance(exam.get("sampling"), dict)):
        return
    _locate_decoder(exam["sampling"], folder)
    if isinstance(policy.get("sampling"), dict) and str(policy.get("family")) in SAMPLING:
        _resolve_sampling(exam_sampling(policy["sampling"], exam["sampling"]), policy["family"], "evaluation.sampling.")


def _family_of(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return (
            "masked_diffusion"
            if _named(folder / "model_index.json", "_class_name") in MASKED_PIPELINES
            else "diffusion"
        )
    if (folder / "config.json").is_file():
        model_type = _named(folder / "config.json", "model_type")
        architectures = _named(folder / "config.json", "architectures") or [""]
        if model_type in MASKED_TEXT_MODELS or str(architectures[0]).endswith(MASKED_TEXT_ENDING):
            return "masked_text"
        return "image_tokens" if model_type in IMAGE_TOKEN_MODELS else "causal_lm"
    if folder.is_absolute() or folder.parts[:1] == (".",):
        raise RecipeError(f"policy.model: {folder} has neither model_index.json (diffusers) nor config.json")
    raise RecipeError(f"policy.model: no folder {folder}; for a hub name, say policy.family: {' or '.join(SAMPLING)}")


def _named(file: Path, key: str) -> Any:
    """A value of a model's JSON file, None if it has none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(key)
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"policy.model: {file} is no JSON object: {error}") from error


def _resolve_objective(raw: Any) -> dict:
    if not isinstance(raw, dict):
        raise RecipeError("objective: a mapping of keys, or of one block a segment, is needed")
    by_segment = bool(raw) and not raw.keys() & set(PARTS) and all(isinstance(part, dict) for part in raw.values())
    resolved = {}
    for name, block in (raw if by_segment else {"all": raw}).items():
        where = f"objective.{name}." if by_segment else "objective."
        _check_keys(block, Objective, where)
        preset = block.get("preset")
        if preset is not None and str(preset) not in PRESETS:
            raise RecipeError(f"{where}preset: no preset {preset!r}{nearest(str(preset), list(PRESETS))}")
        filled = dict(PRESETS[preset][1]) if preset else {}
        for part in PARTS:
            if isinstance(block.get(part), dict):
                block = {**block, part: {**filled.get(part, {}), **block[part]}}
        resolved[name] = {**filled, **block}
    return resolved


def _check_keys(raw: Any, model: type[BaseModel], prefix: str) -> None:
    """Refuse unknown keys with the nearest valid name, before pydantic looks at values."""
    if not isinstance(raw, dict):
        return
    for key, value in raw.items():
        if key not in model.model_fields:
            raise RecipeError(f"{prefix}{key}: unknown key{nearest(str(key), list(model.model_fields))}")
        annotation = model.model_fields[key].annotation
        # A block itself, `Block | None`, `list[Block]`, or `dict[str, Block]`, whose keys are the user's names.
        types = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
        blocks = [one for one in types if issubclass(one, BaseModel)]
        if key == "objective" or len(blocks) != 1:
            continue  # the objective is one block, or one a segment: resolved on its own
        items: dict[str, Any] = {key: value}
        if get_origin(annotation) is dict and isinstance(value, dict):
            items = {f"{key}.{name}": item for name, item in value.items()}
        elif get_origin(annotation) is list and isinstance(value, list):
            items = {f"{key}.{index}": item for index, item in enumerate(value)}
        for where, item in items.items():
            _check_keys(item, blocks[0], f"{prefix}{where}.")


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in _OURS)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = re.sub(r"a valid dictionary or instance of \w+", "a block of keys", message)
    given = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
    return f"{where}: {message}{given}" if where else message

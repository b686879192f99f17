"""Shapes of a model's parameters from its configuration files, with no weights: modules are built on torch's meta
device, which holds no numbers. Of a hub name only the JSON files are downloaded."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from unified_rl.errors import RecipeError
from unified_rl.planning.weights import Shapes
from unified_rl.recipe.policy import PIPELINES, PolicyBlock


class UnknownModelError(RecipeError):
    """A model without configuration files, or of a class that the installed libraries do not have."""


def shapes_from_configs(policy: PolicyBlock) -> dict[str, Shapes]:
    """Parameter shapes of each component that has a configuration ("model" for a transformers model).

    Raises:
        UnknownModelError: if it cannot be told from them.
    """
    folder = config_folder(policy)
    if policy.family not in PIPELINES:
        return {"model": _shapes(folder)}
    return {path.parent.name: _shapes(path.parent) for path in sorted(folder.glob("*/config.json"))}


def config_folder(policy: PolicyBlock) -> Path:
    """Where the configuration files of a policy's model are; of a hub name they are downloaded.

    Raises:
        UnknownModelError: if they cannot be had.
    """
    if Path(policy.model).is_dir():
        return Path(policy.model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(policy.model, revision=policy.revision, allow_patterns=["*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownModelError(f"--gpus: the configuration of {policy.model} cannot be had: {reason}") from error


def _shapes(folder: Path) -> Shapes:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownModelError(f"--gpus: {folder} has no config.json") from error
    with torch.device("meta"):
        module = _from_diffusers(config, folder) if "_class_name" in config else _from_transformers(config, folder)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _from_diffusers(config: dict[str, Any], folder: Path) -> torch.nn.Module:
    return _known("diffusers", config["_class_name"], folder).from_config(config)


def _from_transformers(config: dict[str, Any], folder: Path) -> torch.nn.Module:
    from transformers import AutoConfig

    found = _known("transformers", (config.get("architectures") or ["none"])[0], folder)
    return found(AutoConfig.from_pretrained(folder))


def _known(library: str, name: str, folder: Path) -> Any:
    module = importlib.import_module(library)
    if not hasattr(module, name):
        raise UnknownModelError(f"--gpus: {folder} is of class {name}, which the installed {library} does not have")
    return getattr(module, name)

"""Adapters of a denoiser: diffusers' own way where its class has one, peft's for the others."""

from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn


def add_adapter(module: nn.Module, config: LoraConfig) -> None:
    """Inject adapters into a diffusers model, also into one of the classes that have no adapters of their own."""
    if isinstance(module, PeftAdapterMixin):
        module.add_adapter(config)
    else:
        inject_adapter_in_model(config, module)


def switch_adapters(module: nn.Module, enabled: bool) -> None:
    """Let a diffusers model's adapters act or not."""
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)


def save_adapter(module: nn.Module, directory: Path) -> None:
    """Write a diffusers model's adapters as `pytorch_lora_weights.safetensors`."""
    if isinstance(module, PeftAdapterMixin):
        module.save_lora_adapter(directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(module).items()}
    save_file(weights, directory / LORA_WEIGHT_NAME_SAFE)


def restore_adapter(module: nn.Module, directory: Path) -> None:
    """Load what `save_adapter` wrote."""
    set_peft_model_state_dict(module, load_file(directory / LORA_WEIGHT_NAME_SAFE))

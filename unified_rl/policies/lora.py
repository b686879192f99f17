"""Low-rank adapters through peft, injected into the module in place (Hu et al. 2021, arXiv 2106.09685)."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from unified_rl.errors import RecipeError
from unified_rl.recipe.policy import VISION, Adapter, PolicyBlock

_ATTENTION = re.compile(
    r"(?:^|[._])(?:to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
    r"|q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|qkv|query_key_value|query|key|value|c_attn)$"
)


def make_trained(model: Any, block: PolicyBlock, *, with_reference: bool) -> nn.Module | None:
    """Say which weights of a transformers model are trained, an adapter's or its own, and whether its forward is
    recomputed in the backward.

    Returns:
        A frozen copy of the model as the reference, where it is asked for and switching an adapter off is not enough.

    Raises:
        RecipeError: if the adapter or the train patterns match nothing.
    """
    model.requires_grad_(False).eval()
    reference = None
    if block.adapter.kind == "lora":
        model.add_adapter(lora_config(model, block.adapter, exclude=VISION))
    else:
        reference = copy.deepcopy(model) if with_reference else None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(block.train is not None or VISION.search(name) is None)
    select_trained(model, block.train)
    if block.memory.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return reference


@contextmanager
def reference_of(model: Any, copy_of_it: nn.Module | None, adapter: Adapter) -> Iterator[nn.Module]:
    """What stands in for a trained model as its reference: the frozen copy, or the model itself with its adapter
    switched off.

    Args:
        copy_of_it: what `make_trained` returned.
    """
    if adapter.kind != "lora":
        if copy_of_it is None:
            raise RuntimeError("this policy was built without a reference")
        yield copy_of_it
        return
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


def target_names(module: nn.Module, adapter: Adapter, exclude: re.Pattern[str] | None = None) -> list[str]:
    """Full names of the linear layers of `module` that get adapters; names that `exclude` finds never do.

    Of hybrid models (Falcon-H1, Nemotron-H), auto leaves out the recurrent layers, some of which peft refuses because
    their kernels read the weights past the adapter.

    Raises:
        RecipeError: if nothing matches.
    """
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    if exclude is not None:
        linears = [name for name in linears if not exclude.search(name)]
    if adapter.targets == "auto":
        recurrent = {name for name, part in module.named_modules() if "conv1d" in dict(part.named_children())}
        attention = [name for name in linears if name.rpartition(".")[0] not in recurrent]
        found = [name for name in attention if _ATTENTION.search(name)]
    else:
        found = [name for name in linears if any(name == want or name.endswith(f".{want}") for want in adapter.targets)]
    if not found:
        some = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears})[:12])
        raise RecipeError(f"policy.adapter.targets: no linear layer matches {adapter.targets}; there are: {some}")
    return found


def lora_config(module: nn.Module, adapter: Adapter, exclude: re.Pattern[str] | None = None) -> LoraConfig:
    """The peft configuration for `module`."""
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # used as a factor only
        target_modules=target_names(module, adapter, exclude),
        init_lora_weights="gaussian",
    )


def select_trained(module: nn.Module, patterns: Sequence[str] | None) -> None:
    """Keep `requires_grad` only where a parameter's name matches one of the regular expressions (None: keep all).

    Adapters on a half-precision base are kept in float32, where small updates are not rounded away.

    Raises:
        RecipeError: if nothing is left to train.
    """
    for name, parameter in module.named_parameters():
        if patterns is not None and not any(re.search(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in module.parameters()):
        some = ", ".join(name for name, _ in list(module.named_parameters())[:3])
        raise RecipeError(f"policy.train: {patterns} matches no trainable parameter; names look like {some}")


def restore_model(model: Any, directory: Path, *, adapted: bool) -> None:
    """Load the weights, or those of the adapter, that a transformers model's `save_pretrained` wrote."""
    if adapted:
        set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"))
        return
    saved = type(model).from_pretrained(directory, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())

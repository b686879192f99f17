"""Loading the models behind rewards: from the hub at a pinned revision or from a folder, without running their code."""

from pathlib import Path
from typing import Any


def from_pretrained(
    cls: Any,
    model: str,
    *,
    revision: str | None,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    **keys: Any,
) -> Any:
    """A transformers model in evaluation mode, without gradients.

    Args:
        cls: with `from_pretrained`.
        model: a folder, or a hub name, for which `revision` has to say which commit.
        dtype: name of a torch dtype.
        trust_remote_code: run Python code that comes with the model; only for code that you have read.

    Raises:
        ValueError: for a hub name without revision.
    """
    import torch

    loaded = cls.from_pretrained(
        model,
        revision=pinned(model, revision),
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        **keys,
    )
    return loaded.to(device).eval().requires_grad_(False)


def pinned(model: str, revision: str | None) -> str | None:
    """The revision to ask the hub for.

    Raises:
        ValueError: for a hub name without one, because what it names may change any day.
    """
    if revision is None and not Path(model).is_dir():
        raise ValueError(f"{model} is taken from the hub: pin it with the argument revision (a commit's hash)")
    return revision


def tensors_of(file: str) -> dict[str, Any]:
    """The tensors of a .safetensors file, or of a .pt or .pth file read without unpickling code."""
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    found = torch.load(file, map_location="cpu", weights_only=True)
    return found.get("state_dict", found)


def hub_file(model: str, name: str, revision: str | None) -> str:
    """The path of one file of a folder or hub repository."""
    if Path(model).is_dir():
        return str(Path(model) / name)
    from huggingface_hub import hf_hub_download

    return hf_hub_download(model, name, revision=pinned(model, revision))

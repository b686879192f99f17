"""Loading the models behind rewards: from the hub at a pinned revision or from a folder, without running their code."""

from pathlib import Path
from typing import Any

PINNED = {
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "google/siglip-so400m-patch14-384": "9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "THUDM/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
}
"""The commits that rewards take their usual models at, where a recipe names none."""


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
    """The revision to ask the hub for; None for a folder.

    Raises:
        ValueError: for a hub name without one that is not in PINNED, because what it names may change any day.
    """
    if revision is not None or Path(model).is_dir():
        return revision
    if model not in PINNED:
        raise ValueError(f"{model} is taken from the hub: pin it with the argument revision (a commit's hash)")
    return PINNED[model]


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

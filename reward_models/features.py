"""Frozen features of samples, which small heads are fitted on: by a CLIP-like model, a picture encoder, a sentence
encoder, or a network that comes inside a wheel.

| encoder | of | features |
| --- | --- | --- |
| CLIP, SigLIP (folder or hub name) | pictures and their prompts | picture, prompt, their product |
| DINOv2 and other picture encoders | pictures | pooled output |
| BERT-like sentence encoders | texts and their prompts | text, prompt, their product |
| `efficientnet-lite0` | pictures | 1280, from inside a wheel |
| `minilm` | texts and their prompts | all-MiniLM-L6-v2, from inside a wheel |

Encoders of transformers give vectors of unit length. The product of two of them, entry by entry, is what a linear head
needs to tell how well they match: its plain sum is their cosine.
"""

from collections.abc import Sequence
from typing import Any, Literal

from reward_models.loading import pinned
from reward_models.text_rules import asked_for, reply

WHEELS = ("efficientnet-lite0", "minilm")
"""Encoders that need no download."""
Kind = Literal["both", "pictures", "texts"]


class Encoder:
    """Features [B, D] of samples, float32."""

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        *,
        use_prompt: bool = True,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        """Args:
        name: one of WHEELS, a folder, or a hub name, which needs a `revision`.
        use_prompt: look at the prompt too, where the encoder can read.

        Raises:
            ValueError: for a model that encodes neither pictures nor texts.
        """
        self.name, self.device, self.batch_size = name, device, batch_size
        self.kind = kind_of(name, revision)
        self.use_prompt = use_prompt and self.kind != "pictures"
        self._model = self._load(revision, dtype)

    def _load(self, revision: str | None, dtype: str) -> Any:
        keys = {"device": self.device, "dtype": dtype, "batch_size": self.batch_size}
        if self.name == "efficientnet-lite0":
            from reward_models.classes import network

            return network("lite0", self.device)
        if self.kind == "texts":
            from reward_models.meaning import SameMeaning

            return SameMeaning(None if self.name == "minilm" else self.name, revision, **keys)  # type: ignore[arg-type]
        from reward_models.dual_encoder import DualEncoder, PictureEncoder

        encoder = DualEncoder if self.kind == "both" else PictureEncoder
        return encoder(self.name, revision, **keys)  # type: ignore[arg-type]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        """[B, D].

        Args:
            prompts: texts or chat messages.
            completions: pictures, or texts; or pictures as one tensor [B, 3, H, W] in [0, 1], whose gradients are kept.
        """
        import torch

        samples = self._pictures(completions) if self.kind != "texts" else self._texts([reply(c) for c in completions])
        if not self.use_prompt:
            return samples
        asked = self._texts([asked_for(prompt) for prompt in prompts])
        return torch.cat([samples, asked, samples * asked], dim=1)

    def _pictures(self, pictures: Any) -> Any:
        if self.name != "efficientnet-lite0":
            return self._model.pictures(pictures)
        import numpy as np
        import torch

        from reward_models.classes import pixels_for

        if isinstance(pictures, torch.Tensor):
            maps = self._model.extract_features(pixels_for("lite0", pictures.to(self.device)))
            return maps.mean((2, 3)).float()
        found = []
        for start in range(0, len(pictures), self.batch_size):
            arrays = [np.asarray(picture.convert("RGB")) for picture in pictures[start : start + self.batch_size]]
            tensors = [torch.tensor(array, device=self.device).permute(2, 0, 1)[None] / 255 for array in arrays]
            with torch.no_grad():
                maps = self._model.extract_features(torch.cat([pixels_for("lite0", each) for each in tensors]))
            found.append(maps.mean((2, 3)).float())
        return torch.cat(found)

    def _texts(self, texts: Sequence[str]) -> Any:
        return self._model.embed(texts) if self.kind == "texts" else self._model.texts(texts)


def kind_of(name: str, revision: str | None) -> Kind:
    """What an encoder reads.

    Raises:
        ValueError: for a model that encodes neither pictures nor texts.
    """
    if name in WHEELS:
        return "pictures" if name == "efficientnet-lite0" else "texts"
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=pinned(name, revision)).to_dict()
    if "text_config" in config and "vision_config" in config:
        return "both"
    if "patch_size" in config or "num_channels" in config:
        return "pictures"
    if "vocab_size" in config:
        return "texts"
    raise ValueError(f"{name} ({config.get('model_type')}) encodes neither pictures nor texts")


def apply_head(features: Any, tensors: dict[str, Any]) -> Any:
    """The scores [B] of a head: features are standardised, then go through its layers with SiLU between them.

    Args:
        features: [B, D].
        tensors: `mean` [D], `std` [D], `layers.<n>.weight` [out, in], `layers.<n>.bias` [out]; the last out is 1.
    """
    import torch

    hidden = (features - tensors["mean"]) / tensors["std"]
    numbers = sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".weight"))
    for number in numbers:
        hidden = hidden @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
        if number != numbers[-1]:
            hidden = torch.nn.functional.silu(hidden)
    return hidden[:, 0]

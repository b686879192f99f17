"""A reward that `unified-rl train-reward` fitted: a head on frozen features, saved as `reward.json` (what it is made
of, how it was measured) and `head.safetensors`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.features import Encoder, apply_head

FORMAT = 1
DESCRIPTION, HEAD = "reward.json", "head.safetensors"


class LearnedReward:
    """The head's score. Fitted on pairs, the difference of two scores of a prompt is the log odds that the first is
    preferred (Bradley-Terry); fitted on scores, it is in their unit. Licence: that of the encoder and of your data."""

    def __init__(
        self, folder: str, *, device: str = "cpu", dtype: str | None = None, batch_size: int | None = None
    ) -> None:
        """Args:
        folder: that `train-reward` wrote.
        dtype, batch_size: of the encoder; None: as in fitting.

        Raises:
            ValueError: if the folder is of another format, or its encoder has changed.
        """
        from safetensors.torch import load_file

        about = json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"{folder}: format {about['format']}, this version reads {FORMAT}")
        keys = about["encoder"]
        keys = {**keys, "dtype": dtype or keys["dtype"], "batch_size": batch_size or keys["batch_size"]}
        self.encoder = Encoder(**keys, device=device)
        self.tensors = {name: tensor.to(device) for name, tensor in load_file(Path(folder) / HEAD).items()}
        self.folder = folder

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        return self._scores(prompts, completions).tolist()

    def with_gradient(self, prompts: Sequence[Any], completions: Any, **_: Any) -> Any:
        """[B] of pictures [B, 3, H, W] in [0, 1], differentiable."""
        return self._scores(prompts, completions)

    def _scores(self, prompts: Sequence[Any], completions: Any) -> Any:
        features = self.encoder(prompts, completions)
        if features.shape[1] != len(self.tensors["mean"]):
            raise ValueError(
                f"{self.folder}: {self.encoder.name} gives {features.shape[1]} features, the head was fitted on "
                f"{len(self.tensors['mean'])}"
            )
        return apply_head(features, self.tensors)

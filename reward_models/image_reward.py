"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP reads the prompt while it looks at the picture, and a head tells
how people would like it. Weights: THUDM/ImageReward (Apache-2.0), file `ImageReward.pt`, read without unpickling code.

Range: about -2 to 2, of mean 0 and deviation 1 over its authors' test pictures.

The published weights have the names of Salesforce's BLIP; they are put into transformers' classes of that architecture.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reward_models import tensor_pictures
from reward_models.dual_encoder import batches
from reward_models.loading import hub_file, pinned, tensors_of
from reward_models.text_rules import asked_for

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' test set; published with the weights."""
COLOUR_MEAN, COLOUR_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_TOKENS = 35
HEAD_WIDTH = 64
"""Of an attention head of BLIP's picture encoder, of every published size."""
_NAMES = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.text_encoder.", "text."),
)
_PARTS = {
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".proj.": ".projection.",
}
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id"),
)
"""Of `med_config.json`."""


class ImageReward:
    """The standardised score of each picture for its prompt."""

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        revision: str | None = None,
        *,
        weights: str = "ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        tokenizer_revision: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        """Args:
        model: folder or hub name with `weights` and the text encoder's `med_config.json`.
        tokenizer: of BERT; the two tokens that BLIP adds to it are not needed here.

        Raises:
            ValueError: if the weights do not fit the architecture.
        """
        import torch
        from transformers import AutoTokenizer

        state = tensors_of(hub_file(model, weights, revision))
        config = json.loads(Path(hub_file(model, "med_config.json", revision)).read_text(encoding="utf-8"))
        renamed = from_blip(state)
        parts = {"vision": _vision(renamed), "text": _text(renamed, config)}
        for part, module in parts.items():
            own = {name.removeprefix(f"{part}."): tensor for name, tensor in renamed.items() if name.startswith(part)}
            missing, unexpected = module.load_state_dict(own, strict=False)
            wrong = [name for name in [*missing, *unexpected] if not name.endswith("position_ids")]
            if wrong:
                raise ValueError(f"{weights} does not fit BLIP's {part} encoder: {', '.join(wrong[:3])}")
            module.to(device, getattr(torch, dtype)).eval().requires_grad_(False)
        self.vision, self.text = parts["vision"], parts["text"]
        numbers = sorted(
            int(name.split(".")[2]) for name in state if name.startswith("mlp.") and name.endswith("weight")
        )
        self.head = [
            tuple(state[f"mlp.layers.{number}.{kind}"].float().to(device) for kind in ("weight", "bias"))
            for number in numbers
        ]
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, revision=pinned(tokenizer, tokenizer_revision))
        self.side: int = self.vision.config.image_size
        self.device, self.dtype, self.batch_size = device, getattr(torch, dtype), batch_size

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Image.Image], **_: Any) -> list[float]:
        import torch

        scores: list[float] = []
        for part in batches(len(prompts), self.batch_size):
            pixels = torch.stack([torch.from_numpy(prepared(picture, self.side)) for picture in completions[part]])
            with torch.no_grad():
                scores += self._scores(prompts[part], pixels).tolist()
        return scores

    def with_gradient(self, prompts: Sequence[Any], completions: Any, **_: Any) -> Any:
        """[B] of pictures [B, 3, H, W] in [0, 1], differentiable."""
        from types import SimpleNamespace

        as_processor = SimpleNamespace(
            **{"do_resize": True, "size": {"shortest_edge": self.side}, "resample": Image.Resampling.BICUBIC},
            **{"do_center_crop": True, "crop_size": {"height": self.side, "width": self.side}},
            **{"do_normalize": True, "image_mean": COLOUR_MEAN, "image_std": COLOUR_STD},
        )
        return self._scores(prompts, tensor_pictures.prepared(as_processor, completions))

    def _scores(self, prompts: Sequence[Any], pixels: Any) -> Any:
        """[B] of prepared pictures [B, 3, side, side]."""
        import torch

        texts = [asked_for(prompt) for prompt in prompts]
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        seen = self.vision(pixels.to(self.device, self.dtype)).last_hidden_state
        states = self.text(
            input_ids=read.input_ids.to(self.device),
            attention_mask=read.attention_mask.to(self.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        found = states[:, 0].float()
        for weight, bias in self.head:  # no activations between them: so the head was published
            found = found @ weight.T + bias
        return (found[:, 0] - MEAN) / STD


def prepared(picture: Image.Image, side: int) -> np.ndarray:
    """[3, side, side] float32: the shorter side scaled to `side` (bicubic), its centre, standardised colours."""
    width, height = picture.size
    short = min(width, height)
    size = (side * width // short, side * height // short)
    scaled = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    pixels = np.asarray(scaled.crop((left, top, left + side, top + side)), dtype=np.float32) / 255.0
    return np.ascontiguousarray(((pixels - COLOUR_MEAN) / COLOUR_STD).transpose(2, 0, 1), dtype=np.float32)


def from_blip(state: dict[str, Any]) -> dict[str, Any]:
    """The encoders' tensors under transformers' names, with `vision.` and `text.` before them; others left out."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in _NAMES:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                for before, after in _PARTS.items() if new == "vision.encoder.layers." else ():
                    name = name.replace(before, after)
                renamed[name] = tensor
                break
    return renamed


def _vision(state: dict[str, Any]) -> Any:
    """BLIP's picture encoder of the size that the weights have."""
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
    places = state["vision.embeddings.position_embedding"].shape[1] - 1
    return BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=1 + max(int(name.split(".")[3]) for name in state if ".layers." in name),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=patch * round(places**0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )


def _text(state: dict[str, Any], config: dict[str, Any]) -> Any:
    """BLIP's text encoder as `med_config.json` describes it, which looks at the picture in every layer."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    width = state["text.encoder.layer.0.crossattention.self.key.weight"].shape[1]
    keys = {name: config[name] for name in _TEXT_KEYS if name in config}
    return BlipTextModel(BlipTextConfig(**keys, encoder_hidden_size=width), add_pooling_layer=False)

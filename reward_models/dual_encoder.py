"""CLIP and SigLIP scores: how near a picture and a text, or two pictures, lie in the space of a dual encoder.

One class serves all of them; PickScore and HPS are CLIP models fine-tuned on human choices, so only weights and scale
differ. Defaults name the published weights; a folder works as well.

| reward | weights | range | licence of the weights |
| --- | --- | --- | --- |
| `ClipScore` | openai/clip-vit-large-patch14 | cosine x 2.5, cut at 0 (Hessel et al., arXiv:2104.08718, eq. 1) | MIT |
| `PickScore` | yuvalkirstain/PickScore_v1 | cosine x learned scale, about 15 to 26 (arXiv:2305.01569) | MIT |
| `Hps` | HPSv2 or v2.1 | cosine, about 0.2 to 0.35 (Wu et al., arXiv:2306.09341) | Apache-2.0 |
| `SiglipScore` | google/siglip-so400m-patch14-384 | probability of a match (arXiv:2303.15343) | Apache-2.0 |
| `ImageSimilarity` | any of these, or DINOv2 | cosine of picture and condition picture, -1 to 1 | of the weights |
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from reward_models.loading import from_pretrained, hub_file, pinned, tensors_of
from reward_models.tensor_pictures import prepared
from reward_models.text_rules import asked_for


def batches(num: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, num, size)]


class DualEncoder:
    """The two embeddings of a CLIP-like model, each of unit length."""

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        *,
        processor: str | None = None,
        processor_revision: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> None:
        """Args:
        model: folder or hub name.
        revision: commit of the hub's repository.
        processor: where the tokenizer and picture processor lie, if not beside the model.
        dtype: of the weights; scores are float32.
        batch_size: pictures of one forward.
        """
        from transformers import AutoModel, AutoProcessor

        self.device, self.batch_size = device, batch_size
        self.model = from_pretrained(
            AutoModel,
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        source, commit = (processor, processor_revision) if processor else (model, revision)
        self.processor = AutoProcessor.from_pretrained(
            source, revision=pinned(source, commit), trust_remote_code=trust_remote_code
        )

    def pictures(self, pictures: Any) -> Any:
        """[B, D] float32; of a tensor [B, 3, H, W] in [0, 1], with its gradients."""
        import torch

        if isinstance(pictures, torch.Tensor):
            pixels = prepared(_picture_processor(self.processor), pictures.to(self.device))
            return _unit(self._features(pixels.to(self.model.dtype)))
        found = []
        with torch.no_grad():
            for part in batches(len(pictures), self.batch_size):
                images = [picture.convert("RGB") for picture in pictures[part]]
                pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
                found.append(_unit(self._features(pixels.to(self.device, self.model.dtype))))
        return torch.cat(found)

    def _features(self, pixels: Any) -> Any:
        return _embedding(self.model.get_image_features(pixel_values=pixels))

    def texts(self, texts: Sequence[str]) -> Any:
        """[B, D] float32; texts that are too long are cut."""
        import torch

        config, siglip = self.model.config, "siglip" in self.model.config.model_type
        keys = {"max_length": config.text_config.max_position_embeddings, "truncation": True, "return_tensors": "pt"}
        inputs = self.processor(text=list(texts), padding="max_length" if siglip else True, **keys).to(self.device)
        if siglip:  # was trained to see its padding
            inputs = {"input_ids": inputs["input_ids"]}
        with torch.no_grad():
            return _unit(_embedding(self.model.get_text_features(**inputs)))

    def cosines(self, prompts: Sequence[Any], pictures: Any) -> Any:
        """[B] float32: of each picture with its own prompt; see `pictures`."""
        return (self.pictures(pictures) * self.texts([asked_for(prompt) for prompt in prompts])).sum(-1)


def _picture_processor(processor: Any) -> Any:
    """The part for pictures of a processor that reads texts too."""
    return processor.image_processor if "image_processor" in vars(processor) else processor


def _embedding(found: Any) -> Any:
    """The features themselves, which newer versions of transformers return inside an output object."""
    import torch

    return found if isinstance(found, torch.Tensor) else found.pooler_output


def _unit(features: Any) -> Any:
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


class PictureScore(DualEncoder):
    """A score of pictures that methods with `reward_gradient` can follow."""

    def scores(self, prompts: Sequence[Any], pictures: Any) -> Any:
        """[B] of pictures in a list, or of a tensor [B, 3, H, W] in [0, 1] with its gradients."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Image.Image], **_: Any) -> list[float]:
        return self.scores(prompts, completions).tolist()

    def with_gradient(self, prompts: Sequence[Any], completions: Any, **_: Any) -> Any:
        """[B] of pictures [B, 3, H, W] in [0, 1]."""
        return self.scores(prompts, completions)


class ClipScore(PictureScore):
    """2.5 max(0, cosine)."""

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        *,
        prefix: str = "",
        **keys: Any,
    ) -> None:
        """Args:
        prefix: put before each prompt. The paper judges captions with "A photo depicts ", and ViT-B/32.
        """
        super().__init__(model, revision, **keys)
        self.prefix = prefix

    def scores(self, prompts: Sequence[Any], pictures: Any) -> Any:
        texts = [self.prefix + asked_for(prompt) for prompt in prompts]
        return 2.5 * self.cosines(texts, pictures).clamp(min=0.0)


class PickScore(PictureScore):
    """Learned scale x cosine. Its processor is that of the CLIP model which it was fine-tuned from."""

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **keys: Any,
    ) -> None:
        super().__init__(model, revision, processor=processor, **keys)

    def scores(self, prompts: Sequence[Any], pictures: Any) -> Any:
        return self.model.logit_scale.exp().float() * self.cosines(prompts, pictures)


class Hps(PictureScore):
    """Cosine of the CLIP model that Human Preference Score v2 and v2.1 fine-tuned.

    Its weights are published in open_clip's format: `weights` names the file (`HPS_v2.1_compressed.pt` of xswu/HPSv2),
    `model` the CLIP model of the same architecture that they are put into.
    """

    def __init__(
        self,
        model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        *,
        weights: str = "HPS_v2.1_compressed.pt",
        weights_from: str = "xswu/HPSv2",
        weights_revision: str | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(model, revision, **keys)
        state = from_open_clip(tensors_of(hub_file(weights_from, weights, weights_revision)))
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        wrong = [name for name in missing if not name.endswith("position_ids")] + unexpected
        if wrong:
            raise ValueError(f"{weights} does not fit {model}: {', '.join(wrong[:3])}")

    def pictures(self, pictures: Any) -> Any:
        """As published: the longer side is scaled to the model's, the rest is black."""
        import torch

        side = self.model.config.vision_config.image_size
        if isinstance(pictures, torch.Tensor):
            return super().pictures(fitted_tensor(pictures, side))
        return super().pictures([fitted(picture, side) for picture in pictures])

    def scores(self, prompts: Sequence[Any], pictures: Any) -> Any:
        return self.cosines(prompts, pictures)


def _fit(width: int, height: int, side: int) -> tuple[int, int]:
    scale = side / max(width, height)
    return round(width * scale), round(height * scale)


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture in the middle of a black square."""
    width, height = _fit(picture.width, picture.height, side)
    square = Image.new("RGB", (side, side))
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    square.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return square


def fitted_tensor(pictures: Any, side: int) -> Any:
    """The same of pictures [B, 3, H, W] in [0, 1], with gradients: [B, 3, side, side]."""
    import torch

    width, height = _fit(pictures.shape[-1], pictures.shape[-2], side)
    scaled = torch.nn.functional.interpolate(pictures, size=(height, width), mode="bicubic", antialias=True)
    left, top = (side - width) // 2, (side - height) // 2
    return torch.nn.functional.pad(scaled.clamp(0.0, 1.0), (left, side - width - left, top, side - height - top))


class SiglipScore(PictureScore):
    """sigmoid(scale x cosine + bias)."""

    def __init__(
        self, model: str = "google/siglip-so400m-patch14-384", revision: str | None = None, **keys: Any
    ) -> None:
        super().__init__(model, revision, **keys)

    def scores(self, prompts: Sequence[Any], pictures: Any) -> Any:
        scale, bias = self.model.logit_scale.exp().float(), self.model.logit_bias.float()
        return (scale * self.cosines(prompts, pictures) + bias).sigmoid()


class PictureEncoder(DualEncoder):
    """The picture embeddings of these models, or of one without a text tower (DINOv2), read at its pooled output."""

    def _features(self, pixels: Any) -> Any:
        has_texts = "text_config" in self.model.config.to_dict()
        return super()._features(pixels) if has_texts else self.model(pixels).pooler_output


class ImageSimilarity(PictureEncoder):
    """Cosine between each picture and its first condition picture, for editing."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Image.Image], *, images: Sequence[Any], **_: Any
    ) -> list[float | None]:
        rows = [row for row, condition in enumerate(images) if condition]
        if not rows:
            return [None] * len(completions)
        made = self.pictures([completions[row] for row in rows])
        given = self.pictures([images[row][0] for row in rows])
        scores: list[float | None] = [None] * len(completions)
        for row, value in zip(rows, (made * given).sum(-1).tolist(), strict=True):
            scores[row] = value
        return scores


_SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_PREFIXES = {
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_PARTS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def from_open_clip(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of open_clip's CLIP under the names of transformers' `CLIPModel`.

    open_clip keeps query, key and value in one matrix and its two projections transposed.
    """
    renamed: dict[str, Any] = {}
    for name, tensor in state.items():
        if name in _SINGLE:
            renamed[_SINGLE[name]] = tensor
        elif name in ("visual.proj", "text_projection"):
            renamed["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = tensor.T
        else:
            for old, new in _PREFIXES.items():
                if name.startswith(old):
                    renamed |= _layer(new + name.removeprefix(old), tensor)
                    break
    return renamed


def _layer(name: str, tensor: Any) -> dict[str, Any]:
    for old, new in _PARTS.items():
        name = name.replace(old, new)
    head, found, kind = name.partition(".attn.in_proj_")
    if not found:
        return {name: tensor}
    return {
        f"{head}.self_attn.{part}_proj.{kind}": chunk
        for part, chunk in zip(("q", "k", "v"), tensor.chunk(3), strict=True)
    }

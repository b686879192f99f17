"""How each family of transformers draws with tokens: where a picture starts, which head draws its tokens, how they are
read back in, and which decoder makes pixels of them. All that the image-token policy knows of a model.

Chameleon is not among them: transformers keeps its encoder only, so its tokens cannot be made visible.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from unified_rl.errors import RecipeError, nearest
from unified_rl.recipe.policy import ImageTokenSampling

DRAWN = -1
"""In a layout: a token that is drawn, in contrast to one that always stands there."""


class ImageFamily(Protocol):
    """One architecture. Codes are numbers of the VQ codebook, ids those of the language model's vocabulary."""

    layout: Sequence[int]
    """What follows a prompt: `DRAWN`, or the id of a token that is always there (the end of a row of tokens). It ends
    with the last drawn token."""
    unused: tuple[str, ...]
    """Prefixes of the parameters that drawing never uses; they are not trained."""
    vocabulary: Sequence[int]
    """Ids of image tokens, if they are part of the language model's vocabulary: text never holds them."""

    def prompt(self, text: str, *, special: bool) -> list[int]:
        """Ids of a prompt up to where the picture starts. `special`: add the tokenizer's special tokens."""
        ...

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's counterpart without a text, as the family guides by default."""
        ...

    def backbone(self, model: Any) -> Any:
        """The language model that turns embeddings into hidden states."""
        ...

    def embed(self, model: Any, codes: Tensor) -> Tensor:
        """[..., D] what the language model reads for drawn codes."""
        ...

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """[..., num_codes] of the image head."""
        ...

    def pictures(self, model: Any, codes: Tensor) -> list[Image.Image]:
        """Pictures of codes [B, S] by the model's VQ decoder."""
        ...


class JanusFamily:
    """Janus and Janus-Pro: codes have embeddings and a head of their own."""

    unused = ("model.vision_model.", "model.aligner.", "model.vqmodel.")
    vocabulary: Sequence[int] = ()

    def __init__(self, model: Any, processor: Any, settings: ImageTokenSampling) -> None:
        if settings.processor:
            raise RecipeError("policy.sampling.processor: Janus's pictures have one size, it takes no arguments")
        self.layout = [DRAWN] * model.config.vision_config.num_image_tokens
        self._tokenizer, self._images = processor.tokenizer, processor.image_processor
        self._start = self._tokenizer.convert_tokens_to_ids(processor.image_start_token)

    def prompt(self, text: str, *, special: bool) -> list[int]:
        return [*self._tokenizer(text, add_special_tokens=special)["input_ids"], self._start]

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        kept = {self._tokenizer.bos_token_id, self._start}
        return [token if token in kept else self._tokenizer.pad_token_id for token in prompt]

    def backbone(self, model: Any) -> Any:
        return model.model.language_model

    def embed(self, model: Any, codes: Tensor) -> Tensor:
        return model.prepare_embeddings_for_image_generation(codes)

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        return model.model.generation_head(hidden)

    def pictures(self, model: Any, codes: Tensor) -> list[Image.Image]:
        return to_pictures(model.decode_image_tokens(codes), self._images)


class Emu3Family:
    """Emu3: codes are words of the vocabulary; every row of a picture ends with a token of its own."""

    unused = ("model.vqmodel.",)

    def __init__(self, model: Any, processor: Any, settings: ImageTokenSampling) -> None:
        self._processor, self._arguments = processor, dict(settings.processor)
        mapping = model.model.vocabulary_mapping
        sizes = self._processed("", special=True)["image_sizes"]
        self._height, self._width = (int(side) for side in sizes[0])
        row = [*[DRAWN] * self._width, mapping.eol_token_id]
        self.layout = (row * self._height)[:-1]
        self.vocabulary = mapping.img2bpe_mapping_tensor.tolist()
        first = self.vocabulary[0]
        self._contiguous = self.vocabulary == list(range(first, first + len(self.vocabulary)))

    def _processed(self, text: str, *, special: bool) -> Any:
        return self._processor(
            text=[text], return_for_image_generation=True, add_special_tokens=special, **self._arguments
        )

    def prompt(self, text: str, *, special: bool) -> list[int]:
        return list(self._processed(text, special=special)["input_ids"][0])

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        return self.prompt("", special=True)

    def backbone(self, model: Any) -> Any:
        return model.model.text_model

    def embed(self, model: Any, codes: Tensor) -> Tensor:
        return model.get_input_embeddings()(torch.tensor(self.vocabulary, device=codes.device)[codes])

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        weight = model.lm_head.weight
        if not weight.numel():  # sharded (ZeRO-3): only the whole layer's own forward gathers it
            return model.lm_head(hidden)[..., self.vocabulary]
        first = self.vocabulary[0]
        rows = weight[first : first + len(self.vocabulary)] if self._contiguous else weight[self.vocabulary]
        return linear(hidden, rows)

    def pictures(self, model: Any, codes: Tensor) -> list[Image.Image]:
        pixels = model.model.vqmodel.decode(codes.view(-1, self._height, self._width))
        return to_pictures(pixels.permute(0, 2, 3, 1), self._processor.image_processor)


FAMILIES: dict[str, Any] = {"janus": JanusFamily, "emu3": Emu3Family}
"""By the `model_type` of a model's configuration."""


def family_of(model: Any, processor: Any, settings: ImageTokenSampling) -> ImageFamily:
    """The family of a loaded model.

    Raises:
        RecipeError: if it is none that draws.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        reason = "has no decoder in transformers" if kind == "chameleon" else "does not draw with tokens"
        raise RecipeError(f"policy.model: {kind} {reason}{nearest(kind, list(FAMILIES))}")
    return FAMILIES[kind](model, processor, settings)


def to_pictures(pixels: Tensor, image_processor: Any) -> list[Image.Image]:
    """What an image processor's `postprocess` makes of normalised pixels [B, H, W, 3]: the inverse of its scaling.

    Not called itself: without torchvision, transformers' processors do not take every layout.
    """
    mean, std = (torch.tensor(values) for values in (image_processor.image_mean, image_processor.image_std))
    colours = (pixels.detach().float().cpu() * std + mean).mul(255).clamp(0, 255).byte()
    return [Image.fromarray(np.ascontiguousarray(row)) for row in colours.numpy()]

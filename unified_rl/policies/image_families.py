"""How each family of transformers draws with tokens: where a picture starts, which head draws its tokens, how they are
read back in, and which decoder makes pixels of them. All that the image-token policy knows of a model.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear, normalize

from unified_rl.errors import RecipeError, nearest
from unified_rl.recipe.policy import ImageTokenSampling

DRAWN = -1
"""In a layout: a token that is drawn, in contrast to one that always stands there."""


class ImageFamily(Protocol):
    """One architecture. Codes are numbers of the VQ codebook, ids those of the language model's vocabulary."""

    layout: Sequence[int]
    """What follows a prompt: `DRAWN`, or the id of a token that is always there (the end of a row of tokens). It ends
    with the last drawn token."""
    offsets: Tensor
    """Positions of the layout's tokens after the prompt, [layout], or [axes, layout] where rotary positions have
    several axes; 0 is the first one after the prompt."""
    grid: tuple[int, int]
    """Rows and columns of a picture's tokens, which are the last that are drawn."""
    decodes: bool
    """Whether transformers has a decoder of the tokens."""
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
        """Pictures of a picture's codes [B, rows * columns] by the model's VQ decoder, if it `decodes`."""
        ...


@runtime_checkable
class PipelineFamily(ImageFamily, Protocol):
    """One whose pictures a diffusers pipeline makes."""

    argument: str
    """Of the pipeline's call, which takes the tokens."""
    pixels: tuple[int, int]
    """Height and width of the pictures."""

    def handed_on(self, codes: Tensor) -> Tensor:
        """[B, tokens] the argument's value for a picture's codes [B, rows * columns]."""
        ...


class JanusFamily:
    """Janus and Janus-Pro: codes have embeddings and a head of their own."""

    decodes = True
    unused = ("model.vision_model.", "model.aligner.", "model.vqmodel.")
    vocabulary: Sequence[int] = ()

    def __init__(self, model: Any, processor: Any, settings: ImageTokenSampling) -> None:
        if settings.processor:
            raise RecipeError("policy.sampling.processor: Janus's pictures have one size, it takes no arguments")
        self.layout = [DRAWN] * model.config.vision_config.num_image_tokens
        self.offsets = torch.arange(len(self.layout))
        rows, columns = model.model.vqmodel.quantize.quant_state_dims
        self.grid = (rows, columns)
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
        # In steps, since the model's own `decode` asks for the codebook's width, which sharded weights (ZeRO-3) lack.
        vq = model.model.vqmodel
        entries = normalize(vq.quantize.embedding(codes), dim=-1)
        grid = entries.unflatten(1, self.grid).permute(0, 3, 1, 2).contiguous()
        return to_pictures(vq.decoder(vq.post_quant_conv(grid)).permute(0, 2, 3, 1), self._images)


class _Words:
    """Codes that are words of the vocabulary."""

    decodes = True

    def __init__(self, vocabulary: Sequence[int]) -> None:
        """
        Args:
            vocabulary: id of each code.
        """
        self.vocabulary = vocabulary
        self._ids = torch.tensor(vocabulary)
        self._contiguous = [*vocabulary] == [*range(vocabulary[0], vocabulary[0] + len(vocabulary))]

    def embed(self, model: Any, codes: Tensor) -> Tensor:
        return model.get_input_embeddings()(self._ids.to(codes.device)[codes])

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        weight = model.lm_head.weight
        if not weight.numel():  # sharded (ZeRO-3): only the whole layer's own forward gathers it
            return model.lm_head(hidden)[..., self.vocabulary]
        first = self.vocabulary[0]
        rows = weight[first : first + len(self.vocabulary)] if self._contiguous else weight[self.vocabulary]
        return linear(hidden, rows)


class Emu3Family(_Words):
    """Emu3: every row of a picture ends with a token of its own."""

    unused = ("model.vqmodel.",)

    def __init__(self, model: Any, processor: Any, settings: ImageTokenSampling) -> None:
        self._processor, self._arguments = processor, dict(settings.processor)
        mapping = model.model.vocabulary_mapping
        super().__init__(mapping.img2bpe_mapping_tensor.tolist())
        sizes = self._processed("", special=True)["image_sizes"]
        self.grid = (int(sizes[0][0]), int(sizes[0][1]))
        row = [*[DRAWN] * self.grid[1], mapping.eol_token_id]
        self.layout = (row * self.grid[0])[:-1]
        self.offsets = torch.arange(len(self.layout))

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

    def pictures(self, model: Any, codes: Tensor) -> list[Image.Image]:
        pixels = model.model.vqmodel.decode(codes.view(-1, *self.grid))
        return to_pictures(pixels.permute(0, 2, 3, 1), self._processor.image_processor)


class ChameleonFamily(_Words):
    """Chameleon and Anole: a picture has one size. transformers has their encoder only, so the recipe names a decoder;
    and the model's own forward forbids the tokens, which is why only its layers and rows of its head are called."""

    unused = ("model.vqmodel.",)
    decodes = False

    def __init__(self, model: Any, processor: Any, settings: ImageTokenSampling) -> None:
        if settings.processor:
            raise RecipeError("policy.sampling.processor: Chameleon's pictures have one size, it takes no arguments")
        super().__init__(model.model.vocabulary_mapping.img2bpe_mapping_tensor.tolist())
        vq = model.config.vq_config
        side = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)
        self.grid = (side, side)
        self.layout = [DRAWN] * side**2
        self.offsets = torch.arange(len(self.layout))
        self._tokenizer, self._start = processor.tokenizer, processor.image_start_token_id

    def prompt(self, text: str, *, special: bool) -> list[int]:
        return [*self._tokenizer(text, add_special_tokens=special)["input_ids"], self._start]

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        return self.prompt("", special=True)

    def backbone(self, model: Any) -> Any:
        return model.model

    def pictures(self, model: Any, codes: Tensor) -> list[Image.Image]:
        raise AssertionError("the recipe's decoder makes the pictures")


class GlmImageFamily(_Words):
    """GLM-Image's language model: it draws a small grid of tokens, then the large one, of which its pipeline's denoiser
    makes the picture. Rotary positions have three axes, and each grid begins where the longer side of the last ends."""

    unused = ("model.visual.", "model.vqmodel.")
    decodes = False
    argument = "prior_token_ids"

    def __init__(self, model: Any, processor: Any, settings: ImageTokenSampling) -> None:
        if settings.think is not None:
            raise RecipeError("policy.sampling.think: GLM-Image's head has tokens of pictures only, it cannot write")
        if settings.guidance_scale != 1 and settings.negative_prompt is None:
            raise RecipeError(
                "policy.sampling.guidance_scale: GLM-Image's tokens are drawn without guidance; say 1, or give a"
                " negative_prompt"
            )
        super().__init__(range(model.config.vq_config.num_embeddings))
        self._processor, self._arguments = processor, dict(settings.processor)
        (_, *large), (_, *small) = self._processed("", special=False)["image_grid_thw"].tolist()
        self.grid = (large[0], large[1])
        self.pixels = (32 * large[0], 32 * large[1])
        grids = (small, large)
        self.layout = [DRAWN] * sum(rows * columns for rows, columns in grids)
        starts = (0, max(small))
        self.offsets = torch.cat([start + _places(*grid) for start, grid in zip(starts, grids, strict=True)], dim=1)

    def _processed(self, text: str, *, special: bool) -> Any:
        return self._processor(text=[text], add_special_tokens=special, return_tensors="pt", **self._arguments)

    def prompt(self, text: str, *, special: bool) -> list[int]:
        return self._processed(text, special=special)["input_ids"][0].tolist()

    def unconditional(self, prompt: Sequence[int]) -> list[int]:
        return list(prompt)  # never read: a recipe that guides names the negative prompt

    def backbone(self, model: Any) -> Any:
        return model.model.language_model

    def pictures(self, model: Any, codes: Tensor) -> list[Image.Image]:
        raise AssertionError("a pipeline or the recipe's decoder makes the pictures")

    def handed_on(self, codes: Tensor) -> Tensor:
        # The denoiser's own grid is twice as fine.
        return codes.view(-1, *self.grid).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def _places(rows: int, columns: int) -> Tensor:
    """[3, rows * columns] time, row and column of a grid's tokens."""
    places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return places.T


FAMILIES: dict[str, Any] = {
    "janus": JanusFamily,
    "emu3": Emu3Family,
    "chameleon": ChameleonFamily,
    "glm_image": GlmImageFamily,
}
"""By the `model_type` of a model's configuration."""


def family_of(model: Any, processor: Any, settings: ImageTokenSampling) -> ImageFamily:
    """The family of a loaded model.

    Raises:
        RecipeError: if it is none that draws.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise RecipeError(f"policy.model: {kind} does not draw with tokens{nearest(kind, list(FAMILIES))}")
    return FAMILIES[kind](model, processor, settings)


def to_pictures(pixels: Tensor, image_processor: Any) -> list[Image.Image]:
    """What an image processor's `postprocess` makes of normalised pixels [B, H, W, 3]: the inverse of its scaling.

    Not called itself: without torchvision, transformers' processors do not take every layout.
    """
    mean, std = (torch.tensor(values) for values in (image_processor.image_mean, image_processor.image_std))
    colours = (pixels.detach().float().cpu() * std + mean).mul(255).clamp(0, 255).byte()
    return [Image.fromarray(np.ascontiguousarray(row)) for row in colours.numpy()]

"""Tiny image-text-to-text families: the library's own models, processors and Pillow-backed image processors."""

from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_utils import VideoMetadata

from families.text import DELTA
from families.toolkit import Family, template, tokenizer, vocabulary

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
SQUARE = {"height": 28, "width": 28}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


class FrameProcessor:
    """In the place of the library's video processors, which need torchvision: two frames a patch, as Qwen-VL has it."""

    def __init__(self, pictures: Qwen2VLImageProcessorPil) -> None:
        self._pictures, self.merge_size = pictures, pictures.merge_size
        self.temporal_patch_size = 2
        self.model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __call__(self, videos: Any, **_: Any) -> dict[str, Any]:
        patches, grids, told = [], [], []
        for frames in (video for row in videos for video in row):
            found = [self._pictures(frame, return_tensors="pt") for frame in frames]
            cells = [each["pixel_values"].unflatten(1, (3, 2, -1)) for each in found]  # [patches, RGB, 2 times, pixels]
            pairs = zip(cells[::2], cells[1::2], strict=True)
            patches += [torch.stack([first[:, :, 0], then[:, :, 1]], dim=2).flatten(1) for first, then in pairs]
            grids.append(found[0]["image_grid_thw"][0] * torch.tensor([len(frames) // 2, 1, 1]))
            told.append(VideoMetadata(total_num_frames=len(frames), fps=24.0, frames_indices=[*range(len(frames))]))
        grid = torch.stack(grids)
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grid, "video_metadata": told}


class WithoutVideo:
    """A processor whose video half is missing: the library's video processors need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, FrameProcessor):
            return FrameProcessor
        return type(None) if argument is None else super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]


class Qwen2VLProcessor(WithoutVideo, hf.Qwen2VLProcessor):
    pass


class Qwen2_5_VLProcessor(WithoutVideo, hf.Qwen2_5_VLProcessor):  # noqa: N801
    pass


class Qwen3VLProcessor(WithoutVideo, hf.Qwen3VLProcessor):
    pass


class Glm4vProcessor(WithoutVideo, hf.Glm4vProcessor):
    pass


class InternVLProcessor(WithoutVideo, hf.InternVLProcessor):
    pass


class LlavaOnevisionProcessor(WithoutVideo, hf.LlavaOnevisionProcessor):
    pass


class PixtralProcessor(hf.LlavaProcessor):
    """Counts a picture's tokens from its own size. The library's PixtralProcessor needs torchvision."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        height, width = image_inputs["image_sizes"][image_idx]
        return self.image_token * int((height // self.patch_size) * (width // self.patch_size))


def qwen(name: str) -> tuple[Any, Any]:
    """Qwen-VL from 2 to 3.5: packed patches, three-dimensional positions; 3.5 has recurrent layers too."""
    words = tokenizer(specials=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"))
    ids = words.convert_tokens_to_ids
    special = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
    text = {**TEXT, "vocab_size": vocabulary(words), "rope_parameters": MROPE}
    tower: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 14}
    if name == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        config: Any = hf.Qwen2VLConfig(text_config=text, vision_config=tower, **special)
        model: Any = hf.Qwen2VLForConditionalGeneration(config)
    elif name == "qwen2_5_vl":
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config={**tower, "window_size": 56}, **special)
        model = hf.Qwen2_5_VLForConditionalGeneration(config)
    else:
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
        if name == "qwen3_5":
            text |= {**DELTA, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
            model = hf.Qwen3_5ForConditionalGeneration(
                hf.Qwen3_5Config(text_config=text, vision_config=tower, **special)
            )
        elif name == "qwen3_vl_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            tower |= {"deepstack_visual_indexes": [0]}
            model = hf.Qwen3VLMoeForConditionalGeneration(
                hf.Qwen3VLMoeConfig(text_config={**text, **experts}, vision_config=tower, **special)
            )
        else:
            tower |= {"deepstack_visual_indexes": [0]}
            model = hf.Qwen3VLForConditionalGeneration(
                hf.Qwen3VLConfig(text_config=text, vision_config=tower, **special)
            )
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, patch_size=14)
    kind = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}.get(name, Qwen3VLProcessor)
    chat = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
    return model, kind(pictures, words, FrameProcessor(pictures), chat_template=chat)


def glm4v() -> tuple[Any, Any]:
    words = tokenizer(
        specials=(
            *("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
            *("<|begin_of_video|>", "<|end_of_video|>"),
        )
    )
    ids = words.convert_tokens_to_ids
    rope = {**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    config = hf.Glm4vConfig(
        text_config={**TEXT, "vocab_size": vocabulary(words), "rope_parameters": rope},
        vision_config={
            **{"depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 28, "patch_size": 14},
            **{"out_hidden_size": 32, "intermediate_size": 64},
        },
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"),
        image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"),
        video_end_token_id=ids("<|end_of_video|>"),
    )
    pictures = Glm4vImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 2 * 56 * 56})
    chat = template("<|begin_of_image|><|image|><|end_of_image|>")
    return hf.Glm4vForConditionalGeneration(config), Glm4vProcessor(pictures, words, None, chat_template=chat)


def idefics(name: str) -> tuple[Any, Any]:
    """Idefics2, Idefics3 and SmolVLM: pictures stand in a batch dimension, padded by zeros."""
    words = tokenizer(specials=("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"))
    shared = {"image_token_id": words.convert_tokens_to_ids("<image>"), "pad_token_id": 0}
    text = {**TEXT, "vocab_size": vocabulary(words), "model_type": "llama"}
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    if name == "idefics2":
        perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8}
        config: Any = hf.Idefics2Config(
            vision_config=TOWER,
            text_config={**text, "model_type": "mistral"},
            perceiver_config={**perceiver, "num_key_value_heads": 2, "hidden_size": 32},
            **shared,
        )
        pictures: Any = Idefics2ImageProcessorPil(
            size={"shortest_edge": 28, "longest_edge": 28}, do_image_splitting=False
        )
        processor: Any = hf.Idefics2Processor(pictures, words, image_seq_len=4, chat_template=template("<image>"))
        return hf.Idefics2ForConditionalGeneration(config), processor
    tower = {**TOWER, "patch_size": 7}
    if name == "idefics3":
        config = hf.Idefics3Config(vision_config=tower, text_config=text, scale_factor=2, **shared)
        pictures = Idefics3ImageProcessorPil(**sizes)
        processor = hf.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=template("<image>"))
        return hf.Idefics3ForConditionalGeneration(config), processor
    config = hf.SmolVLMConfig(vision_config=tower, text_config=text, scale_factor=2, **shared)
    pictures = SmolVLMImageProcessorPil(**sizes)
    # SmolVLMProcessor writes the same placeholders, but needs num2words for videos.
    processor = hf.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=template("<image>"))
    return hf.SmolVLMForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer({**named, "video_token": "<video>"})
    config = hf.InternVLConfig(
        vision_config={**TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={**TEXT, "vocab_size": vocabulary(words), "model_type": "qwen2"},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    pictures = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=2)
    chat = template("<IMG_CONTEXT>")
    processor = InternVLProcessor(pictures, words, None, image_seq_length=4, chat_template=chat)
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    words = tokenizer({"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"})
    ids = words.convert_tokens_to_ids
    config = hf.Gemma3Config(
        text_config={**TEXT, "vocab_size": vocabulary(words), "sliding_window": 8},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        boi_token_index=ids("<boi>"),
        eoi_token_index=ids("<eoi>"),
        image_token_index=ids("<image>"),
    )
    pictures = Gemma3ImageProcessorPil(size=SQUARE)
    processor = hf.Gemma3Processor(pictures, words, chat_template=template("<boi>"), image_seq_length=4)
    model = hf.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros in a fresh model
    return model, processor


def paligemma() -> tuple[Any, Any]:
    words = tokenizer({"image_token": "<image>"})
    pictures = SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(pictures, words, chat_template=template("<image>"))  # adds a thousand tokens
    config = hf.PaliGemmaConfig(
        text_config={**TEXT, "vocab_size": vocabulary(words), "model_type": "gemma"},
        vision_config={**TOWER, "vision_use_head": False},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def llava(name: str) -> tuple[Any, Any]:
    """LLaVA and its descendants with a CLIP or SigLIP tower."""
    words = tokenizer({"image_token": "<image>", "video_token": "<video>"})
    text = {**TEXT, "vocab_size": vocabulary(words), "model_type": "llama"}
    index: dict[str, Any] = {"image_token_index": words.convert_tokens_to_ids("<image>")}
    clip = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 32}
    chat, anyres = template("<image>"), [[28, 56], [56, 28]]
    counts: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    counts["num_additional_image_tokens"] = 1
    clip_pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE)
    if name == "llava":
        config: Any = hf.LlavaConfig(vision_config=clip, text_config=text, **index)
        return hf.LlavaForConditionalGeneration(config), hf.LlavaProcessor(
            clip_pictures, words, chat_template=chat, **counts
        )
    if name == "vipllava":
        config = hf.VipLlavaConfig(
            vision_config=clip, text_config=text, image_seq_length=4, vision_feature_layers=[-1, -2], **index
        )
        return hf.VipLlavaForConditionalGeneration(config), hf.LlavaProcessor(
            clip_pictures, words, chat_template=chat, **counts
        )
    if name == "llava_next":
        config = hf.LlavaNextConfig(vision_config=clip, text_config=text, image_grid_pinpoints=anyres, **index)
        tiles = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=anyres)
        return hf.LlavaNextForConditionalGeneration(config), hf.LlavaNextProcessor(
            tiles, words, chat_template=chat, **counts
        )
    config = hf.LlavaOnevisionConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**text, "model_type": "qwen2"},
        image_grid_pinpoints=anyres,
        video_token_index=words.convert_tokens_to_ids("<video>"),
        vision_aspect_ratio="anyres_max_9",
        **index,
    )
    wide = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=anyres)
    processor = LlavaOnevisionProcessor(
        wide, words, None, num_image_tokens=4, vision_feature_select_strategy="full", chat_template=chat
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def pixtral(name: str) -> tuple[Any, Any]:
    """LLaVA with a Pixtral tower, and Mistral 3, which merges its patches."""
    words = tokenizer({"image_token": "[IMG]"})
    merge = 2 if name == "mistral3" else 1
    tower = {**TOWER, "image_size": 56, "model_type": "pixtral"}
    text = {**TEXT, "vocab_size": vocabulary(words), "model_type": "mistral"}
    index: dict[str, Any] = {"image_token_index": words.convert_tokens_to_ids("[IMG]"), "vision_feature_layer": -1}
    if name == "mistral3":
        model: Any = hf.Mistral3ForConditionalGeneration(
            hf.Mistral3Config(vision_config=tower, text_config=text, spatial_merge_size=2, **index)
        )
    else:
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(vision_config=tower, text_config=text, vision_feature_select_strategy="full", **index)
        )
    pictures = PixtralImageProcessorPil(
        size={"longest_edge": 56}, patch_size={"height": 14 * merge, "width": 14 * merge}
    )
    processor = PixtralProcessor(pictures, words, patch_size=14 * merge, chat_template=template("[IMG]"))
    return model, processor


def aya_vision() -> tuple[Any, Any]:
    specials = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    words = tokenizer(specials=("<image>", *specials, "TILE_1", "TILE_2"))
    config = hf.AyaVisionConfig(
        vision_config={**TOWER, "model_type": "siglip_vision_model", "patch_size": 7, "vision_use_head": False},
        text_config={**TEXT, "vocab_size": vocabulary(words), "model_type": "cohere2", "sliding_window": 8},
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    pictures = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=2)
    processor = hf.AyaVisionProcessor(
        pictures, words, patch_size=7, img_size=28, downsample_factor=2, chat_template=template("<image>")
    )
    return hf.AyaVisionForConditionalGeneration(config), processor


def mllama() -> tuple[Any, Any]:
    words = tokenizer({"image_token": "<|image|>"}, specials=("<|python_tag|>",))
    # The embedding has eight rows beyond the head, for the picture token: it must be the first of them.
    config = hf.MllamaConfig(
        text_config={
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            **{"vocab_size": vocabulary(words), "cross_attention_layers": [1]},
        },
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1},
            **{"attention_heads": 4, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0, 1]},
            **{"vision_output_dim": 96, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        },
        image_token_index=words.convert_tokens_to_ids("<|image|>"),
    )
    pictures = MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2)
    processor = hf.MllamaProcessor(pictures, words, chat_template=template("<|image|>"))
    model = hf.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            nn.init.ones_(parameter)  # zeros in a fresh model, which close the cross-attention
    return model, processor


FAMILIES = {
    "qwen2_vl": Family(build=lambda: qwen("qwen2_vl"), pictures=2),
    "qwen2_5_vl": Family(build=lambda: qwen("qwen2_5_vl"), pictures=2),
    "qwen3_vl": Family(build=lambda: qwen("qwen3_vl"), pictures=2),
    "qwen3_vl_moe": Family(build=lambda: qwen("qwen3_vl_moe"), pictures=2),
    "qwen3_5": Family(build=lambda: qwen("qwen3_5"), pictures=2),
    "glm4v": Family(build=glm4v, pictures=2),
    "idefics2": Family(build=lambda: idefics("idefics2"), pictures=2),
    "idefics3": Family(build=lambda: idefics("idefics3"), pictures=2),
    "smolvlm": Family(build=lambda: idefics("smolvlm"), pictures=2),
    "internvl": Family(build=internvl, pictures=2),
    "gemma3": Family(build=gemma3, pictures=2),
    "paligemma": Family(build=paligemma, pictures=2, text_rows=False),
    "llava": Family(build=lambda: llava("llava"), pictures=2),
    "vipllava": Family(build=lambda: llava("vipllava"), pictures=2),
    "llava_next": Family(build=lambda: llava("llava_next"), pictures=2),
    "llava_onevision": Family(build=lambda: llava("llava_onevision"), pictures=2),
    "pixtral": Family(build=lambda: pixtral("pixtral"), pictures=2),
    "mistral3": Family(build=lambda: pixtral("mistral3"), pictures=2),
    "aya_vision": Family(build=aya_vision, pictures=2),
    "mllama": Family(build=mllama, pictures=2),
}

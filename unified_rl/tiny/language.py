"""Tiny random twins of transformers models: the same model and processor classes, a tokenizer of characters."""

import string
from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from unified_rl.policies.without_videos import without_videos

WIDTH = 32
SIDE = 32
"""Pixels of a picture's side."""
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WORDS = ("<pad>", "<s>", "</s>", "<unk>")
CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}: {% endif %}"
)
"""A chat template that writes PICTURE where a message holds one."""

Twin = tuple[Any, Any]
"""A model and its processor (a tokenizer for text-only models)."""


def _tokenizer(specials: tuple[str, ...] = (), **named: str) -> Any:
    """A tokenizer of single characters.

    Args:
        specials, named: further special tokens; the named ones become attributes, for instance `image_token`.
    """
    words = dict.fromkeys([*WORDS, *specials, *named.values(), *string.printable])
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"extra_special_tokens": [*named.values(), *specials]}, replace_extra_special_tokens=False)
    return fast


def _qwen2() -> Twin:
    words = _tokenizer()
    words.chat_template = CHAT.replace("PICTURE", "")
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, **IDS, vocab_size=len(words))), words


def _qwen2_5_vl() -> Twin:
    marks = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    words = _tokenizer(marks)
    start, image, end, video = (words.convert_tokens_to_ids(mark) for mark in marks)
    tower = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, **IDS, "vocab_size": len(words), "rope_parameters": MROPE},
        vision_config={**tower, "fullatt_block_indexes": [1]},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pixels: dict[str, Any] = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
    settings = {**pixels, "video_processor_type": "Qwen2VLVideoProcessor"}
    processor = without_videos(transformers.Qwen2_5_VLProcessor, settings)(
        transformers.Qwen2VLImageProcessor(**pixels), words, chat_template=CHAT.replace("PICTURE", "".join(marks[:3]))
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _idefics3() -> Twin:
    """SmolVLM's classes."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    words = _tokenizer(("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"))
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT, **IDS, "vocab_size": len(words)},
        vision_config=vision,
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        **IDS,
    )
    side = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    processor = transformers.Idefics3Processor(
        images, words, image_seq_len=4, chat_template=CHAT.replace("PICTURE", "<image>")
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _janus() -> Twin:
    """A picture is 2 x 2 tokens."""
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    words = _tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    config = transformers.JanusConfig(
        text_config=transformers.LlamaConfig(**TEXT, **IDS, vocab_size=len(words), initializer_range=0.2).to_dict(),
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_ratio": 1.0,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": WIDTH,
            "depth": 1,
            "num_image_tokens": 4,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "projection_dim": WIDTH,
            "num_hidden_layers": 1,
            "image_token_embed_dim": WIDTH,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    model = transformers.JanusForConditionalGeneration(config)
    model.generation_config.update(**IDS)
    half = (0.5, 0.5, 0.5)
    images = JanusImageProcessorPil(size={"height": 8, "width": 8}, image_mean=half, image_std=half)
    return model, transformers.JanusProcessor(images, words, num_image_tokens=4)


def _eurobert() -> Twin:
    """A bidirectional model of one sequence, as LLaDA2 is."""
    words = _tokenizer(mask_token="<mask>")
    words.chat_template = CHAT.replace("PICTURE", "")
    config = transformers.EuroBertConfig(
        **TEXT, **IDS, vocab_size=len(words), mask_token_id=words.mask_token_id, initializer_range=0.2
    )
    return transformers.EuroBertForMaskedLM(config), words


TWINS: dict[str, Callable[[], Twin]] = {
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2_5_VLForConditionalGeneration": _qwen2_5_vl,
    "Idefics3ForConditionalGeneration": _idefics3,
    "JanusForConditionalGeneration": _janus,
    "EuroBertForMaskedLM": _eurobert,
}
"""Model class -> a model and its processor."""

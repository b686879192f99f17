"""The table of docs/scale.md: what 8, 64 and 512 GPUs need for real models, from their published configurations alone.

python benchmarks/paper_plans.py          # no weights, no network; about a minute
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from unified_rl.planning.planner import GIB, model_of, need
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.policy import Adapter

CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "projection_dim": 768,
}
CLIP_G = {
    **CLIP_L,
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    "projection_dim": 1280,
}
T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    "feed_forward_proj": "gated-gelu",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    **{"layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    **{"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm", "sample_size": 128},
    **{"dual_attention_layers": list(range(13)), "pos_embed_max_size": 384, "in_channels": 16, "out_channels": 16},
}
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
QWEN_IMAGE = {"_class_name": "QwenImageTransformer2DModel"}


def qwen_vl(hidden: int, inner: int, layers: int, heads: int, groups: int, vision_inner: int) -> dict[str, Any]:
    """Configuration of a Qwen2.5-VL."""
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 152064}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "num_attention_heads": heads, "num_key_value_heads": groups},
        "vision_config": {"out_hidden_size": hidden, "intermediate_size": vision_inner},
    }


VL_7B = qwen_vl(3584, 18944, 28, 28, 4, 3420)
VL_32B = qwen_vl(5120, 27648, 64, 40, 8, 3456)
SD35 = {"transformer": SD35_MEDIUM, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}
LORA, FULL = Adapter(kind="lora", rank=32), Adapter()
MODELS: dict[str, tuple[dict[str, dict[str, Any]], Adapter]] = {
    "SD3.5-M, LoRA": ({**SD35, "vae": VAE}, LORA),
    "SD3.5-M, full": ({**SD35, "vae": VAE}, FULL),
    "FLUX.1-dev, full": ({"transformer": FLUX, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "vae": VAE}, FULL),
    "Qwen-Image, full": (
        {"transformer": QWEN_IMAGE, "text_encoder": VL_7B, "vae": {"_class_name": "AutoencoderKLQwenImage"}},
        FULL,
    ),
    "Qwen2.5-VL-7B, full": ({"": VL_7B}, FULL),
    "Qwen2.5-VL-32B, full": ({"": VL_32B}, FULL),
}


def write(components: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write the configurations as `save_pretrained` would."""
    for name, config in components.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")


def row(title: str, components: dict[str, dict[str, Any]], adapter: Adapter) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        write(components, Path(folder))
        family = "causal_lm" if "" in components else "diffusion"
        recipe = load_recipe("quickstart_vlm" if "" in components else "quickstart")
        changed = {"model": folder, "family": family, "dtype": "bfloat16", "adapter": adapter}
        policy = recipe.policy.model_copy(update=changed)
        model = model_of(recipe.model_copy(update={"policy": policy}))
    cells = []
    for num_gpus in (8, 64, 512):
        cells.append(" / ".join(f"{need(model, stage, num_gpus, 1).total / GIB:.3g}" for stage in (2, 3)))
    sent = " / ".join(f"{need(model, stage, 8, 1).traffic / GIB:.3g}" for stage in (2, 3))
    trained = f"{model.trained / 1e9:.1f} B" if model.trained > 1e8 else f"{model.trained / 1e6:.0f} M"
    return f"| {title} | {trained} | {' | '.join(cells)} | {sent} |"


def main() -> None:
    print("| model | trained | 8 GPUs | 64 GPUs | 512 GPUs | sent a step (8) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for title, (components, adapter) in MODELS.items():
        print(row(title, components, adapter), flush=True)


if __name__ == "__main__":
    main()

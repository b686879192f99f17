"""Memory and time that docs/models.md and the recipes in recipes/models name, from published configurations alone.

python benchmarks/recipe_plans.py [NAME...]          # no weights, no network; a minute

Memory is what `unified-rl validate RECIPE --gpus N` prints: states of one GPU, and activations of a window, which are
right within a factor of two. Time is the denoiser's work: floating-point operations of one forward, counted by torch
without numbers, times the forwards of a rollout and of its updates, at 40 % of the GPUs' peak. Encoders, VAE, rewards
and transfers come on top.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from paper_plans import CLIP_G, CLIP_L, FLUX, QWEN_IMAGE, SD35_MEDIUM, T5_XXL, VAE, VL_7B, write
from torch.utils.flop_counter import FlopCounterMode

from unified_rl.planning.footprint import Pipeline, window_activations
from unified_rl.planning.planner import GIB, model_of, need
from unified_rl.recipe.explain import plan
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.schema import Recipe

PEAK = {"A100": 312e12, "H100": 990e12}
"""Of bfloat16, operations a second."""
UTILISED = 0.4
UMT5_XXL = {
    **T5_XXL,
    **{"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": 256384},
}
SD15 = {
    **{"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768},
    **{"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8},
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL = {
    **{"_class_name": "UNet2DConditionModel", "sample_size": 128, "cross_attention_dim": 2048},
    **{"block_out_channels": [320, 640, 1280], "layers_per_block": 2, "attention_head_dim": [5, 10, 20]},
    **{"transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time"},
    **{"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
WAN = {"_class_name": "WanTransformer3DModel", "attention_head_dim": 128, "patch_size": [1, 2, 2], "in_channels": 16}
WAN_13 = {**WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_14 = {**WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN_VAE = {"_class_name": "AutoencoderKLWan", "temperal_downsample": [False, True, True]}
QWEN_VAE = {"_class_name": "AutoencoderKLQwenImage", "temperal_downsample": [False, True, True]}
SD_VAE = {**VAE, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
FLUX_WHOLE = {
    "transformer": {**FLUX, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "in_channels": 64}
    | {"attention_head_dim": 128, "patch_size": 1},
    **{"text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "vae": VAE},
}
SD35 = {
    **{"transformer": {**SD35_MEDIUM, "patch_size": 2}, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    **{"text_encoder_3": T5_XXL, "vae": VAE},
}
QWEN_WHOLE = {
    "transformer": {**QWEN_IMAGE, "num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128}
    | {"in_channels": 64, "patch_size": 2},
    **{"text_encoder": VL_7B, "vae": QWEN_VAE},
}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": SD15, "text_encoder": CLIP_L, "vae": SD_VAE},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        **{"unet": SDXL, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "vae": SD_VAE}
    },
    "stabilityai/stable-diffusion-3.5-medium": SD35,
    "black-forest-labs/FLUX.1-dev": FLUX_WHOLE,
    "black-forest-labs/FLUX.1-Kontext-dev": FLUX_WHOLE,
    "Qwen/Qwen-Image": QWEN_WHOLE,
    "Qwen/Qwen-Image-Edit": QWEN_WHOLE,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"transformer": WAN_13, "text_encoder": UMT5_XXL, "vae": WAN_VAE},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {
        **{"transformer": WAN_14, "transformer_2": WAN_14, "text_encoder": UMT5_XXL, "vae": WAN_VAE}
    },
}
GPUS = {"sd15": (1, "A100")}
"""Number and kind, by the beginning of a recipe's name; others: 8 H100."""


def inputs(kind: str, config: dict[str, Any], frames: int, height: int, width: int, pictures: int) -> dict[str, Any]:
    """Arguments of one forward for one sample without guidance; height and width in latents."""
    zeros, tokens = torch.zeros, height * width // 4 * pictures
    packed = {"hidden_states": zeros(1, tokens, 64), "timestep": zeros(1)}
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "UNet2DConditionModel": lambda: {
            **{"sample": zeros(1, 4, height, width), "timestep": zeros(1)},
            "encoder_hidden_states": zeros(1, 77, config["cross_attention_dim"]),
            "added_cond_kwargs": {"text_embeds": zeros(1, 1280), "time_ids": zeros(1, 6)},
        },
        "SD3Transformer2DModel": lambda: {
            **{"hidden_states": zeros(1, 16, height, width), "timestep": zeros(1)},
            **{"encoder_hidden_states": zeros(1, 333, 4096), "pooled_projections": zeros(1, 2048)},
        },
        "FluxTransformer2DModel": lambda: {
            **packed,
            **{"encoder_hidden_states": zeros(1, 512, 4096), "pooled_projections": zeros(1, 768)},
            **{"img_ids": zeros(tokens, 3), "txt_ids": zeros(512, 3), "guidance": zeros(1)},
        },
        "QwenImageTransformer2DModel": lambda: {
            **packed,
            **{"encoder_hidden_states": zeros(1, 64, 3584), "encoder_hidden_states_mask": None},
            "img_shapes": [[(1, height // 2, width // 2)] * pictures],
        },
        "WanTransformer3DModel": lambda: {
            **{"hidden_states": zeros(1, 16, frames, height, width), "timestep": zeros(1)},
            "encoder_hidden_states": zeros(1, 512, 4096),
        },
    }
    return made[kind]()


def forward_flops(config: dict[str, Any], **shape: int) -> int:
    """Of one sample without guidance; torch counts two for a multiplication with its addition."""
    kind = config["_class_name"]
    with torch.device("meta"):
        module = getattr(diffusers, kind).from_config(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(**inputs(kind, config, **shape))
    return counter.get_total_flops()


def seconds(recipe: Recipe, flops: int, num_gpus: int, gpu: str) -> float:
    """Of a rollout with its updates."""
    policy, counts, objective = recipe.policy, plan(recipe), recipe.objective["all"]
    call = policy.sampling.call  # type: ignore[union-attr]
    doubled = "Flux" not in policy.model and "FLUX" not in policy.model
    guided = 2 if doubled and max(call.get("guidance_scale", 1.0), call.get("true_cfg_scale", 1.0)) > 1 else 1
    drawn = policy.sampling.num_inference_steps  # type: ignore[union-attr]
    # A window: forward, its recomputation, backward, of which an adapter needs half (the gradients of inputs).
    window = 1 + policy.memory.gradient_checkpointing + (1 if policy.adapter.kind == "lora" else 2)
    others = sum((objective.kl.coef > 0, objective.old_weights is not None and objective.method == "nft"))
    trained = (counts.steps_trained or drawn) * (window + others) * recipe.epochs
    forwards = recipe.samples_per_rollout * guided * (drawn + trained)
    return forwards * flops / (UTILISED * PEAK[gpu] * num_gpus)


def row(name: str) -> str:
    """A line of the table."""
    recipe = load_recipe(name)
    components = MODELS[recipe.policy.model]
    num_gpus, gpu = next((found for start, found in GPUS.items() if name.startswith(start)), (8, "H100"))
    with tempfile.TemporaryDirectory() as folder:
        write(components, Path(folder))
        local = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"model": folder})})
        stage = recipe.engine.zero_stage
        states = need(model_of(local), stage, num_gpus, 1).total
        kept = window_activations(local, Path(folder)) or 0
        pipeline = Pipeline(Path(folder), local.policy, local.policy.sampling)  # type: ignore[arg-type]
    denoiser = next(components[each] for each in ("unet", "transformer") if each in components)
    height, width = pipeline.latent
    pictures = 2 if "kontext" in name or "edit" in name else 1
    flops = forward_flops(denoiser, frames=pipeline.frames, height=height, width=width, pictures=pictures)
    minutes = seconds(recipe, flops, num_gpus, gpu) / 60
    run = minutes * plan(recipe).num_rollouts / 60
    gpus = f"{num_gpus} {gpu}"
    cells = (f"{states / GIB:.1f} + {kept / GIB:.1f}", f"{flops / 1e12:.3g}", f"{minutes:.2g}", f"{run:.2g}")
    return f"| `{name}` | {gpus}, ZeRO-{stage} | {' | '.join(cells)} |"


def main() -> None:
    recipes = Path(__file__).parent.parent / "recipes" / "models"
    every = {path.stem: load_recipe(path.stem) for path in sorted(recipes.glob("*.yaml"))}
    drawing = [name for name, each in every.items() if each.policy.model in MODELS and each.policy.writer is None]
    names = sys.argv[1:] or drawing
    print("| recipe | GPUs | GiB a GPU: states + a window | TFLOP a forward | min a rollout | h a run |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()

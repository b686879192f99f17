"""Peak memory of a process, estimated from the recipe and the model's own configuration files. Imports no torch.

Weights, gradients and optimiser are counted exactly. Activations are a model of what PyTorch keeps for one window's
backward pass, fitted to measured ones of transformers and UNets: expect it to be right within a factor of two.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_rl.planning.weights import BYTES, DENOISERS, Sizes, measure
from unified_rl.recipe.policy import DiffusionSampling, ImageTokenSampling, PolicyBlock, TextSampling
from unified_rl.recipe.schema import Recipe
from unified_rl.recipe.step_counts import num_image_tokens, num_turns

LIBRARIES = 550 * 2**20
"""Bytes: Python with torch, diffusers and transformers loaded, which a CPU run's peak includes and a GPU's does not."""
PER_TOKEN = {"none": 24, "lora": 15}
"""Values of hidden width that a transformer block keeps for each token; under LoRA, frozen layers keep no inputs."""
PER_RESNET = {"none": 13, "lora": 11}
"""Feature maps that a UNet's resnet keeps."""
CLIP_TOKENS = 77


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes on one process, before ZeRO shares anything out."""

    sizes: Sizes
    copies: int
    """Snapshots of the trained weights."""
    trajectories: int
    """Stored states and pictures of a rollout."""
    activations: int | None
    """Of one window; None where the configuration says too little."""

    @property
    def total(self) -> int:
        return self.sizes.total_bytes + self.copies + self.trajectories + (self.activations or 0)

    @property
    def parts(self) -> dict[str, int]:
        """By name, the largest ones of interest first; nothing that is 0."""
        sizes = self.sizes
        parts = {
            "weights": sizes.weight_bytes,
            "gradients": sizes.gradient_bytes,
            "Adam": sizes.optimizer_bytes,
            "reference copy": sizes.reference_bytes,
            "averages and copies": self.copies,
            "activations": self.activations or 0,
            "stored rollout": self.trajectories,
        }
        return {name: number for name, number in parts.items() if number}


def estimate(recipe: Recipe) -> Footprint | None:
    """The footprint of a recipe's training, or None if its weights are not here to be measured."""
    with_reference = any(objective.needs_reference for objective in recipe.objective.values())
    sizes = measure(recipe.policy, with_reference=with_reference)
    if sizes is None:
        return None
    sampling, folder = recipe.policy.sampling, Path(recipe.policy.model)
    trajectories = 0  # of a language model: tokens and log-probs
    if isinstance(sampling, DiffusionSampling):
        trajectories = recipe.samples_per_rollout * Pipeline(folder, recipe.policy, sampling).stored_bytes
    return Footprint(
        sizes=sizes,
        copies=4 * sizes.trained * len(recipe.all_snapshots),
        trajectories=trajectories,
        activations=window_activations(recipe, folder),
    )


def window_activations(recipe: Recipe, folder: Path) -> int | None:
    """Bytes that one window keeps for its backward pass, or None where the configuration says too little.

    Args:
        folder: with the model's configuration files.
    """
    sampling = recipe.policy.sampling
    if isinstance(sampling, DiffusionSampling):
        return Pipeline(folder, recipe.policy, sampling).activations(recipe.engine.micro_batch)
    if isinstance(sampling, TextSampling | ImageTokenSampling):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _language_model(config, recipe, sampling)
    return None


class Pipeline:
    """What a pipeline's configuration files say about the size of its activations."""

    def __init__(self, folder: Path, policy: PolicyBlock, sampling: DiffusionSampling) -> None:
        self._policy, self._sampling = policy, sampling
        self._call = {**_read(folder / "call_defaults.json"), **sampling.call}
        self._denoiser = next(
            (_read(folder / name / "config.json") for name in DENOISERS if (folder / name).is_dir()), {}
        )
        vae = _read(folder / "vae" / "config.json")
        native = self._denoiser.get("sample_size") or 64
        side = native[0] if isinstance(native, list) else native
        self._scale, per_frame = _compression(vae)
        self.latent = tuple(
            int(self._call.get(key) or side * self._scale) // self._scale for key in ("height", "width")
        )
        self.frames = (int(self._call.get("num_frames") or 1) - 1) // per_frame + 1
        tokenizer = _read(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length") or CLIP_TOKENS
        self._text = min(int(tokenizer), 512) + int(self._call.get("max_sequence_length") or 0)

    @property
    def stored_bytes(self) -> int:
        """Of one sample: its states, what the denoiser gave where that is stored too, and its picture."""
        channels = int(self._denoiser.get("in_channels") or 4)
        height, width = self.latent
        width_bytes = BYTES[self._sampling.state_dtype or self._policy.dtype]
        states = min(self._sampling.num_noisy + 2, self._sampling.num_inference_steps)
        if self._sampling.store_outputs:
            states += self._sampling.num_inference_steps * (2 if self._guided else 1)
        picture = 3 * height * width * self._scale**2
        return self.frames * (states * channels * height * width * width_bytes + picture)

    def activations(self, rows: int) -> int | None:
        """Bytes that one window of `rows` trajectories keeps for its backward pass."""
        values = self._transformer() or self._unet()
        return None if values is None else rows * (2 if self._guided else 1) * values * BYTES[self._policy.dtype]

    @property
    def _guided(self) -> bool:
        return float(self._call.get("guidance_scale", 7.5)) > 1 and not self._denoiser.get("guidance_embeds")

    def _transformer(self) -> int | None:
        config = self._denoiser
        if not {"num_attention_heads", "attention_head_dim"} <= config.keys() or "block_out_channels" in config:
            return None
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        layers = int(config.get("num_layers") or 0) + int(config.get("num_single_layers") or 0)
        patch = config.get("patch_size") or 1
        across = patch[-1] if isinstance(patch, list) else patch
        # FLUX, Qwen-Image and others pack 2 x 2 latents into a token before the denoiser.
        packed = 2 if across == 1 and int(config.get("in_channels") or 4) >= 64 else across
        height, width = self.latent
        tokens = self.frames * (height // packed) * (width // packed)
        return _blocks(self._policy, layers, (tokens + self._text) * hidden, PER_TOKEN[self._policy.adapter.kind])

    def _unet(self) -> int | None:
        config = self._denoiser
        widths, kinds = config.get("block_out_channels"), config.get("down_block_types")
        if not isinstance(widths, list) or not isinstance(kinds, list) or len(widths) != len(kinds):
            return None
        height, width = self.latent
        depth = config.get("transformer_layers_per_block") or 1
        kept = largest = 0
        for level, (channels, kind) in enumerate(zip(widths, kinds, strict=True)):
            layers = config["layers_per_block"]
            layers = layers[level] if isinstance(layers, list) else layers
            transformers = (depth[level] if isinstance(depth, list) else depth) if "Attn" in kind else 0
            feature_map = channels * (height >> level) * (width >> level)
            lowest = level == len(widths) - 1
            resnets = 2 * layers + 1 + (2 if lowest else 0)
            each = PER_RESNET[self._policy.adapter.kind] + transformers * PER_TOKEN[self._policy.adapter.kind]
            kept += resnets * each * feature_map
            largest = max(largest, (layers + 1) * each * feature_map)
        return largest + kept // 4 if self._policy.memory.gradient_checkpointing else kept


def _compression(vae: dict[str, Any]) -> tuple[int, int]:
    """Pixels that become one latent across, and frames that become one, as a VAE's configuration tells (diffusers'
    classes differ in how)."""
    # Wan, Qwen-Image: a flag for each halving of the picture; true: in time too
    halvings = vae.get("temperal_downsample")
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0]
    across = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    across = across or 2 ** (len(halvings) if halvings else len(blocks) - 1)
    in_time = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    return int(across), int(in_time or (2 ** sum(halvings) if halvings else 4))


def _language_model(config: dict[str, Any], recipe: Recipe, sampling: TextSampling | ImageTokenSampling) -> int | None:
    policy, rows = recipe.policy, recipe.engine.micro_batch
    text = {**config, **(config.get("text_config") or {})}
    hidden, layers = text.get("hidden_size"), text.get("num_hidden_layers")
    completion: int | None
    if isinstance(sampling, ImageTokenSampling):
        completion, codes = num_image_tokens(policy, sampling), config.get("vq_config") or {}
        vocabulary = codes.get("num_embeddings") or codes.get("codebook_size") or 0
        rows *= 1 if sampling.guidance_scale == 1.0 else 2
    else:
        completion, vocabulary = sampling.max_new_tokens, text.get("vocab_size", 0)
    if not hidden or not layers or completion is None:
        return None
    inner = text.get("intermediate_size") or 4 * hidden
    prompt = sampling.max_prompt_tokens or min(256, int(text.get("max_position_embeddings") or 256))
    # A group's prompt is computed once; not with checkpointing, where rows are guided, or in an environment.
    turns = num_turns(policy)
    shares = isinstance(sampling, TextSampling) and turns == 1 and not policy.memory.gradient_checkpointing
    prompts = math.ceil(rows / recipe.group_size) if shares else rows
    tokens = prompts * prompt + rows * completion
    factor = (10 if policy.adapter.kind == "none" else 6) + 4 * inner / hidden
    values = _blocks(policy, layers, tokens * hidden, factor) * BYTES[policy.dtype]
    # Logits of the completions: the model's, the processed ones and their log-softmax in float32.
    return turns * (values + rows * completion * vocabulary * (BYTES[policy.dtype] + 8))


def _blocks(policy: PolicyBlock, layers: int, stream: int, factor: float) -> int:
    """Values that equal blocks on a stream of `stream` values keep; checkpointing leaves inputs and one block's."""
    if policy.memory.gradient_checkpointing:
        return math.ceil((layers + factor) * stream)
    return math.ceil(layers * factor * stream)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

"""The recipe's `policy` block: the model, what of it is trained, and how it samples."""

from typing import Any, Literal

from pydantic import Field

from unified_rl.recipe_block import Block


class Adapter(Block):
    """Which weights are trained."""

    kind: Literal["none", "lora"] = "none"
    """none: full fine-tuning; lora: peft adapters, the base weights frozen."""
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64.0, gt=0)
    targets: list[str] | Literal["auto"] = "auto"
    """Names of the linear layers that get adapters; auto: the attention projections."""


class DiffusionSampling(Block):
    """The behaviour policy of a diffusers pipeline."""

    num_inference_steps: int = Field(default=10, ge=1)
    kernel: Literal["auto", "flow_sde", "dance_sde", "cps", "ddim"] = "auto"
    """The transition kernel; auto: from the pipeline's scheduler (flow_sde or ddim)."""
    noise_level: float = Field(default=0.7, ge=0)
    """Noise of the kernel: Flow-GRPO's eta for flow_sde, the diffusion coefficient of dance_sde, the share of a quarter
    turn for cps (at most 1), DDIM's eta for ddim. 0: deterministic, nothing to train on."""
    noise_steps: int | None = Field(default=None, ge=1)
    """Only this many first steps, which lay out the picture, are stochastic and trained; the others follow the ODE
    (as in Flow-GRPO-Fast). None: all."""
    call: dict[str, Any] = {}
    """Further arguments of the pipeline's call, for instance guidance_scale, height, width."""


class TextSampling(Block):
    """The behaviour policy of a transformers generator: the logits processors, in this order."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    chat_template: bool = True
    """Render prompts with the processor's chat template."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are refused (never cut: a cut inside an image breaks the model)."""


SAMPLING: dict[str, type[Block]] = {"diffusion": DiffusionSampling, "causal_lm": TextSampling}


class PolicyBlock(Block):
    """The model to train."""

    model: str
    """A folder written by `save_pretrained`, or a hub name."""
    revision: str | None = None
    """Revision of a hub name; pin it."""
    family: Literal["diffusion", "causal_lm"]
    """Found from the model if left out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None
    """Attention implementation by the library's own name (transformers: eager, sdpa, flash_attention_2...; diffusers:
    native, _native_math, flash...). None: the library's choice."""
    adapter: Adapter = Adapter()
    train: list[str] | None = None
    """Regular expressions on parameter names: only matching parameters are trained. None: the family's default."""
    sampling: DiffusionSampling | TextSampling

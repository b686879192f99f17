"""The recipe's `policy` block: the model, what of it is trained, and how it samples."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from unified_rl.recipe.block import Block
from unified_rl.recipe.environment import EnvironmentBlock


class Adapter(Block):
    """Which weights are trained."""

    kind: Literal["none", "lora"] = "none"
    """none: full fine-tuning; lora: peft adapters, the base weights frozen."""
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64.0, gt=0)
    targets: list[str] | Literal["auto"] = "auto"
    """Names of the linear layers that get adapters; auto: the attention projections."""


class NoiseShift(Block):
    """How the sliding window of stochastic steps moves over the training."""

    schedule: Literal["progressive", "random", "decaying"] = "progressive"
    """progressive: by stride, from the last place back to the first. random: to any place. decaying: progressive, with
    ever shorter stays: every x exp(-rate x max(0, start - threshold)) rollouts, rounded up."""
    every: int = Field(default=25, ge=1)
    """Rollouts between two moves."""
    stride: int = Field(default=1, ge=1)
    rate: float = Field(default=0.1, gt=0)
    threshold: int = Field(default=13, ge=0)


OF_THE_POLICY = {
    "prompt": "the rows of data bring it",
    "generator": "rows have seeds of their own, from the recipe's seed",
    "num_inference_steps": "it is a key of sampling itself",
    "num_images_per_prompt": "group_size says how many samples a prompt has",
    "num_videos_per_prompt": "group_size says how many samples a prompt has",
    "num_waveforms_per_prompt": "group_size says how many samples a prompt has",
    "return_dict": "leave it out",
}
"""Arguments of a pipeline's call that a policy sets by itself, and what to do instead."""
SHARES = ("cps", "ancestral", "renoise")
"""Kernels whose noise level is a share, at most 1."""


class DiffusionSampling(Block):
    """The behaviour policy of a diffusers pipeline."""

    num_inference_steps: int = Field(default=10, ge=1)
    kernel: Literal["auto", "flow_sde", "dance_sde", "cps", "ddim", "ancestral", "renoise"] = "auto"
    """The transition kernel; auto: from the pipeline's scheduler (flow_sde, ddim, ancestral for noise that is added to
    the sample as in EDM, renoise for consistency models)."""
    noise_level: float = Field(default=0.7, ge=0)
    """Noise of the kernel: Flow-GRPO's eta for flow_sde, the diffusion coefficient of dance_sde, the share of a quarter
    turn for cps (at most 1), DDIM's eta for ddim, the share of the ancestral noise (ancestral) or of the fresh noise
    (renoise; 1: as those samplers have it). 0: deterministic, nothing to train on."""
    noise_steps: int | None = Field(default=None, ge=1)
    """How many steps are stochastic and trained; the others follow the ODE, and are neither stored nor trained. None:
    all (of noise_range)."""
    noise_place: Literal["first", "random", "window", "branch"] = "first"
    """Which steps of noise_range those are. first: the first ones, which lay out the picture. random: a subset, drawn
    anew for each rollout. window: consecutive ones that move as noise_shift says (MixGRPO). branch: consecutive ones
    from a step drawn anew for each rollout, up to which a group is one trajectory (Flow-GRPO-Fast)."""
    noise_range: tuple[int, int] | None = None
    """The steps that may be stochastic: from, up to but without. None: all."""
    noise_shift: NoiseShift = NoiseShift()
    initial_noise: Literal["own", "group"] = "own"
    """group: the trajectories of a group start from the same noise (DanceGRPO)."""
    state_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What rollouts round their states to before they score and store them; replay stays exact. None: nothing."""
    store_outputs: bool = False
    """Rollouts also store what the denoiser gave, for guidance that remembers earlier steps (a momentum)."""
    call: dict[str, Any] = {}
    """Further arguments of the pipeline's call, for instance guidance_scale, height, width."""

    @model_validator(mode="after")
    def _consistent(self) -> "DiffusionSampling":
        for key, instead in OF_THE_POLICY.items():
            if key in self.call:
                raise ValueError(f"call: {key} is not given here; {instead}")
        if self.kernel in SHARES and self.noise_level > 1:
            raise ValueError(f"noise_level: {self.kernel} takes a share of the noise, at most 1")
        first, stop = self.noise_range or (0, self.num_inference_steps)
        if not 0 <= first < stop <= self.num_inference_steps:
            raise ValueError(
                f"noise_range: [{first}, {stop}] is no range of the {self.num_inference_steps} steps; "
                f"use for instance [0, {self.num_inference_steps // 2 or 1}]"
            )
        if self.noise_place != "first" and (self.noise_steps is None or self.noise_steps > stop - first):
            raise ValueError(
                f"noise_steps: noise_place {self.noise_place} needs the number of steps, at most {stop - first}"
            )
        return self

    @property
    def num_noisy(self) -> int:
        """Stochastic steps of a trajectory, at most."""
        first, stop = self.noise_range or (0, self.num_inference_steps)
        return min(self.noise_steps or stop - first, stop - first)


class TokenSampling(Block):
    """What every policy that draws tokens shares: the logits processors, in this order."""

    temperature: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    chat_template: bool = True
    """Render prompts with the processor's chat template."""
    chat_template_arguments: dict[str, Any] = {}
    """What the template is told beside the messages, for instance enable_thinking: false (Qwen3), or tools."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are refused (never cut: a cut inside an image breaks the model)."""


class TextSampling(TokenSampling):
    """The behaviour policy of a transformers generator."""

    max_new_tokens: int = Field(default=64, ge=1)
    end_tokens: list[str] = []
    """Tokens that end a text beside those that the model's generation config and its tokenizer name, for instance
    <|im_end|> of a base model that is asked with a chat template."""
    special_tokens: list[str] = []
    """Special tokens that may be drawn, and that rewards see in the text (gpt-oss's <|channel|>, Magistral's [THINK]).
    All others but ends are never drawn: a drawn picture token would break the next forward."""


class Think(TextSampling):
    """The text that an image-token policy writes before it draws: its own segment, `text`."""

    instruction: str = "{prompt}"
    """What the model is asked for its text."""
    draw: str = "{prompt}. {text}"
    """What it is then asked to draw."""


class ImageTokenSampling(TokenSampling):
    """The behaviour policy of a transformers model that draws with tokens (Janus, Emu3, Chameleon, GLM-Image)."""

    guidance_scale: float = Field(default=5.0, ge=1)
    """Weight of the prompt against the unconditional row; tokens are drawn from, and scored under, the guided
    distribution. 1: no guidance, half the work."""
    negative_prompt: str | None = None
    """What the model is guided away from; None: the family's own empty prompt."""
    think: Think | None = None
    """Write a text first, and draw from the prompt and the text; None: draw at once."""
    processor: dict[str, Any] = {}
    """Further arguments of the model's processor: ratio and image_area (Emu3), target_h and target_w (GLM-Image)."""
    decoder: str | None = None
    """A function that makes pictures of tokens in place of the model's decoder: `package.module:name`, `FILE.py:name`.
    It takes codes [B, height, width] (numbers of the codebook) and returns B PIL pictures. Chameleon needs one, and
    GLM-Image without its pipeline: transformers has only their encoders."""


class Estimated(Block):
    """How the likelihood of a masked-diffusion sample is evaluated."""

    estimator: Literal["trajectory", "random_mask", "coupled_mask"] = "trajectory"
    """What is scored. trajectory: the tokens that each step of the sampler commits, in their own context (exact).
    random_mask: the finished sample's tokens under num_masks random masks (UniGRPO). coupled_mask: under num_masks
    pairs of complementary masks, so that every token is scored."""
    num_masks: int = Field(default=2, ge=1)
    mask_ratio: tuple[float, float] = (0.1, 0.9)
    """Range that the masked share of the estimators is drawn from."""

    @model_validator(mode="after")
    def _is_range(self) -> "Estimated":
        low, high = self.mask_ratio
        if not 0 <= low <= high <= 1:
            raise ValueError(f"mask_ratio: [{low:g}, {high:g}] is no range of shares; try [0.1, 0.9]")
        return self

    @property
    def most_steps(self) -> int:
        """Steps of the sampler's loop, at most."""
        raise NotImplementedError

    @property
    def num_scored(self) -> int:
        """Steps of a trajectory that are scored, at most."""
        masks = {"random_mask": self.num_masks, "coupled_mask": 2 * self.num_masks}
        return masks.get(self.estimator) or self.most_steps


class MaskedDiffusionSampling(Estimated):
    """The behaviour policy of a masked-diffusion pipeline (aMUSEd)."""

    num_inference_steps: int = Field(default=12, ge=1)
    call: dict[str, Any] = {}
    """Further arguments of the pipeline's call, for instance guidance_scale, temperature."""

    @model_validator(mode="after")
    def _consistent(self) -> "MaskedDiffusionSampling":
        if self.estimator != "trajectory" and self.num_scored >= self.num_inference_steps:
            raise ValueError(
                f"num_masks: {self.estimator} replays {self.num_scored} states in the sampler's loop, which has only"
                f" {self.num_inference_steps} steps (num_inference_steps); it needs one more than states"
            )
        return self

    @property
    def most_steps(self) -> int:
        return self.num_inference_steps


class MaskedTextSampling(TokenSampling, Estimated):
    """The behaviour policy of a text denoiser (LLaDA2, DiffusionGemma, masked language models): it fills in a block of
    tokens after the other. Tokens are drawn from, and scored under, the distribution that the logits processors above
    leave."""

    max_new_tokens: int = Field(default=64, ge=1)
    num_inference_steps: int = Field(default=32, ge=1)
    """Steps in which a block is filled in: its tokens are spread over them, and confident ones come earlier."""
    block_length: int = Field(default=32, ge=1)
    """Tokens of a block. DiffusionGemma's are given by its config, canvas_length."""
    threshold: float = Field(default=0.95, ge=0)
    """Tokens that are drawn with a probability above it are kept at once; above 1: never."""
    editing_threshold: float | None = Field(default=None, gt=0, le=1)
    """Tokens that were filled in are replaced by others drawn with a probability above it; None: they stay."""
    call: dict[str, Any] = {}
    """Further arguments of the call: eos_early_stop, and of LLaDA2's mask_token_id, max_post_steps, minimal_topk."""

    @property
    def num_blocks(self) -> int:
        """Blocks of a text, at most: a prompt may end within the first one."""
        return -(-self.max_new_tokens // self.block_length) + 1

    @property
    def most_steps(self) -> int:
        return self.num_blocks * self.num_inference_steps


def exam_sampling(sampling: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings of evaluation: those of the policy with `changes`, call arguments one by one."""
    merged = {**sampling, **changes}
    if isinstance(changes.get("call"), dict) and isinstance(sampling.get("call"), dict):
        merged["call"] = {**sampling["call"], **changes["call"]}
    return merged


SAMPLING: dict[str, type[Block]] = {
    "diffusion": DiffusionSampling,
    "causal_lm": TextSampling,
    "image_tokens": ImageTokenSampling,
    "masked_diffusion": MaskedDiffusionSampling,
    "masked_text": MaskedTextSampling,
}
VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|image_encoder|vqmodel)\.")
"""Parts of language models that stay frozen unless `policy.train` names them."""
PIPELINES = ("diffusion", "masked_diffusion")
"""Families that are diffusers pipelines, with a folder a component; the others are transformers models."""
REMEMBERED_BYTES = 1 << 30
"""Of encodings of prompts and pictures that a policy keeps; beyond, the least recently used ones are dropped."""
STEPWISE = (*PIPELINES, "masked_text")
"""Families that evaluate one step a forward; the others evaluate all at once."""
MASKED_PIPELINES = ("AmusedPipeline",)
"""`_class_name` in model_index.json of the pipelines that fill in tokens."""
IMAGE_TOKEN_MODELS = ("janus", "emu3", "glm_image")
"""`model_type` of the transformers models that draw; to train one of them to answer, say family: causal_lm."""
TOKEN_WRITERS = ("glm_image",)
"""Those of them whose pictures a pipeline makes (policy.writer)."""
MASKED_TEXT_MODELS = ("llada2_moe", "diffusion_gemma")
"""`model_type` of the text denoisers; other masked language models are known by the end of their class's name."""
MASKED_TEXT_ENDING = "ForMaskedLM"


class Savings(Block):
    """Less memory for the same numbers; docs/memory.md says what each one saves and costs."""

    gradient_checkpointing: bool = False
    """Keep only each block's inputs for the backward pass and compute its activations again there."""
    text_encoders: Literal["keep", "offload", "drop"] = "keep"
    """A pipeline's, whose encodings are remembered. offload: on the CPU except while they encode. drop: all prompts of
    `data` are encoded before the run, then their weights are freed."""
    vae_slicing: bool = False
    """The VAE takes one picture at a time."""
    vae_tiling: bool = False
    """The VAE takes one tile of a large picture at a time; tiles are blended, so pictures differ a little."""
    decode_batch: int | None = Field(default=None, ge=1)
    """Samples that are decoded at once; None: all of a rollout batch."""


class Writer(Block):
    """A model before a pipeline: it writes the prompt that is drawn (segment `text`), or draws the tokens that the
    pipeline makes a picture of (segment `tokens`)."""

    model: str
    """A folder written by `save_pretrained`, or a hub name. It may be a component's folder within the pipeline's, which
    then is loaded once (GLM-Image's vision_language_encoder)."""
    family: Literal["causal_lm", "image_tokens"] = "causal_lm"
    """causal_lm: any transformers generator writes a text. image_tokens: GLM-Image's language model draws tokens; found
    from a folder's config if left out."""
    revision: str | None = None
    """Revision of a hub name; pin it."""
    instruction: str = "{prompt}"
    """What the writer is asked."""
    draw: str | None = None
    """What the pipeline is then asked to draw, of {text} and {prompt}. None: {text}; after tokens {prompt}."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None
    gradient_checkpointing: bool = False
    adapter: Adapter = Adapter()
    train: list[str] | None = None
    sampling: TextSampling | ImageTokenSampling = TextSampling()
    """These keys are as those of a policy; a writer whose segment has no block under objective is frozen, and so is a
    pipeline without objective.image."""

    @property
    def segment(self) -> str:
        """Name of what it writes."""
        return "text" if self.family == "causal_lm" else "tokens"

    @property
    def drawn(self) -> str:
        """Template of what the pipeline is asked to draw."""
        return self.draw or ("{text}" if self.family == "causal_lm" else "{prompt}")

    @property
    def block(self) -> "PolicyBlock":
        """The writer as a policy of its own."""
        keys = self.model_dump(exclude={"instruction", "draw", "gradient_checkpointing"})
        memory = Savings(gradient_checkpointing=self.gradient_checkpointing)
        return PolicyBlock(**keys, memory=memory)


class PolicyBlock(Block):
    """The model to train."""

    model: str
    """A folder written by `save_pretrained`, or a hub name."""
    revision: str | None = None
    """Revision of a hub name; pin it."""
    family: Literal["diffusion", "causal_lm", "image_tokens", "masked_diffusion", "masked_text"]
    """Found from the model if left out."""
    trust_remote_code: bool = False
    """Run the code that a masked_text model's repository brings (LLaDA2 has its class there). Read that code first: it
    runs with your rights. A hub name then needs the full commit hash as its revision."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None
    """Attention implementation by the library's own name (transformers: eager, sdpa, flash_attention_2...; diffusers:
    native, _native_math, flash...). None: the library's choice."""
    compile: bool = False
    """Compile the repeated blocks of a pipeline's denoiser (torch.compile, where diffusers offers it)."""
    memory: Savings = Savings()
    adapter: Adapter = Adapter()
    train: list[str] | None = None
    """Regular expressions on parameter names: only matching parameters are trained. None: the family's default. Of a
    pipeline with two denoisers (Wan 2.2), names begin with the component's, so that "^transformer_2[.]" trains, or
    adapts, only the one of the less noisy steps."""
    environment: EnvironmentBlock | None = None
    """What a language model acts in, turn by turn; `sampling` is then of one action. None: it answers once."""
    writer: Writer | None = None
    """A language model before a diffusion pipeline, which writes what is drawn; None: the prompts are drawn."""
    sampling: DiffusionSampling | TextSampling | ImageTokenSampling | MaskedDiffusionSampling | MaskedTextSampling

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments of this policy's trajectories, in the order in which they are sampled."""
        if isinstance(self.sampling, ImageTokenSampling):
            return ("image",) if self.sampling.think is None else ("text", "image")
        if self.writer is not None:
            return (self.writer.segment, "image")
        return ("image",) if self.family in PIPELINES else ("text",)

    def family_of(self, segment: str) -> str:
        """The family of the model that a segment is drawn by ("all": of the policy)."""
        return self.writer.family if self.writer is not None and segment == self.writer.segment else self.family

    def refusals(self, zero_stage: int) -> Iterator[tuple[str, str]]:
        """(key, reason and alternative) for each combination with other keys of the recipe that is refused."""
        if self.family == "masked_text" and zero_stage == 3:
            yield "engine.zero_stage", "3 gathers weights in step, but texts take different numbers of steps; use 2"
        if self.environment is not None:
            if self.family != "causal_lm":
                yield "policy.environment", f"is acted in by causal_lm policies, not by {self.family}; leave it out"
            if zero_stage == 3:
                yield (
                    "engine.zero_stage",
                    "3 gathers weights in step, but episodes differ in length; use 2",
                )
        if self.writer is not None:
            if self.family != "diffusion":
                yield "policy.writer", f"writes for diffusion pipelines, not for {self.family} policies; leave it out"
            if zero_stage == 3:
                yield "engine.zero_stage", "3 is not supported with a writer; use 2"
            if self.memory.text_encoders == "drop":
                yield "policy.memory.text_encoders", "drop needs to know all prompts before; with a writer use offload"
        if not self.trust_remote_code:
            return
        if self.family != "masked_text":
            yield "policy.trust_remote_code", f"{self.family} models never run code of their repository; leave it out"
        elif not Path(self.model).is_dir() and re.fullmatch("[0-9a-f]{40}", self.revision or "") is None:
            yield "policy.revision", "code that trust_remote_code runs must be pinned by a commit's 40 digits"

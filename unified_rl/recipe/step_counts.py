"""How many steps a trajectory has, as far as it is known before a model is loaded; must not import torch."""

import json
from pathlib import Path

from unified_rl.recipe.policy import (
    DiffusionSampling,
    Estimated,
    ImageTokenSampling,
    PolicyBlock,
    TextSampling,
)
from unified_rl.recipe.schema import Recipe


def trained_steps(recipe: Recipe) -> int | None:
    """Most steps of one trajectory, over its trained segments, that an update trains; None: the model will tell."""
    counts = [_of_segment(recipe, name) for name in trained_segments(recipe)]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def trained_segments(recipe: Recipe) -> list[str]:
    """The segments that the recipe has an objective for."""
    return [name for name in recipe.policy.segments if recipe.trains(name)]


def step_windows(recipe: Recipe, steps: int) -> int:
    """Forward and backward passes over the same rows of a denoiser in an update that trains `steps` of them: one for
    each, but gradients of rewards go through all of theirs at once."""
    gradients = [part.reward_gradient for part in recipe.objective.values() if part.kinds == {"reward"}]
    return max((one.copies if one.kind == "renoised" else 1 for one in gradients), default=steps)


def chain_windows(recipe: Recipe) -> int:
    """The same for a writer and its pipeline: all tokens in one forward, each denoising step in another."""
    steps = _of_segment(recipe, "image") if recipe.trains("image") else None
    return int(recipe.trains(recipe.policy.segments[0])) + (step_windows(recipe, steps) if steps is not None else 0)


def _of_segment(recipe: Recipe, name: str) -> int | None:
    sampling, objective = recipe.policy.sampling, recipe.objective_for(name)
    limit = objective.train_steps
    most: int | None
    writer = recipe.policy.writer
    if writer is not None and name == writer.segment:
        written = writer.sampling
        most = written.max_new_tokens if isinstance(written, TextSampling) else num_image_tokens(writer.block, written)
    elif isinstance(sampling, DiffusionSampling) and objective.kinds == {"reward"}:
        settings, limit = objective.reward_gradient, None
        most = min(settings.steps[1], sampling.num_inference_steps) if settings.kind == "last_steps" else 1
    elif isinstance(sampling, DiffusionSampling):
        most = sampling.num_noisy if "steps" in objective.kinds else sampling.num_inference_steps
    elif isinstance(sampling, Estimated):
        most = sampling.num_scored
    elif isinstance(sampling, TextSampling):
        most = sampling.max_new_tokens * num_turns(recipe.policy)
    elif name == "text":
        most = sampling.think.max_new_tokens if sampling.think is not None else 0
    else:
        most = num_image_tokens(recipe.policy, sampling)
    return most if most is None or limit is None else min(limit, most)


def num_turns(policy: PolicyBlock) -> int:
    """Most prompts and completions of a language model in one trajectory."""
    return 1 if policy.environment is None else policy.environment.max_turns


def num_image_tokens(policy: PolicyBlock, sampling: ImageTokenSampling) -> int | None:
    """Tokens of one picture, from the files of a model: a fixed number for Janus and Chameleon, from the asked area for
    Emu3, from the asked sides for GLM-Image (with the small grid)."""
    folder = Path(policy.model)
    if not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") == "janus":
        return config["vision_config"].get("num_image_tokens", 576)
    if config.get("model_type") == "chameleon":
        halvings = len(config["vq_config"].get("channel_multiplier", "12345")) - 1
        return (config["vq_config"].get("resolution", 512) >> halvings) ** 2
    if config.get("model_type") == "glm_image":
        tall, wide = (sampling.processor.get(key, side) // 32 for key, side in (("target_h", 1152), ("target_w", 768)))
        return tall * wide + int(16 * (tall / wide) ** 0.5) * int(16 * (wide / tall) ** 0.5)
    width, height = (int(side) for side in sampling.processor.get("ratio", "1:1").split(":"))
    scale = (sampling.processor.get("image_area", 518400) / (width * height)) ** 0.5 / 8  # pixels of a token's side
    return round(height * scale) * round(width * scale)

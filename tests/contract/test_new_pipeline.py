"""A pipeline that diffusers may release tomorrow: a class and a denoiser that nothing of ours has seen, as they are."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.recipe.file import load_recipe
from unified_rl.recipe.policy import DiffusionSampling, PolicyBlock
from unified_rl.train import train
from unified_rl.types import Prompt

RECIPE = """
num_steps: 2
group_size: 4
prompts_per_step: 2
policy:
  model: {model}
  family: diffusion
  sampling: {{num_inference_steps: 3, noise_level: 0.7, call: {{strength: 2.0}}}}
data: {{prompts: {prompts}}}
rewards: [{{name: "{reward}:brightness"}}]
objective: {{preset: flow_grpo}}
optimizer: {{lr: 0.01}}
engine: {{micro_batch: 4, threads: 1}}
"""


class Mixer(ModelMixin, ConfigMixin):
    """Predicts a velocity from pixels, the time and how much red is wanted; called twice a step."""

    @register_to_config
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, width), nn.SiLU(), nn.Linear(width, 3))

    def forward(self, pixels: Tensor, wanted: Tensor, time: Tensor) -> tuple[Tensor]:
        extra = torch.stack([wanted, time.expand(len(pixels))], dim=-1)[:, None].expand(-1, pixels.shape[1], -1)
        return (self.inner(torch.cat([pixels, extra], dim=-1)),)


class TomorrowsPipeline(DiffusionPipeline):
    """Two phases, each with its own schedule: four pixels as a sequence, then the same ones refined."""

    def __init__(self, transformer: Mixer, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt: list[str], generator=None, num_inference_steps: int = 4, strength: float = 1.0):
        wanted = torch.tensor([float(text.count("red")) for text in prompt])
        latents = randn_tensor((len(prompt), 4, 3), generator=generator)
        for _phase in range(2):
            self.scheduler.set_timesteps(num_inference_steps)
            if _phase:
                latents = 0.5 * latents + 0.5 * latents.flip(1)
            for t in self.scheduler.timesteps:
                plain = self.transformer(latents, torch.zeros_like(wanted), t / 1000)[0]
                asked = self.transformer(latents, wanted, t / 1000)[0]
                latents = self.scheduler.step(plain + strength * (asked - plain), t, latents, return_dict=False)[0]
        images = ((latents.reshape(-1, 2, 2, 3) + 1) / 2).clamp(0, 1)
        return (self.numpy_to_pil(images.float().numpy()),)


def brightness(prompts: list, completions: list, **columns: list) -> list[float]:
    return [sum(sum(pixel) for pixel in image.get_flattened_data()) / 3060 for image in completions]


def pipeline() -> TomorrowsPipeline:
    torch.manual_seed(0)
    return TomorrowsPipeline(Mixer(), FlowMatchEulerDiscreteScheduler(shift=2.0))


@pytest.mark.parametrize("noise_steps", [None, 1])
def test_a_new_class_replays_through_both_of_its_phases(noise_steps: int | None):
    sampling = DiffusionSampling(num_inference_steps=3, noise_level=0.7, noise_steps=noise_steps)
    policy = DiffusionPolicy(pipeline(), PolicyBlock(model="new", family="diffusion", sampling=sampling))
    prompts = [Prompt(text=text, images=(), columns={}, group_id=0, seed=row) for row, text in enumerate(("red", "a"))]
    segment = policy.sample(prompts).segments["image"]
    noisy = segment.loss_mask[0].nonzero().flatten().tolist()
    assert segment.rollout_log_probs.shape == (2, 6) and noisy == ([0] if noise_steps else [0, 1, 2, 3, 4, 5])
    assert policy.max_steps["image"] == max(len(noisy), noise_steps or 3)
    for step in noisy:
        for rows in (slice(0, 2), slice(1, 2)):
            scored = policy.log_prob("image", segment.rows(rows), slice(step, step + 1)).log_probs[:, 0]
            assert (scored - segment.rollout_log_probs[rows, step]).abs().max() <= 1e-6
        scored.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in policy.module.parameters())


def test_a_new_class_trains_without_any_code_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\nred red\n", encoding="utf-8")
    pipeline().save_pretrained(tmp_path / "model")
    recipe_file = tmp_path / "new.yaml"
    recipe_file.write_text(RECIPE.format(model=tmp_path / "model", prompts=prompts, reward=__file__), encoding="utf-8")
    made = pipeline()
    # diffusers finds a class that it does not export by its module; here it is handed over.
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: made)
    before = [parameter.clone() for parameter in made.transformer.parameters()]
    assert train(load_recipe(str(recipe_file), []), tmp_path / "run", resume="never") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["replay_gap"] <= 1e-5 and row["grad_norm"] > 0 for row in rows)
    assert any(not torch.equal(a, b) for a, b in zip(before, made.transformer.parameters(), strict=True))

"""Wan 2.2 has a transformer for the noisy steps and one for the others: each is trained by the steps that it draws, and
what is saved of both loads in diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from unified_rl.engine.local import LocalEngine
from unified_rl.planning.weights import measure
from unified_rl.policies import build_policy
from unified_rl.recipe.file import dump_recipe, parse_recipe
from unified_rl.run_folder.checkpoint import save_checkpoint
from unified_rl.run_folder.export import export
from unified_rl.snapshots import Snapshots
from unified_rl.tiny.models import write_twin
from unified_rl.types import Prompt

PROMPTS = [Prompt(text=text, images=(), columns={}, group_id=0, seed=seed) for seed, text in enumerate(("a cat", "b"))]
CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16, "guidance_scale": 2.0}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twins") / "wan22"
    write_twin("WanPipeline-2.2", folder)
    return folder


def policy_of(twin: Path, *, with_reference: bool = False, **block: Any) -> tuple[Any, Any]:
    sampling = {"num_inference_steps": NUM_STEPS, "noise_level": 0.7, "call": CALL}
    raw = {
        "policy": {"model": str(twin), "adapter": {"kind": "lora", "rank": 2}, "sampling": sampling, **block},
        "data": {"prompts": "x.txt"},
        "rewards": [{"name": "compressibility"}],
        "objective": {"preset": "flow_grpo", "kl": {"coef": 0.1 if with_reference else 0.0}},
    }
    recipe = parse_recipe(raw, twin)
    torch.manual_seed(0)
    return build_policy(recipe, torch.device("cpu")), recipe


def stir(module: Any) -> None:
    """Other weights than the adapters' first ones, which do nothing."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def touched(policy: Any) -> set[str]:
    named = policy.module.named_parameters()
    return {name.split(".")[0] for name, p in named if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_each_step_is_replayed_through_the_transformer_that_drew_it(twin: Path, kind: str):
    policy, _ = policy_of(twin, adapter={"kind": kind, "rank": 2}, with_reference=True)
    stir(policy.module)
    segment = policy.sample(PROMPTS).segments["image"]
    found = []
    for step in segment.loss_mask[0].nonzero().flatten().tolist():
        policy.module.zero_grad()
        log_probs = policy.log_prob("image", segment, slice(step, step + 1)).log_probs[:, 0]
        assert torch.equal(log_probs.detach(), segment.rollout_log_probs[:, step])
        log_probs.sum().backward()
        found.append(touched(policy))
        with torch.no_grad(), policy.reference():
            base = policy.log_prob("image", segment, slice(step, step + 1)).log_probs[:, 0]
        assert not torch.equal(base, log_probs)
    # shift 3 puts the first two of the four steps above 0.875 of the schedule
    assert found[0] == {"transformer"} and found[-1] == {"transformer_2"}
    assert all(len(parts) == 1 for parts in found)


def test_a_pattern_trains_one_of_them(twin: Path):
    policy, recipe = policy_of(twin, train=["^transformer_2[.]"])
    names = [name for name, parameter in policy.module.named_parameters() if parameter.requires_grad]
    assert names and all(name.startswith("transformer_2.") and "lora_" in name for name in names)
    both, _ = policy_of(twin)
    counted = sum(p.numel() for p in both.module.parameters() if p.requires_grad)
    sizes = measure(recipe.policy.model_copy(update={"train": None}), with_reference=False)
    assert sizes is not None and sizes.trained == counted


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_checkpoint_of_both_is_restored_and_exported(twin: Path, tmp_path: Path, kind: str):
    policy, recipe = policy_of(twin, adapter={"kind": kind, "rank": 2})
    stir(policy.module)
    engine = LocalEngine(policy.module, recipe.optimizer, num_steps=1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    save_checkpoint(run, 1, policy=policy, engine=engine, snapshots=Snapshots(engine, {}), state={}, keep=1)
    fresh, _ = policy_of(twin, adapter={"kind": kind, "rank": 2})
    fresh.restore(run / "checkpoints" / "step_000001" / "policy")
    for (name, weight), other in zip(policy.module.named_parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(weight, other), name
    export(run, tmp_path / "out", form="diffusers")
    if kind == "lora":
        loaded = WanPipeline.from_pretrained(twin)
        loaded.load_lora_weights(tmp_path / "out" / "transformer")
        loaded.load_lora_weights(tmp_path / "out" / "transformer_2", load_into_transformer_2=True)
        export(run, tmp_path / "merged", form="merged")
        export(run, tmp_path / "peft", form="peft")
        assert (tmp_path / "peft" / "transformer_2" / "adapter_config.json").is_file()
    else:
        loaded = WanPipeline.from_pretrained(tmp_path / "out")
    for name in ("transformer", "transformer_2"):
        expected = denoise(policy.module[name])
        torch.testing.assert_close(denoise(getattr(loaded, name)), expected, rtol=1e-4, atol=1e-5)
        if kind == "lora":
            merged = WanPipeline.from_pretrained(tmp_path / "merged")
            torch.testing.assert_close(denoise(getattr(merged, name)), expected, rtol=1e-4, atol=1e-4)


def denoise(transformer: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 16, 2, 4, 4, generator=draw),
            encoder_hidden_states=torch.randn(1, 6, 32, generator=draw),
            timestep=torch.tensor([300.0]),
            return_dict=False,
        )[0]

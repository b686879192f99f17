"""A run on a GPU: every tensor is where the computation is, and what is drawn does not depend on the device.

No machine without a GPU can run one, so the GPU is pretended (pretended_gpu.py): whole runs, checkpoint included.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch

from reward_models import digit_likeness
from tests.contract.pretended_gpu import GPU, OnGpu, pretended_gpu
from unified_rl.cli import main
from unified_rl.engine import distributed
from unified_rl.run_folder.tracking import read_jsonl

SMALL = [
    "num_steps=1",
    "group_size=4",
    "prompts_per_step=2",
    "evaluation.num_prompts=2",
    "evaluation.num_saved=1",
    "engine.micro_batch=4",
    "engine.threads=1",
    "rewards.0.isolation=thread",
]
CASES = {
    "quickstart": ["policy.sampling.num_inference_steps=3", "policy.sampling.noise_steps=2", "objective.kl.coef=0.01"],
    "quickstart_nft": ["policy.sampling.num_inference_steps=4", "objective.train_steps=2"],
    "quickstart_draft": ["policy.sampling.num_inference_steps=3", "rewards.1.isolation=thread"],
    "quickstart_vlm": ["objective.preset=ppo", "policy.adapter={kind: lora, rank: 4}", "ema={decay: 0.9}"],
    "quickstart_think_then_draw": [],
    "quickstart_masked_diffusion": ["policy.sampling.num_inference_steps=3"],
    "quickstart_vla": ["policy.environment.max_turns=2"],
    "llada2_uni_grpo": ["--tiny"],
}

ADAPTED = ("quickstart_vlm", "llada2_uni_grpo")
"""The device's own generator initialises adapters, so that their gradients differ."""


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended_gpu():
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        assert there.device == GPU and (there + 1.0).device == GPU and there.cpu().device == here.device
        assert isinstance(there.clone(), OnGpu) and (here.to(there) + there).tolist() == [2.0, 2.0, 2.0]
        assert there[torch.tensor([1])].device == GPU
        for wrong in (
            lambda: there + here,
            lambda: torch.where(there > 0, there, here),
            lambda: here[there.long()],
            lambda: torch.randn(3, device=GPU, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        layer = torch.nn.Linear(3, 1).to(GPU)
        layer(there[None]).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.device == GPU


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_a_gpu_draws_and_learns_as_on_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["train", name, *SMALL, *CASES[name]]
    assert main([*words, "--output", str(tmp_path / "cpu")]) == 0
    judge = digit_likeness._network
    # A copy goes to the pretended GPU, where every operation is slow: fitting it there would take most of the time.
    monkeypatch.setattr(digit_likeness, "_network", functools.cache(lambda: copy.deepcopy(judge())))
    monkeypatch.setattr(distributed, "device", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(8, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    with pretended_gpu():
        assert main([*words, "--output", str(tmp_path / "gpu")]) == 0
    first, second = (read_jsonl(tmp_path / device / "metrics.jsonl")[0] for device in ("cpu", "gpu"))
    for key in ("reward", "loss", "grad_norm")[: 2 if name in ADAPTED else 3]:
        assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5)
    assert second["replay_gap"] == pytest.approx(0.0, abs=1e-4)
    assert list((tmp_path / "gpu/checkpoints/step_000001").glob("manifest.json"))

"""Every switch that saves memory or time leaves the numbers as they are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.modeling_utils import ModelMixin

from unified_rl.cli import main
from unified_rl.errors import RecipeError
from unified_rl.planning.footprint import estimate
from unified_rl.policies.attention import load_with_attention
from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.policies.denoisers import Denoisers
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.encoders import TextEncoders
from unified_rl.policies.memo import Memo
from unified_rl.policies.savings import apply, checkpoint_blocks, in_chunks
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.policy import Adapter, DiffusionSampling, PolicyBlock, Savings, TextSampling
from unified_rl.types import Prompt, Segment
from unified_rl.worlds import shapes

CPU = torch.device("cpu")
PIPELINES = ["shapes_sd3", "digits_unet"]


def prompts(num: int) -> list[Prompt]:
    texts = ["a red circle", "two blue squares"]
    return [Prompt(text=texts[row % 2], images=(), columns={}, group_id=row % 2, seed=row) for row in range(num)]


def pipeline_policy(
    folder: Path, *, compiled: bool = False, attention: str | None = None, **savings: Any
) -> DiffusionPolicy:
    torch.manual_seed(0)
    block = PolicyBlock(
        model=str(folder),
        family="diffusion",
        attention=attention,
        compile=compiled,
        memory=Savings(**savings),
        adapter=Adapter(kind="lora", rank=4),
        sampling=DiffusionSampling(num_inference_steps=3, noise_level=0.8, call={"guidance_scale": 2.0}),
    )
    assert isinstance(block.sampling, DiffusionSampling)
    return DiffusionPolicy.load(block, evaluation=block.sampling, with_reference=True, device=CPU)


def gradients(policy: Any, name: str, segment: Segment, steps: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    stats = policy.log_prob(name, segment, steps)
    stats.log_probs.square().sum().backward()
    found = {key: p.grad.clone() for key, p in policy.module.named_parameters() if p.grad is not None}
    policy.module.zero_grad()
    return stats.log_probs.detach(), found


def saved_bytes(policy: Any, name: str, segment: Segment, steps: slice) -> int:
    """Bytes that the forward of one window keeps for its backward, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.log_prob(name, segment, steps)
    return sum(size for pointer, size in storages.items() if pointer not in own)


def assert_same(first: Any, second: Any) -> None:
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys() and first[1]
    for key, gradient in first[1].items():
        torch.testing.assert_close(second[1][key], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_checkpointing_a_denoiser_changes_no_gradient(quickstart: Path, name: str):
    plain, saving = pipeline_policy(quickstart / name), pipeline_policy(quickstart / name, gradient_checkpointing=True)
    segment = plain.sample(prompts(4)).segments["image"]
    assert torch.equal(saving.sample(prompts(4)).segments["image"].rollout_log_probs, segment.rollout_log_probs)
    first, second = (gradients(policy, "image", segment, slice(1, 2)) for policy in (plain, saving))
    assert_same(first, second)
    kept, fewer = (saved_bytes(policy, "image", segment, slice(1, 2)) for policy in (plain, saving))
    assert fewer < 0.8 * kept, f"{fewer} of {kept} bytes"


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_a_language_model_changes_no_gradient(quickstart: Path, lora: bool):
    rows = shapes.heldout_questions(4)
    asked = [
        Prompt(text=row["prompt"], images=(row["image"],), columns=row, group_id=index, seed=index)
        for index, row in enumerate(rows[:2] * 2)
    ]
    policies = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        block = PolicyBlock(
            model=str(quickstart / "shapes_vlm"),
            family="causal_lm",
            memory=Savings(gradient_checkpointing=checkpointing),
            adapter=Adapter(kind="lora" if lora else "none", rank=4),
            sampling=TextSampling(max_new_tokens=8),
        )
        assert isinstance(block.sampling, TextSampling)
        policies.append(
            CausalLMPolicy.load(
                block, evaluation=block.sampling, with_reference=False, entropy_gradient=False, device=CPU
            )
        )
    plain, saving = policies
    plain.shares_prefill = saving.shares_prefill = False  # checkpointing computes every prompt in scoring
    segment = plain.sample(asked).segments["text"]
    assert torch.equal(saving.sample(asked).segments["text"].rollout_log_probs, segment.rollout_log_probs)
    assert_same(*(gradients(policy, "text", segment, slice(None)) for policy in policies))
    kept, fewer = (saved_bytes(policy, "text", segment, slice(None)) for policy in policies)
    assert fewer < 0.6 * kept, f"{fewer} of {kept} bytes"
    modes = [[module.training for module in policy.module.modules()] for policy in policies]
    assert modes[0] == modes[1], "training mode is left again"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_estimate_of_activations_is_right_within_a_factor_of_two(quickstart: Path, name: str, checkpointing: bool):
    raw = {
        "policy": {
            "model": str(quickstart / name),
            "adapter": {"kind": "lora", "rank": 4},
            "memory": {"gradient_checkpointing": checkpointing},
            "sampling": {"call": {"guidance_scale": 2.0}},
        },
        "data": {"prompts": "x.txt"},
        "rewards": [{"name": "compressibility"}],
        "engine": {"micro_batch": 8},
    }
    footprint = estimate(parse_recipe(raw, quickstart))
    assert footprint is not None and footprint.activations is not None
    policy = pipeline_policy(quickstart / name)
    segment = policy.sample(prompts(8)).segments["image"]
    kept = saved_bytes(policy, "image", segment, slice(1, 2))
    if checkpointing:
        assert footprint.activations < 0.7 * kept, "and less with checkpointing"
    else:
        assert 0.5 * kept < footprint.activations < 2 * kept


def test_attention_backends_of_diffusers(quickstart: Path):
    """FLUX's attention takes one, by name; SD3's takes none, which is not passed over in silence. Other models keep
    theirs."""
    before = _AttentionBackendRegistry.get_active_backend()
    torch.manual_seed(0)
    keys = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    part = FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), **keys
    )
    inputs = {
        **{"hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 8)},
        **{"pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5])},
        **{"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)},
    }
    plain = part(**inputs).sample
    block = PolicyBlock(model="x", family="diffusion", attention="_native_math", sampling=DiffusionSampling())
    pipeline = SimpleNamespace(transformer=part, components={"transformer": part})
    Denoisers(pipeline, block, with_reference=False)
    assert {module.processor._attention_backend.value for module in part.modules() if hasattr(module, "processor")} == {
        "_native_math"
    }
    torch.testing.assert_close(part(**inputs).sample, plain, rtol=0, atol=1e-6)
    for name, message in (
        ("nativ", "no backend 'nativ' of diffusers; did you mean 'native'"),
        ("flash", "flash cannot run here: "),
    ):
        with pytest.raises(RecipeError, match=f"policy.attention: {message}"):
            Denoisers(pipeline, block.model_copy(update={"attention": name}), with_reference=False)
    assert _AttentionBackendRegistry.get_active_backend() == before
    with pytest.raises(RecipeError, match=r"policy\.attention: SD3Transformer2DModel has no attention that takes a"):
        pipeline_policy(quickstart / "shapes_sd3", attention="native")


def test_attention_of_transformers(quickstart: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """By name; one that is unknown, missing here or changed to another is a mistake of the recipe."""

    def load(name: str | None) -> Any:
        sampling = TextSampling(max_new_tokens=4)
        block = PolicyBlock(model=str(quickstart / "shapes_vlm"), family="causal_lm", attention=name, sampling=sampling)
        return CausalLMPolicy.load(
            block, evaluation=sampling, with_reference=False, entropy_gradient=False, device=CPU
        ).module

    assert load(None).config._attn_implementation == "sdpa"
    eager = load("eager")
    assert {part.config._attn_implementation for part in eager.modules() if hasattr(part, "config")} == {"eager"}
    for name, message in (
        ("egaer", "no attention 'egaer' of transformers; did you mean 'eager'"),
        ("someone/kernel", "no attention 'someone/kernel' of transformers; valid: eager, flash_attention_4, .*sdpa"),
        ("flash_attention_2", "flash_attention_2 cannot run here: "),
    ):
        with pytest.raises(RecipeError, match=f"policy.attention: {message}"):
            load(name)
    words = ["train", "quickstart_vlm", "policy.attention=egaer", "--output", str(tmp_path)]
    assert main(words) == 2 and "policy.attention: no attention 'egaer'" in capsys.readouterr().err
    other = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    with pytest.raises(RecipeError, match=r"policy\.attention: SimpleNamespace takes eager in place of sdpa"):
        load_with_attention(lambda **_: other, "sdpa")


@pytest.mark.parametrize("savings", [{"vae_slicing": True}, {"decode_batch": 1}, {"decode_batch": 3}])
def test_decoding_in_parts_gives_the_same_pictures(quickstart: Path, savings: dict[str, Any]):
    whole = pipeline_policy(quickstart / "shapes_sd3").sample(prompts(4))
    policy = pipeline_policy(quickstart / "shapes_sd3", **savings)
    sizes: list[int] = []
    vae = policy._pipeline.vae
    vae.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    parts = policy.sample(prompts(4))
    assert torch.equal(parts.segments["image"].rollout_log_probs, whole.segments["image"].rollout_log_probs)
    assert max(sizes) == savings.get("decode_batch", 1) and sum(sizes) == 4
    for one, other in zip(parts.completions, whole.completions, strict=True):
        assert max(abs(a - b) for a, b in zip(one.images[0].tobytes(), other.images[0].tobytes(), strict=True)) <= 1


def test_tiling_is_the_vaes_own_switch(quickstart: Path):
    """What it does with a picture of more than one tile is diffusers' own."""
    plain, tiled = (pipeline_policy(quickstart / "shapes_sd3", vae_tiling=on) for on in (False, True))
    assert tiled._pipeline.vae.use_tiling and not plain._pipeline.vae.use_tiling


def test_chunks_cut_what_belongs_to_rows():
    def decode(latents, levels, *, names, shared):
        assert len(latents) == len(levels) == len(names) <= 2
        return (latents * levels + shared,)

    latents, levels = torch.arange(5.0), torch.arange(5.0)
    (found,) = in_chunks(decode, 2)(latents, levels, names=list("abcde"), shared=torch.ones(1))
    assert found.tolist() == [1.0, 2.0, 5.0, 10.0, 17.0]


@pytest.mark.parametrize("mode", ["offload", "drop"])
def test_text_encoders_out_of_the_way(quickstart: Path, mode: str):
    plain = pipeline_policy(quickstart / "shapes_sd3").sample(prompts(4))
    policy = pipeline_policy(quickstart / "shapes_sd3", text_encoders=mode)
    policy.encode_ahead(prompts(2))
    encoder = policy._pipeline.text_encoder
    assert sum(parameter.untyped_storage().nbytes() for parameter in encoder.parameters()) == 0
    sampled = policy.sample(prompts(4))
    segment = sampled.segments["image"]
    assert torch.equal(segment.rollout_log_probs, plain.segments["image"].rollout_log_probs)
    with torch.no_grad():
        assert torch.equal(policy.log_prob("image", segment, slice(0, 3)).log_probs, segment.rollout_log_probs)
    policy.sample(prompts(2), evaluation=True)
    assert sum(parameter.untyped_storage().nbytes() for parameter in encoder.parameters()) == 0
    stranger = [Prompt(text="a green star", images=(), columns={}, group_id=0, seed=0)]
    if mode == "drop":
        with pytest.raises(RecipeError, match=r"text_encoders: drop encodes all prompts .* use offload"):
            policy.sample(stranger)
    else:
        policy.sample(stranger)


def test_parts_of_an_encoding_that_rows_share_are_remembered_with_each_row():
    """FLUX's positions of tokens have no row dimension; what grows in another way is kept by the whole call."""
    calls: list[list[str]] = []

    def encode(prompt: list[str], guided: bool = False):
        calls.append(prompt)
        words = torch.tensor([[float(len(word)), float(ord(word[0]))] for word in prompt])
        return torch.cat([words, -words]) if guided else words, torch.arange(6.0).view(3, 2), None

    memo = Memo()
    for rows, fresh in ((["a"], [["a"], ["a", "a"]]), (["a", "bb"], [["bb"]]), (["bb", "a", "bb"], []), (["bb"], [])):
        found = memo.by_row("encode", encode, (rows,), {}, len(rows))
        assert calls == fresh
        calls.clear()
        words, positions, nothing = encode(rows)
        assert torch.equal(found[0], words) and torch.equal(found[1], positions) and found[2] is nothing is None
        calls.clear()
    for rows in (["a"], ["a", "a"], ["bb", "a"]):
        found = memo.by_row("encode", encode, (rows,), {"guided": True}, len(rows))
        assert torch.equal(found[0], encode(rows, guided=True)[0])


def test_a_part_that_only_seems_to_be_shared_is_encoded_as_a_whole():
    def encode(prompt: list[str]):
        return torch.ones(len(prompt), 2), torch.full((3,), float(len(prompt[0])))

    memo = Memo()
    assert memo.by_row("encode", encode, (["a", "a"],), {}, 2)[1].tolist() == [1.0] * 3
    assert memo.by_row("encode", encode, (["bb", "a"],), {}, 2)[1].tolist() == [2.0] * 3


class BarePipeline:
    """A pipeline without any of the parts that could be saved on."""

    components: dict[str, Any] = {}


class BareDenoiser(ModelMixin, ConfigMixin):
    _repeated_blocks: list[str] = []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"memory": {"gradient_checkpointing": True}},
            "policy.memory.gradient_checkpointing: BareDenoiser has no lists",
        ),
        ({"memory": {"vae_slicing": True}}, "policy.memory.vae_slicing: BarePipeline has no VAE"),
        ({"memory": {"vae_tiling": True}}, "policy.memory.vae_tiling: BarePipeline has no VAE"),
        ({"memory": {"decode_batch": 2}}, "policy.memory.decode_batch: BarePipeline has no VAE"),
        ({"compile": True}, "policy.compile: BareDenoiser has no repeated blocks"),
    ],
)
def test_what_a_pipeline_lacks_is_said(keys: dict[str, Any], message: str):
    sampling = DiffusionSampling()
    block = PolicyBlock.model_validate({"model": "x", "family": "diffusion", "sampling": sampling.model_dump(), **keys})
    with pytest.raises(RecipeError, match=message):
        apply(BarePipeline(), [BareDenoiser()], block)
    with pytest.raises(RecipeError, match=r"text_encoders: BarePipeline has none to offload"):
        TextEncoders(BarePipeline(), "offload")


def test_a_block_is_computed_again_from_its_inputs_as_they_were():
    """Some add in place to what they are given, by place or by name, alone or in a list."""

    class Adding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, *, skips: list[torch.Tensor]) -> torch.Tensor:
            x += self.inner.bias
            skips[0] += x
            return self.inner(x).sin() * self.inner(skips[0])

    torch.manual_seed(0)
    denoiser = BareDenoiser()
    denoiser.blocks = torch.nn.ModuleList([torch.nn.ModuleList([Adding()]), Adding()])
    first, last = denoiser.blocks[0][0], denoiser.blocks[1]
    x = torch.randn(4, 8)

    def run() -> tuple[torch.Tensor, ...]:
        y = last(first(x.clone(), skips=[x + 2]), skips=[x + 3])
        return y.detach(), *torch.autograd.grad(y.square().sum(), list(denoiser.parameters()))

    expected = run()
    checkpoint_blocks(denoiser)
    torch.testing.assert_close(run(), expected)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    block = PolicyBlock(model="x", family="diffusion", compile=True, sampling=DiffusionSampling())
    with pytest.raises(RecipeError, match=r"policy.compile: on a CPU it needs a C\+\+ compiler \(no-such-compiler\)"):
        apply(BarePipeline(), [BareDenoiser()], block)


def test_compiled_blocks_give_the_same_numbers():
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.nn.functional.gelu(self.inner(x))

    torch.manual_seed(0)
    denoiser = BareDenoiser()
    denoiser.blocks = torch.nn.ModuleList([Block(), Block()])
    x = torch.randn(4, 8)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        y = x
        for block in denoiser.blocks:
            y = block(y)
        return y.detach(), list(torch.autograd.grad(y.square().sum(), list(denoiser.parameters())))

    expected = run()
    apply(
        BarePipeline(),
        [denoiser],
        PolicyBlock(model="x", family="diffusion", compile=True, sampling=DiffusionSampling()),
    )
    assert all(block._compiled_call_impl is not None for block in denoiser.blocks)
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)

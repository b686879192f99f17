"""The replay contract over diffusers' pipeline classes: exact, or refused with a reason; never trained wrongly."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.contract.pipelines.build import Case, Kernel, build, call_settings, picture
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import NUM_STEPS, measure, measure_both, policy_of, prompts_of
from tests.contract.pipelines.components import betas
from tests.contract.pipelines.images import PROCESSED
from tests.contract.pipelines.table import DOCS, document, exported, task_of
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.pipeline_call import call_arguments
from unified_rl.policies.pipeline_table import PipelineRow, pipeline_table
from unified_rl.policies.probing import UNGUIDED
from unified_rl.policies.scheduler_head import UnsupportedPipelineError
from unified_rl.recipe.policy import DiffusionSampling, PolicyBlock, Savings
from unified_rl.types import Prompt

EXACT = [case for case in CASES if case.refused is None]
REFUSED = [case for case in CASES if case.refused is not None]
TOLERANCE = 1e-5
KERNELS = {row.name: row.kernel for row in pipeline_table()}


def case_of(name: str) -> Case:
    return next(case for case in EXACT if case.name == name)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_a_pipeline_replays_its_rollout(case: Case):
    measured, lora = measure_both(case)
    assert measured.kernel == KERNELS[case.name], "as the table says"
    assert measured.gap <= TOLERANCE, "at the rollout's batch shape"
    assert measured.row_gap <= max(case.row_tolerance, min(measured.rounding, 1e-4)), "one row alone"
    assert 0 < measured.smallest_gradient < float("inf")
    assert measured.checkpointing_gap <= 1e-4
    assert measured.encoded == measured.row_encoded == frozenset()
    assert lora.gap == 0.0 and 0 < lora.gradient < float("inf") and lora.others == 0


@pytest.mark.parametrize("name", ["AceStepPipeline", "HunyuanImagePipeline"])
def test_guidance_with_momentum_is_replayed_from_what_the_denoiser_gave(name: str):
    """Those of the steps after the last noisy one are not stored; without the others the momentum would be another."""
    case = case_of(name)
    policy = policy_of(case)
    segment = policy.sample(prompts_of(case)).segments["image"]
    noisy = segment.loss_mask[0].nonzero().flatten().tolist()
    assert [len(row) for row in segment.actions["outputs"]] == [noisy[-1] + 1] * 2  # type: ignore[arg-type]
    blind = dataclasses.replace(
        segment, actions={key: value for key, value in segment.actions.items() if key != "outputs"}
    )
    with torch.no_grad():
        for part, enough in ((segment, True), (segment.rows(slice(0, 1)), True), (blind, False)):
            stats = policy.log_prob("image", part, slice(noisy[-1], noisy[-1] + 1))
            gap = (stats.log_probs[:, 0] - part.rollout_log_probs[:, noisy[-1]]).abs().max()
            assert (gap <= TOLERANCE) if enough else (gap > 10 * TOLERANCE)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_negative_prompt_that_is_a_row_of_its_own_is_refused(rows: int):
    case = case_of("KandinskyV22PriorPipeline")
    policy = policy_of(dataclasses.replace(case, call=case.call | {"negative_prompt": "a blue star"}))
    with pytest.raises(UnsupportedPipelineError, match="leave negative_prompt out"):
        policy.sample(prompts_of(case)[:rows])


def test_several_rows_in_a_call_are_refused_where_they_would_share_their_pictures():
    case = case_of("BriaFiboEditPipeline")
    with pytest.raises(UnsupportedPipelineError, match="BriaFiboEditPipeline takes one row a call"):
        policy_of(case).sample(prompts_of(case))


@pytest.mark.parametrize(
    "name",
    [
        "LTXConditionPipeline",  # tokens with times of their own
        "SanaWMPipeline",  # some of which are held
        "Kandinsky6TI2VAPipeline",  # two schedulers
        "MochiPipeline",  # inverted sigmas
        "Cosmos2VideoToWorldPipeline",  # exploding ones
    ],
)
def test_without_noise_a_policy_samples_what_its_pipeline_does(name: str):
    case = case_of(name)
    pipeline, prompts = build(case), prompts_of(case)[: case.rows]
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    settings = call_settings(case) | {"num_inference_steps": NUM_STEPS}
    expected = pipeline(**call_arguments(type(pipeline), prompts, settings, lone=case.rows == 1))[0]
    drawn = policy_of(case, pipeline=pipeline, noise_level=0.0).sample(prompts).completions
    torch.testing.assert_close(torch.stack([completion.images[0] for completion in drawn]), expected)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_cannot_be_replayed_is_refused(case: Case):
    with pytest.raises(UnsupportedPipelineError, match=case.refused):
        policy_of(case).sample(prompts_of(case))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("StableDiffusion3Pipeline", "dance_sde"),
        ("StableDiffusion3Pipeline", "cps"),
        ("LDMTextToImagePipeline", "ddim"),
        ("StableDiffusionXLPipeline", "ancestral"),
    ],
)
def test_the_other_kernels_of_a_scheduler_replay(name: str, kernel: Kernel):
    case = case_of(name)
    if kernel == "ancestral":
        case = dataclasses.replace(
            case, components=case.components | {"scheduler": lambda: betas("EulerAncestralDiscreteScheduler")}
        )
    measured = measure(case, kernel)
    assert measured.kernel == kernel
    assert measured.gap <= TOLERANCE and measured.row_gap <= TOLERANCE
    assert 0 < measured.smallest_gradient < float("inf")


@pytest.mark.parametrize("kernel", ["cps", "ancestral", "renoise"])
def test_a_kernel_of_another_family_is_refused(kernel: Kernel):
    with pytest.raises(UnsupportedPipelineError, match=f"{kernel} does not fit DDIMScheduler; use ddim"):
        policy_of(case_of("StableDiffusionPipeline"), kernel)


def test_dynamic_thresholding_is_part_of_the_step():
    case = case_of("IFPipeline")
    bounded = {"scheduler": lambda: betas("DDPMScheduler", thresholding=True, sample_max_value=1.5)}
    assert measure(dataclasses.replace(case, components=case.components | bounded)).gap <= TOLERANCE


def test_the_table_accounts_for_every_class_that_diffusers_exports():
    """A new version of diffusers fails here until its new classes are tried, or refused with a reason."""
    rows = {row.name: row for row in pipeline_table()}
    assert rows.keys() == exported().keys()
    assert {name for name, row in rows.items() if row.replay == "exact"} == {case.name for case in EXACT}
    assert {row.replay for row in rows.values()} == {"exact", "refused"}
    for row in rows.values():
        assert row.note or row.replay == "exact", f"{row.name} needs a reason"
        assert bool(row.kernel) == (row.replay == "exact") and row.task == task_of(row.name)


def test_the_docs_show_the_table():
    assert DOCS.read_text(encoding="utf-8") == document(list(pipeline_table()))


@pytest.mark.parametrize("row", [row for row in pipeline_table() if row.replay == "refused"], ids=lambda row: row.name)
def test_a_class_that_is_refused_is_so_before_it_loads(row: PipelineRow, tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": row.name}), encoding="utf-8")
    block = PolicyBlock(model=str(tmp_path), family="diffusion", sampling=DiffusionSampling())
    with pytest.raises(UnsupportedPipelineError, match=re.escape(f"{row.name}: {row.note}")):
        DiffusionPolicy.load(block, evaluation=DiffusionSampling(), with_reference=False, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_dropped_text_encoders_leave_every_batch_of_their_texts(name: str):
    """FLUX encodes negative prompts in a second call; Qwen-Image pads to the longest text, and masks that."""
    case = case_of(name)
    if name == "QwenImagePipeline":  # with its own text encoder
        case = dataclasses.replace(case, components=case.components | PROCESSED, columns={})
    sampling = DiffusionSampling(num_inference_steps=NUM_STEPS, call=call_settings(case))
    assert sampling.call["true_cfg_scale"] > 1 and "negative_prompt" in sampling.call
    texts = ("a red circle", "two blue square on the left", "two blue circle on the left", "a star")
    prompts = [dataclasses.replace(prompts_of(case)[0], text=text, seed=seed) for seed, text in enumerate(texts)]
    drawn = []
    for mode in ("keep", "drop"):
        block = PolicyBlock(model=name, family="diffusion", sampling=sampling, memory=Savings(text_encoders=mode))
        policy = DiffusionPolicy(build(case), block)
        policy.encode_ahead(prompts)
        drawn.append([])
        for rows in ((0, 1), (1, 2), (0, 3), (0, 1, 2, 3), (3,)):
            segment = policy.sample([prompts[row] for row in rows]).segments["image"]
            drawn[-1].append(segment.rollout_log_probs)
            with torch.no_grad():
                assert torch.equal(policy.log_prob("image", segment, slice(0, 1)).log_probs, drawn[-1][-1][:, :1])
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=TOLERANCE)


def test_attention_that_a_replay_left_behind_is_gone_in_the_next_call():
    """PAG's own comes before the loop and goes after it, but a replay leaves the loop in between."""
    policy = policy_of(case_of("SanaPAGPipeline"))
    prompts = prompts_of(case_of("SanaPAGPipeline"))
    segment = policy.sample(prompts).segments["image"]
    policy.log_prob("image", segment, slice(0, 1)).log_probs.sum().backward()
    with next(probe for probe in policy.probes() if probe.change == UNGUIDED).active():
        assert policy.sample(prompts).segments["image"].rollout_log_probs.isfinite().all()


@pytest.mark.parametrize(
    ("name", "component", "calls"),
    [
        ("StableDiffusionControlNetPipeline", "controlnet", 1),
        ("Ideogram4Pipeline", "unconditional_transformer", 1),
        ("JoyImageEditPlusPipeline", "text_encoder", 0),
    ],
)
def test_a_replay_of_one_step_runs_frozen_parts_there_alone(name: str, component: str, calls: int):
    """A ControlNet, an unconditional model; an encoder of prompts with several pictures each, for the whole batch."""
    policy = policy_of(case_of(name))
    segment = policy.sample(prompts_of(case_of(name))).segments["image"]
    counted: list[int] = []
    first = next(getattr(policy._pipeline, component).children())
    first.register_forward_hook(lambda *_: counted.append(1))
    step = int(segment.loss_mask[0].nonzero()[-1])
    assert step > 0
    policy.log_prob("image", segment, slice(step, step + 1))
    assert len(counted) == calls


@pytest.mark.parametrize("name", ["MochiPipeline", "FluxPipeline"])
def test_the_levels_that_a_critic_sees_fall_from_noise(name: str):
    """Mochi's schedule is told from the other end."""
    policy = policy_of(case_of(name))
    segment = policy.sample(prompts_of(case_of(name))).segments["image"]
    levels = policy.states("image", segment, slice(None)).level
    assert levels[:, 0].tolist() == [1.0, 1.0] and (levels.diff(dim=1) < 0).all()


def test_blip_diffusion_is_refused_for_what_its_own_call_does():
    """It can be tried again once this fails."""
    case = next(case for case in REFUSED if case.name == "BlipDiffusionPipeline")
    words = {"source_subject_category": "circle", "target_subject_category": "star"}
    with pytest.raises(AttributeError, match="invert_attention_mask"):
        build(case)("red", reference_image=picture(0), **words)


class NotYetReleased:
    """A call that no pipeline of diffusers has."""

    def __call__(self, prompt: str | list[str], negative_prompt: str | list[str], video: list[Image.Image], size: int):
        """Nothing."""


def rows(**columns: tuple) -> list[Prompt]:
    return [
        Prompt(text=str(row), images=(), columns={k: v[row] for k, v in columns.items()}, group_id=0, seed=row)
        for row in range(2)
    ]


def test_columns_become_arguments_by_name():
    frames = [Image.new("RGB", (2, 2))]
    prompts = rows(negative_prompt=("x", "y"), size=(8, 8), video=(frames, frames), answer=(1, 2), prompt=("p", "q"))
    assert call_arguments(NotYetReleased, prompts, {}) == {
        "prompt": ["0", "1"],
        "negative_prompt": ["x", "y"],
        "size": 8,
        "video": [frames, frames],
    }


class EmbeddedText:
    """A call that wants a prompt, as a user's without defaults does, and refuses one beside its embeddings."""

    def __call__(self, image: Image.Image, prompt: str, prompt_embeds: torch.Tensor | None = None, generator=None):
        """Nothing."""


def test_a_lone_row_brings_a_lone_generator_and_embeddings_stand_in_for_a_prompt():
    both = rows(image=("i", "i"), prompt_embeds=(torch.ones(3, 2), torch.ones(3, 2)))
    arguments = call_arguments(EmbeddedText, both[1:], {})
    assert arguments["prompt"] is None and arguments["prompt_embeds"].shape == (1, 3, 2)
    assert arguments["generator"].initial_seed() == 1
    assert [each.initial_seed() for each in call_arguments(EmbeddedText, both, {})["generator"]] == [0, 1]


def test_a_class_of_one_row_a_call_is_given_no_lists_of_one():
    frames = [Image.new("RGB", (2, 2))]
    lone = rows(negative_prompt=("x", "y"), video=(frames, frames))[:1]
    texts = {"prompt": "0", "negative_prompt": "x"}
    assert call_arguments(NotYetReleased, lone, {}, lone=True) == texts | {"video": frames}
    listed = {key: [value] for key, value in texts.items()}
    assert call_arguments(NotYetReleased, lone, {}) == listed | {"video": frames}


def test_rows_that_one_call_cannot_hold_are_refused():
    with pytest.raises(UnsupportedPipelineError, match="size is one value for the whole call"):
        call_arguments(NotYetReleased, rows(size=(8, 16)), {})
    with pytest.raises(UnsupportedPipelineError, match="takes no argument 'height'"):
        call_arguments(NotYetReleased, rows(), {"height": 8})

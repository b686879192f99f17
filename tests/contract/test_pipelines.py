"""The replay contract over diffusers' pipeline classes: exact, or refused with a reason; never trained wrongly."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.contract.pipelines.build import Case
from tests.contract.pipelines.cases import CASES
from tests.contract.pipelines.check import Kernel, measure, measure_both, policy_of, prompts_of
from tests.contract.pipelines.components import betas
from tests.contract.pipelines.table import DOCS, document, exported, task_of
from unified_rl.policies.diffusion import DiffusionPolicy
from unified_rl.policies.pipeline_call import call_arguments
from unified_rl.policies.pipeline_table import PipelineRow, pipeline_table
from unified_rl.policies.scheduler_head import UnsupportedPipelineError
from unified_rl.recipe.policy import DiffusionSampling, PolicyBlock
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
    assert measured.row_gap <= case.row_tolerance, "one row alone"
    assert 0 < measured.smallest_gradient < float("inf")
    assert measured.checkpointing_gap is None or measured.checkpointing_gap <= 1e-4
    assert lora.gap == 0.0 and 0 < lora.gradient < float("inf") and lora.others == 0


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
    """A new version of diffusers fails here until its new classes are tried, or listed with a reason."""
    rows = {row.name: row for row in pipeline_table()}
    assert rows.keys() == exported().keys()
    assert {name for name, row in rows.items() if row.replay == "exact"} == {case.name for case in EXACT}
    assert {row.replay for row in rows.values()} == {"exact", "refused", "untried"}
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


COUNTED = (
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusion3Img2ImgPipeline",
    "QwenImageImg2ImgPipeline",
    "SkyReelsV2Pipeline",
    "CogVideoXImageToVideoPipeline",
    "AceStepPipeline",
    "FluxPipeline",
    "FluxKontextPipeline",
)


@pytest.mark.parametrize("name", COUNTED)
def test_replay_runs_no_text_encoder_and_no_autoencoder(name: str):
    """At the rollout's batch shape, and for one row of it."""
    case = case_of(name)
    policy = policy_of(case)
    segment = policy.sample(prompts_of(case)).segments["image"]
    calls: dict[str, int] = {}
    for component, module in policy._pipeline.components.items():
        if isinstance(module, torch.nn.Module) and module is not policy.module:
            for part in (module, *module.children()):
                part.register_forward_hook(lambda *_, key=component: calls.update({key: calls.get(key, 0) + 1}))
    step = int(segment.loss_mask[0].nonzero()[0])
    policy.log_prob("image", segment, slice(step, step + 1))
    policy.log_prob("image", segment.rows(slice(1, 2)), slice(step, step + 1))
    assert {key for key in calls if key.startswith(("text_encoder", "vae"))} == set()


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


def test_rows_that_one_call_cannot_hold_are_refused():
    with pytest.raises(UnsupportedPipelineError, match="size is one value for the whole call"):
        call_arguments(NotYetReleased, rows(size=(8, 16)), {})
    with pytest.raises(UnsupportedPipelineError, match="takes no argument 'height'"):
        call_arguments(NotYetReleased, rows(), {"height": 8})

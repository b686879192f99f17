"""Image-token policies: guided sampling and scoring are one distribution, in every family that draws."""

import copy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families.drawing import BUILDERS, CODES, GLM_SIZE
from transformers import GenerationConfig

from unified_rl.errors import RecipeError
from unified_rl.policies.image_tokens import ImageTokensPolicy
from unified_rl.recipe.policy import VISION, Adapter, ImageTokenSampling, PolicyBlock, Think
from unified_rl.types import Prompt

TOLERANCE = 1e-4
NUM_TOKENS = {"janus": 4, "emu3": 6, "chameleon": 4, "glm_image": 8}
WRITERS = [name for name in BUILDERS if name != "glm_image"]
TEXTS = ("a red cat", "two", "a dog, and a bird?")


@cache
def built(name: str) -> tuple:
    torch.manual_seed(0)
    return BUILDERS[name][0]()


def policy_of(
    name: str, *, adapter: bool = False, with_reference: bool = False, exam: dict | None = None, **sampling
) -> ImageTokensPolicy:
    model, processor = copy.deepcopy(built(name)[0]), built(name)[1]
    block = PolicyBlock(
        model=name,
        family="image_tokens",
        adapter=Adapter(kind="lora" if adapter else "none", rank=2),
        sampling=ImageTokenSampling(**{"guidance_scale": 2.5, **BUILDERS[name][1], **sampling}),
    )
    evaluation = None if exam is None else block.sampling.model_copy(update=exam)
    return ImageTokensPolicy(model, processor, block, evaluation=evaluation, with_reference=with_reference)


def prompts(group_size: int = 3) -> list[Prompt]:
    return [
        Prompt(text=text, images=(), columns={}, group_id=group, seed=100 * group + member)
        for group, text in enumerate(TEXTS)
        for member in range(group_size)
    ]


@pytest.mark.parametrize("sampling", [{}, {"guidance_scale": 1.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}])
@pytest.mark.parametrize("name", BUILDERS)
def test_scoring_gives_the_log_probs_of_the_rollout(name: str, sampling: dict):
    policy = policy_of(name, **sampling)
    trajectory = policy.sample(prompts())
    segment = trajectory.segments["image"]
    assert segment.rollout_log_probs.shape == (9, NUM_TOKENS[name]) and segment.loss_mask.all()
    assert policy.max_steps == {"image": NUM_TOKENS[name]}
    for rows in (slice(0, 9), slice(2, 5), slice(4, 5)):
        part = segment.rows(rows)
        stats = policy.log_prob("image", part, slice(1, None))
        assert (stats.log_probs - part.rollout_log_probs[:, 1:]).abs().max() <= TOLERANCE
    assert len({tuple(row.tolist()) for row in segment.actions["codes"]}) > 3, "samples of a group differ"
    assert all(completion.images[0].size[0] > 1 for completion in trajectory.completions)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_density_of_a_picture_sums_to_one(name: str):
    """Over the codes of the last step: nothing but codes can be drawn, and the guided scores are normalised."""
    policy = policy_of(name)
    segment = policy.sample(prompts(group_size=CODES)[:CODES]).segments["image"]
    codes = segment.actions["codes"][:1].repeat(CODES, 1)
    codes[:, -1] = torch.arange(CODES)
    every = replace(segment, actions={**segment.actions, "codes": codes})
    last = policy.log_prob("image", every, slice(-1, None)).log_probs
    assert last.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_guidance_mixes_both_rows(name: str):
    """By hand: log-softmax of u + s (c - u) from the two policies that only see one of the rows."""
    guided, plain = policy_of(name), policy_of(name, guidance_scale=1.0)
    segment = guided.sample(prompts()).segments["image"]
    scores = []
    for code in range(CODES):
        codes = segment.actions["codes"].clone()
        codes[:, 1] = code
        sides = []
        for side in (0, 1):
            rows = [(row[side], row[side]) for row in segment.actions["rows"]]
            part = replace(segment, actions={"rows": rows, "codes": codes})
            sides.append(plain.log_prob("image", part, slice(1, 2)).log_probs[:, 0])
        scores.append(sides)
    conditional, unconditional = (torch.stack([pair[side] for pair in scores], dim=1) for side in (0, 1))
    assert (conditional - unconditional).abs().max() > 1e-3, "the prompt matters"
    expected = (unconditional + 2.5 * (conditional - unconditional)).log_softmax(1)
    chosen = segment.actions["codes"][:, 1:2]
    ours = guided.log_prob("image", segment, slice(1, 2)).log_probs
    assert torch.allclose(ours, expected.gather(1, chosen), atol=1e-4)


def test_janus_draws_what_its_own_generate_draws():
    """Greedy on both sides: prompt, unconditional row, positions, guidance and decoder are those of the library."""
    policy = policy_of("janus", top_k=1)
    model, processor = copy.deepcopy(built("janus")[0]), built("janus")[1]
    trajectory = policy.sample(prompts(group_size=1))
    config = GenerationConfig(
        do_sample=False, guidance_scale=2.5, max_length=64, **{
            key: getattr(model.generation_config, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")
        }, generation_kwargs=model.generation_config.generation_kwargs,
    )  # fmt: skip
    for row, text in enumerate(TEXTS):
        inputs = processor(text=[text], generation_mode="image", return_tensors="pt")
        codes = model.generate(**inputs, generation_mode="image", generation_config=config)
        assert torch.equal(trajectory.segments["image"].actions["codes"][row], codes[0])
        pixels = model.decode_image_tokens(codes).permute(0, 3, 1, 2)
        theirs = processor.postprocess(list(pixels.float()), return_tensors="PIL.Image.Image")["pixel_values"][0]
        assert theirs.tobytes() == trajectory.completions[row].images[0].tobytes()


def test_only_the_image_head_is_evaluated_and_only_where_a_token_is_drawn():
    policy = policy_of("janus")
    heads: dict[str, list[int]] = {"words": [], "codes": []}
    for key, head in (("words", policy.module.lm_head), ("codes", policy.module.model.generation_head)):
        head.register_forward_hook(
            lambda _module, inputs, _output, key=key: heads[key].append(inputs[0][..., 0].numel())
        )
    segment = policy.sample(prompts()).segments["image"]
    policy.log_prob("image", segment, slice(None))
    assert heads == {"words": [], "codes": [2 * 9] * 4 + [2 * 9 * 4]}, "both sides of guidance, never the prompt"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_reach_the_language_model_and_not_the_decoder(name: str, adapter: bool):
    policy = policy_of(name, adapter=adapter)
    segment = policy.sample(prompts()).segments["image"]
    policy.log_prob("image", segment, slice(None)).log_probs.sum().backward()
    trained = {n: p for n, p in policy.module.named_parameters() if p.requires_grad}
    assert trained and not any("vqmodel" in n or VISION.search(n) or "aligner." in n[:14] for n in trained)
    assert all((".lora_" in n) == adapter for n in trained)
    without = [n for n, p in trained.items() if p.grad is None]
    assert without == [], "a weight that drawing never uses is not trained"
    assert all(p.grad is None for n, p in policy.module.named_parameters() if n not in trained)
    assert sum(bool(p.grad.any()) for p in trained.values() if p.grad is not None) >= 4


@pytest.mark.parametrize("name", BUILDERS)
def test_a_row_does_not_depend_on_its_batch(name: str):
    policy = policy_of(name)
    together = policy.sample(prompts()).segments["image"].actions["codes"]
    alone = torch.cat([policy.sample([prompt]).segments["image"].actions["codes"] for prompt in prompts()])
    assert torch.equal(together, alone)


def test_glm_image_draws_what_its_own_generate_draws():
    """Greedy, a padded batch: the prompt with both grids, and positions of three axes that begin anew with each."""
    policy = policy_of("glm_image", top_k=1, guidance_scale=1.0)
    model, processor = copy.deepcopy(built("glm_image")[0]), built("glm_image")[1]
    drawn = policy.sample(prompts(group_size=1))
    inputs = processor(text=list(TEXTS), padding=True, return_tensors="pt", **GLM_SIZE)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(
        **inputs, do_sample=False, max_new_tokens=8, suppress_tokens=[CODES, CODES + 1], pad_token_id=CODES + 2
    )
    codes = drawn.segments["image"].actions["codes"]
    assert torch.equal(codes, ids[:, length:]) and len(codes.unique()) > 3
    pictures = np.stack([np.asarray(each.images[0].convert("L")) for each in drawn.completions])
    assert (pictures == codes[:, 2:].view(3, 2, 3).numpy() * 255 // CODES).all(), "the picture is the large grid"


@pytest.mark.parametrize("name", WRITERS)
def test_thinking_gives_two_segments_with_one_completion(name: str):
    think = Think(max_new_tokens=5, instruction="{prompt}?", draw="{prompt}. {text}")
    policy = policy_of(name, think=think, with_reference=True)
    trajectory = policy.sample(prompts())
    assert list(trajectory.segments) == ["text", "image"] == list(policy.max_steps)
    assert len({completion.text for completion in trajectory.completions}) > 3
    ends = torch.tensor(policy._words.ends)
    cut = [not torch.isin(row[-1], ends) for row in trajectory.segments["text"].actions["tokens"]]
    assert [completion.truncated for completion in trajectory.completions] == cut and any(cut), "as overlong asks"
    policy.module.zero_grad()
    for segment_name, segment in trajectory.segments.items():
        stats = policy.log_prob(segment_name, segment, slice(None))
        gap = (stats.log_probs - segment.rollout_log_probs)[segment.loss_mask].abs().max()
        assert gap <= TOLERANCE
        with policy.reference(), torch.no_grad():
            again = policy.log_prob(segment_name, segment, slice(None))
        assert (again.log_probs - stats.log_probs).abs().max() <= TOLERANCE and again.entropy is None
    # What is drawn depends on what was thought: the prompt of a picture holds the text.
    lengths = {len(row[0]) for row in trajectory.segments["image"].actions["rows"]}
    assert len(lengths) > len(TEXTS)
    vocabulary = set(policy._modes[False].family.vocabulary)
    assert not any(vocabulary & set(row.tolist()) for row in trajectory.segments["text"].actions["tokens"])


@pytest.mark.parametrize("name", WRITERS)
def test_both_segments_have_gradients_of_their_own(name: str):
    """Each reaches the layers that both share; only the picture's reaches Janus's image head."""
    policy = policy_of(name, think=Think(max_new_tokens=5))
    trajectory = policy.sample(prompts())
    reached = {}
    for segment_name, segment in trajectory.segments.items():
        policy.module.zero_grad()
        policy.log_prob(segment_name, segment, slice(None)).log_probs.sum().backward()
        reached[segment_name] = {n for n, p in policy.module.named_parameters() if p.grad is not None and p.grad.any()}
    shared = {n for n in reached["text"] if ".layers." in n}
    assert len(shared) >= 10 and shared <= reached["image"]
    if name == "janus":
        own = {n for n in reached["image"] if "generation_" in n}
        assert own and not own & reached["text"]


def test_chameleon_s_scores_are_its_own_of_the_codes_words():
    """Unguided, against the model's own forward, which hides the words of pictures: its layers and its whole head."""
    policy = policy_of("chameleon", guidance_scale=1.0)
    model, processor = policy.module, built("chameleon")[1]
    segment = policy.sample(prompts(group_size=1)).segments["image"]
    words = policy._modes[False].family.vocabulary
    names = processor.tokenizer.convert_ids_to_tokens(words)
    assert names[10] == "IMGIMGBAZ" and names != sorted(names), "codes are numbers, not places of the vocabulary"
    for row, text in enumerate(TEXTS):
        codes = segment.actions["codes"][row]
        asked = [*processor.tokenizer(text)["input_ids"], processor.image_start_token_id]
        ids = torch.tensor([[*asked, *(words[code] for code in codes[:-1])]])
        with torch.no_grad():
            scores = model.lm_head(model.model(input_ids=ids).last_hidden_state)[0, len(asked) - 1 :][:, words]
        expected = scores.log_softmax(-1).gather(1, codes[:, None])[:, 0]
        assert torch.allclose(segment.rollout_log_probs[row], expected, atol=1e-5)


def test_evaluation_may_draw_another_size_with_another_decoder():
    exam = {"processor": {"ratio": "1:1", "image_area": 256}, "decoder": "families.drawing:grey"}
    policy = policy_of("emu3", exam=exam)
    sizes = {}
    for evaluation in (False, True):
        trajectory = policy.sample(prompts()[:2], evaluation=evaluation)
        sizes[evaluation] = trajectory.completions[0].images[0].size, trajectory.segments["image"].loss_mask.shape[1]
    assert sizes == {False: ((6, 4), 6), True: ((2, 2), 4)}, "by the model's own decoder, and a pixel a token"
    with pytest.raises(RecipeError, match=r"evaluation\.sampling\.decoder: gave 24 pictures for the tokens of 6"):
        policy_of("chameleon", exam={"decoder": "torch:flatten"}).sample(prompts(group_size=2), evaluation=True)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(RecipeError, match=r"policy\.sampling\.decoder: transformers has no decoder of chameleon's"):
        policy_of("chameleon", decoder=None)
    with pytest.raises(RecipeError, match=r"policy\.sampling\.decoder: gave 36 pictures for the tokens of 9"):
        policy_of("chameleon", decoder="torch:flatten").sample(prompts())
    for change, message in (
        ({"decoder": None}, r"decoder: .* decoder of glm_image's tokens; .*its pipeline do that \(policy\.writer\)"),
        (
            {"negative_prompt": None},
            "guidance_scale: GLM-Image's tokens are drawn without guidance; say 1",
        ),
        ({"think": Think()}, "think: GLM-Image's head has tokens of pictures only, it cannot write"),
    ):
        with pytest.raises(RecipeError, match=rf"policy\.sampling\.{message}"):
            policy_of("glm_image", **change)
    model = SimpleNamespace(config=SimpleNamespace(model_type="llava"))
    block = PolicyBlock(model="x", family="image_tokens", sampling=ImageTokenSampling())
    with pytest.raises(RecipeError, match=r"policy\.model: llava does not draw with tokens"):
        ImageTokensPolicy(model, None, block)

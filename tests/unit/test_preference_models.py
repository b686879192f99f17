"""ImageReward, HPSv3 and BRISQUE: tiny models with the published tensor names, against the published code's numbers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from transformers import BertTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reward_models.brisque import Brisque, features, fitted, normalised
from reward_models.hpsv3 import Hpsv3, published_instruction, qwen_names
from reward_models.image_reward import ImageReward, prepared
from tests.contract.families.toolkit import template, tokenizer

WIDTH, TEXT_WIDTH, VOCABULARY = 64, 32, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog"]
MED = {
    "vocab_size": 12, "hidden_size": TEXT_WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "pad_token_id": 0,
}  # fmt: skip


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blip_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a two-layer ImageReward, as `ImageReward.pt` names them."""
    eye, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {f"{eye}cls_token": (1, 1, WIDTH), f"{eye}pos_embed": (1, 5, WIDTH)}
    shapes |= {f"{eye}patch_embed.proj.weight": (WIDTH, 3, 4, 4), f"{eye}patch_embed.proj.bias": (WIDTH,)}
    for block in (f"{eye}blocks.0.", f"{eye}blocks.1."):
        shapes |= norm(f"{block}norm1", WIDTH) | norm(f"{block}norm2", WIDTH)
        shapes |= linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{block}attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}mlp.fc1", 80, WIDTH) | linear(f"{block}mlp.fc2", WIDTH, 80)
    shapes |= norm(f"{eye}norm", WIDTH)
    shapes |= {f"{text}embeddings.word_embeddings.weight": (12, TEXT_WIDTH)}
    shapes |= {f"{text}embeddings.position_embeddings.weight": (40, TEXT_WIDTH)}
    shapes |= norm(f"{text}embeddings.LayerNorm", TEXT_WIDTH)
    for layer in (f"{text}encoder.layer.0.", f"{text}encoder.layer.1."):
        for kind, width in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            shapes |= linear(f"{layer}{kind}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            shapes |= linear(f"{layer}{kind}.self.key", TEXT_WIDTH, width)
            shapes |= linear(f"{layer}{kind}.self.value", TEXT_WIDTH, width)
            shapes |= linear(f"{layer}{kind}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            shapes |= norm(f"{layer}{kind}.output.LayerNorm", TEXT_WIDTH)
        shapes |= linear(f"{layer}intermediate.dense", 48, TEXT_WIDTH) | linear(f"{layer}output.dense", TEXT_WIDTH, 48)
        shapes |= norm(f"{layer}output.LayerNorm", TEXT_WIDTH)
    for number, (out, width) in {0: (16, TEXT_WIDTH), 2: (8, 16), 7: (1, 8)}.items():
        shapes |= linear(f"mlp.layers.{number}", out, width)
    return shapes


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return {name: torch.tensor(rng.normal(0.0, 0.3, shape), dtype=torch.float32) for name, shape in shapes.items()}


def image_reward_folder(folder: Path) -> Path:
    state = filled(blip_shapes())
    queue = {
        "blip.vision_proj.weight": torch.zeros(2, WIDTH),
        "blip.text_encoder.embeddings.position_ids": torch.arange(3),
    }
    torch.save({**state, **queue}, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_image_reward_gives_the_numbers_of_the_published_code(tmp_path: Path) -> None:
    """Two prompts, a square and a wide picture, through the modules of image-reward 1.5 with these weights."""
    folder = str(image_reward_folder(tmp_path))
    reward = ImageReward(folder, tokenizer=folder)
    prompts, shown = ["a red cat", "dog"], [picture(8, 8, 0), picture(14, 9, 1)]
    assert reward(prompts, shown) == pytest.approx([0.4584074, 0.2726056], abs=1e-5)
    assert reward(prompts[1:], shown[1:]) == pytest.approx([0.2726056], abs=1e-5)
    tensor = torch.from_numpy(np.array(shown[1])).permute(2, 0, 1)[None] / 255
    with_gradient = reward.with_gradient(prompts[1:], tensor.requires_grad_())
    assert with_gradient.tolist() == pytest.approx([0.2726056], abs=5e-3)  # Pillow rounds the scaled picture
    with_gradient.sum().backward()
    assert tensor.grad is not None and float(tensor.grad.abs().max()) > 0
    white = prepared(Image.new("RGB", (10, 30), "white"), 5)
    assert white.shape == (3, 5, 5)
    assert white[:, 0, 0] == pytest.approx(
        [(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, 2.145897], abs=1e-5
    )
    state = {name: tensor for name, tensor in filled(blip_shapes()).items() if "blocks.1.norm1" not in name}
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"does not fit BLIP's vision encoder: encoder.layers.1.layer_norm1"):
        ImageReward(folder, tokenizer=folder)


INSTRUCTION = "rate {text_prompt} <|Reward|> end"


def hpsv3_parts(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A base folder (tokenizer, picture processor, configuration), and random weights with the published names."""
    named = {"image_token": "<img>"}
    words = tokenizer(named, ("<bov>", "<eov>", "<vid>"))
    words.chat_template = template("<bov><img><eov>")
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    ids = {key: words.convert_tokens_to_ids(token) for key, token in
           (("image_token_id", "<img>"), ("video_token_id", "<vid>"), ("vision_start_token_id", "<bov>"),
            ("vision_end_token_id", "<eov>"))}  # fmt: skip
    text = {
        "vocab_size": len(words) + 1, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    eye = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=eye, **ids)
    torch.manual_seed(0)
    model = Qwen2VLModel(config).eval()
    Qwen2VLConfig(**{**config.to_dict(), "text_config": {**text, "vocab_size": 500}}).save_pretrained(folder)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    head = filled(linear("rm_head.0", 24, 32) | linear("rm_head.3", 16, 24) | linear("rm_head.5", 2, 16))
    save_file({**state, **head, "lm_head.weight": torch.zeros(3, 32)}, folder / "HPSv3.safetensors")
    return model, head


def test_hpsv3_by_hand(tmp_path: Path) -> None:
    model, head = hpsv3_parts(tmp_path)
    folder = str(tmp_path)
    reward = Hpsv3(folder, base=folder, instruction=INSTRUCTION, dtype="float32", pixels=16 * 16, batch_size=2)
    shown = [picture(20, 20, 0), picture(40, 12, 1)]
    together = reward(["a cat", "a <img><|Reward|>dog ran"], shown)
    assert together[0] != pytest.approx(together[1], abs=1e-3)
    for prompt, image, score in zip(["a cat", "a dog ran"], shown, together, strict=True):
        assert reward([prompt], [image]) == pytest.approx([score], abs=1e-5), "padding and special words change nothing"
        inputs = reward._inputs([prompt], [image])
        grid = inputs["image_grid_thw"]
        assert int(grid.prod()) * 4 * 4 == (16 * 16 if image.width == 20 else 24 * 8)
        ids = inputs["input_ids"]
        embedded = model.language_model.embed_tokens(ids)
        seen = model.visual(inputs["pixel_values"], grid_thw=grid).pooler_output
        embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
        line = torch.arange(ids.shape[1]).expand(3, 1, -1)
        states = model.language_model(inputs_embeds=embedded, position_ids=line).last_hidden_state.detach()
        found = states[0, (ids[0] == reward.reward_id).nonzero().item()]
        for number in (0, 3, 5):
            found = (
                head[f"rm_head.{number}.weight"] @ (found.relu() if number else found) + head[f"rm_head.{number}.bias"]
            )
        assert float(found[0]) == pytest.approx(score, abs=1e-4)


def test_hpsv3s_tensors_by_any_name_and_its_instruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"visual.a": 1, "model.layers.0": 2, "lm_head.weight": 3, "rm_head.0.weight": 4}
    new = {"model.visual.a": 1, "model.language_model.layers.0": 2}
    assert qwen_names(old) == qwen_names(new) == {"visual.a": 1, "language_model.layers.0": 2}
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hpsv3/dataset").mkdir(parents=True)
    (tmp_path / "hpsv3/__init__.py").write_text("raise RuntimeError('nothing of it is run')")
    (tmp_path / "hpsv3/dataset/data_collator_qwen.py").write_text(
        'import missing\nINSTRUCTION = "rate {text_prompt} "\nprompt_with_special_token = "<|Reward|>"\n'
    )
    assert published_instruction() == "rate {text_prompt} <|Reward|>"
    with pytest.raises(ValueError, match="the instruction needs"):
        Hpsv3(instruction="rate it")


def test_brisque_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape, mean, left, right = fitted(rng.normal(0.0, 2.0, 200_000))
    assert (shape, left, right) == pytest.approx((2.0, 4.0, 4.0), rel=0.03) and mean == pytest.approx(0.0, abs=0.03)
    assert fitted(rng.laplace(0.0, 1.0, 200_000))[0] == pytest.approx(1.0, rel=0.03)
    lopsided = np.abs(rng.normal(0.0, 1.0, 100_000)) * np.tile([-1.0, 3.0], 50_000)
    shape, mean, left, right = fitted(lopsided)
    assert (left, right) == pytest.approx((1.0, 9.0), rel=0.03) and mean > 0.5
    window = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(window, window) / window.sum() ** 2
    grey = rng.uniform(0, 255, (9, 9))
    patch = grey[1:8, 1:8]
    middle = (window * patch).sum()
    deviation = np.sqrt((window * patch**2).sum() - middle**2)
    assert normalised(grey)[4, 4] == pytest.approx((grey[4, 4] - middle) / (deviation + 1.0))

    found = features(picture(32, 32, 0))
    (tmp_path / "model").write_text(
        "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.5\nnr_class 2\nrho -30\nSV\n2.0 1:0.5 36:-1\n-3 2:1\n"
    )
    (tmp_path / "ranges").write_text(
        "x\n-1 1\n" + "".join(f"{n} {found[n - 1] - 1} {found[n - 1] + 1}\n" for n in range(1, 37))
    )
    reward = Brisque(str(tmp_path / "model"), str(tmp_path / "ranges"))
    # every feature is in the middle of its range, 0: |x - v|^2 is 1.25 and 1
    expected = 100.0 - (2.0 * np.exp(-0.5 * 1.25) - 3.0 * np.exp(-0.5) + 30.0)
    assert reward(["p", "p"], [picture(32, 32, 0), Image.new("RGB", (32, 32), "red")]) == [
        pytest.approx(expected),
        None,
    ]


def test_brisque_of_photographs() -> None:
    if importlib.util.find_spec("brisque") is None:
        pytest.skip("the wheel brisque is not installed")
    from sklearn.datasets import load_sample_images

    temple = load_sample_images().images[0][:160, :160]
    rng = np.random.default_rng(0)
    shown = Image.fromarray(temple)
    noisy = Image.fromarray((temple + rng.normal(0, 30, temple.shape)).clip(0, 255).astype(np.uint8))
    clean, blurred, noise = Brisque()(["p"] * 3, [shown, shown.filter(ImageFilter.GaussianBlur(4)), noisy])
    assert clean > 70 > 40 > max(blurred, noise)

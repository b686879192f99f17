"""Rewards with a model behind them: tiny random ones of the same architecture, and numbers computed by hand."""

import inspect
import json
import math
import threading
import urllib.error
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from reward_models.aesthetic import AestheticV25, LaionAesthetic
from reward_models.dual_encoder import ClipScore, Hps, ImageSimilarity, PickScore, SiglipScore, from_open_clip
from reward_models.image_reward import ImageReward
from reward_models.loading import PINNED
from reward_models.meaning import SameMeaning
from reward_models.tensor_pictures import prepared
from reward_models.vlm_judge import ChatJudge, YesProbability, data_uri, yes_share
from tests.contract.families.toolkit import tokenizer

PROMPTS = ["a cat", "a very red dog"]


def pictures(num: int = 2, side: int = 12) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(num)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few thousand weights, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=16
    )
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(pieces),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    shape = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPProcessor(image_processor=CLIPImageProcessor(**shape), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def cosines_by_hand(folder: Path) -> torch.Tensor:
    """From the towers and projections themselves, one sample at a time and unpadded."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    found = []
    for prompt, picture in zip(PROMPTS, pictures(), strict=True):
        pixels = processor(images=picture, return_tensors="pt").pixel_values
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        ids = processor(text=prompt, return_tensors="pt").input_ids
        read = model.text_projection(model.text_model(ids).pooler_output)
        found.append(torch.nn.functional.cosine_similarity(seen, read).item())
    return torch.tensor(found)


def test_clip_score_and_pick_score(clip: Path) -> None:
    cosines = cosines_by_hand(clip)
    scores = ClipScore(str(clip), batch_size=1)(PROMPTS, pictures())
    assert scores == pytest.approx((2.5 * cosines.clamp(min=0)).tolist(), abs=1e-5)
    scale = math.exp(CLIPModel.from_pretrained(clip).logit_scale.item())
    assert PickScore(str(clip), processor=None)(PROMPTS, pictures()) == pytest.approx(
        (scale * cosines).tolist(), abs=1e-4
    )
    prefixed = ClipScore(str(clip), prefix="a very ")(["red dog"], pictures()[1:])
    assert prefixed == pytest.approx(scores[1:], abs=1e-5)
    messages = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in PROMPTS]
    assert ClipScore(str(clip))(messages, pictures()) == pytest.approx(scores, abs=1e-5), "of chat messages the text"


def test_hub_models_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="some/clip is taken from the hub: pin it with the argument revision"):
        ClipScore("some/clip")
    asked: list[tuple[str, str]] = []

    def from_hub(name: str, *, revision: str, **keys: Any) -> None:
        asked.append((name, revision))
        raise ConnectionError

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", from_hub)
    for reward, keys in ((ClipScore, {}), (PickScore, {"revision": "abc"})):
        with pytest.raises(ConnectionError):
            reward(**keys)  # type: ignore[operator]
    assert asked == [
        ("openai/clip-vit-large-patch14", PINNED["openai/clip-vit-large-patch14"]),
        ("yuvalkirstain/PickScore_v1", "abc"),
    ]
    assert all(len(commit) == 40 and int(commit, 16) for commit in PINNED.values())
    defaults = [
        parameter.default
        for reward in (ClipScore, PickScore, Hps, SiglipScore, AestheticV25, LaionAesthetic, ImageReward)
        for name, parameter in inspect.signature(reward).parameters.items()
        if name in ("model", "processor", "weights_from", "tokenizer")
    ]
    assert set(defaults) == set(PINNED), "what is named by default, and nothing else"


def open_clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as open_clip stores them, written down from its modules."""
    out: dict[str, torch.Tensor] = {
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "text_projection": state["text_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "logit_scale": state["logit_scale"],
        "attn_mask": torch.zeros(1),
    }
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for ours, theirs in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
            for index in range(2):
                block, layer = f"{theirs}.resblocks.{index}", f"{ours}.encoder.layers.{index}"
                qkv = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                out[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
                out[f"{block}.attn.out_proj.{kind}"] = state[f"{layer}.self_attn.out_proj.{kind}"]
                for number in (1, 2):
                    out[f"{block}.ln_{number}.{kind}"] = state[f"{layer}.layer_norm{number}.{kind}"]
                out[f"{block}.mlp.c_fc.{kind}"] = state[f"{layer}.mlp.fc1.{kind}"]
                out[f"{block}.mlp.c_proj.{kind}"] = state[f"{layer}.mlp.fc2.{kind}"]
    return out


def test_hps_takes_open_clips_weights(clip: Path, tmp_path: Path) -> None:
    state = CLIPModel.from_pretrained(clip).state_dict()
    back = from_open_clip(open_clip_names(state))
    assert {name for name in state if not name.endswith("position_ids")} == set(back)
    other = {name: tensor + 0.01 for name, tensor in open_clip_names(state).items()}
    torch.save({"epoch": 1, "state_dict": other}, tmp_path / "tuned.pt")
    hps = Hps(str(clip), weights="tuned.pt", weights_from=str(tmp_path))
    assert torch.equal(hps.model.state_dict()["logit_scale"], state["logit_scale"] + 0.01)
    tuned = CLIPModel.from_pretrained(clip)
    tuned.load_state_dict({name: tensor + 0.01 for name, tensor in back.items()}, strict=False)
    tuned.save_pretrained(tmp_path / "tuned")
    CLIPProcessor.from_pretrained(clip).save_pretrained(tmp_path / "tuned")
    assert hps(PROMPTS, pictures()) == pytest.approx(cosines_by_hand(tmp_path / "tuned").tolist(), abs=1e-5)
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 255, (12, 24, 3), dtype=np.uint8))
    square = Image.new("RGB", (8, 8))
    square.paste(wide.resize((8, 4), Image.Resampling.BICUBIC), (0, 2))
    assert hps(PROMPTS[:1], [wide]) == pytest.approx(hps(PROMPTS[:1], [square]), abs=1e-5), "black bars, nothing cut"
    tensor = torch.from_numpy(np.array(wide)).permute(2, 0, 1)[None] / 255
    assert hps.with_gradient(PROMPTS[:1], tensor).tolist() == pytest.approx(hps(PROMPTS[:1], [wide]), abs=5e-3)


def test_an_aesthetic_head(clip: Path, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    head = {
        "layers.0.weight": torch.randn(4, 12, generator=rng),
        "layers.0.bias": torch.randn(4, generator=rng),
        "layers.2.weight": torch.randn(1, 4, generator=rng),
        "layers.2.bias": torch.randn(1, generator=rng),
    }
    save_file(head, tmp_path / "head.safetensors")
    reward = LaionAesthetic(str(tmp_path / "head.safetensors"), str(clip))
    features = reward.pictures(pictures())
    assert features.norm(dim=-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    hidden = features @ head["layers.0.weight"].T + head["layers.0.bias"]
    expected = hidden @ head["layers.2.weight"].T + head["layers.2.bias"]
    assert reward(PROMPTS, pictures()) == pytest.approx(expected.flatten().tolist(), abs=1e-5)


def test_pictures_as_a_tensor_give_the_same_scores_and_their_gradients(clip: Path, tmp_path: Path) -> None:
    """Of 8 pixels a side nothing is scaled, and the numbers are the same; of 20 x 14 only Pillow's rounding differs."""
    save_file({"weight": torch.ones(1, 12), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    for reward in (ClipScore(str(clip)), LaionAesthetic(str(tmp_path / "head.safetensors"), str(clip))):
        for size, close in (((8, 8), 1e-6), ((20, 14), 5e-3)):
            shown = [picture.resize(size) for picture in pictures(side=20)]
            tensor = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in shown])
            tensor.requires_grad_()
            scores = reward.with_gradient(PROMPTS, tensor)
            assert scores.tolist() == pytest.approx(reward(PROMPTS, shown), abs=close)
        reward.model.double()
        exact = tensor.detach()[:1].double().requires_grad_()
        direction = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        reward.with_gradient(PROMPTS[:1], exact).sum().backward()
        apart = [reward.with_gradient(PROMPTS[:1], exact.detach() + sign * 1e-2 * direction) for sign in (1, -1)]
        slope = float(apart[0] - apart[1]) / 2e-2
        assert exact.grad is not None
        assert float((exact.grad * direction).sum()) == pytest.approx(slope, rel=0.02, abs=1e-5)


def test_a_size_that_cannot_be_prepared_is_told() -> None:
    processor = CLIPImageProcessor(size={"longest_edge": 8})
    with pytest.raises(ValueError, match=r"pictures of size .*longest_edge.* cannot be prepared with gradients"):
        prepared(processor, torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP of a few thousand weights, which reads letters."""
    folder = tmp_path_factory.mktemp("siglip")
    words = tokenizer()
    words.model_max_length = 16
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(
            text_config={**tower, "vocab_size": len(words), "max_position_embeddings": 16, "projection_size": 16},
            vision_config={**tower, "image_size": 8, "patch_size": 4},
        )
    )
    torch.nn.init.constant_(model.logit_scale, 1.0)
    torch.nn.init.constant_(model.logit_bias, -0.5)
    model.save_pretrained(folder)
    pixels = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    SiglipProcessor(image_processor=pixels, tokenizer=words).save_pretrained(folder)
    return folder


def siglip_features(folder: Path, picture: Image.Image, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of unit length, from the towers themselves; texts are padded to 16 tokens on the right, as SigLIP was trained."""
    model = SiglipModel.from_pretrained(folder)
    pixels = np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1.0
    seen = model.vision_model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).pooler_output
    words = tokenizer()
    ids = words(prompt, add_special_tokens=False).input_ids
    ids = [words.pad_token_id] * (16 - len(ids)) + ids  # this tiny tokenizer pads on the left
    read = model.text_model(torch.tensor([ids])).pooler_output
    return torch.nn.functional.normalize(seen)[0].detach(), torch.nn.functional.normalize(read)[0].detach()


def test_siglip_score(siglip: Path) -> None:
    scores = SiglipScore(str(siglip), batch_size=1)(PROMPTS, pictures(side=8))
    for prompt, picture, score in zip(PROMPTS, pictures(side=8), scores, strict=True):
        seen, read = siglip_features(siglip, picture, prompt)
        assert score == pytest.approx(torch.sigmoid(math.e * (seen @ read) - 0.5).item(), abs=1e-5)
    tensor = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in pictures(side=8)])
    assert SiglipScore(str(siglip)).with_gradient(PROMPTS, tensor).tolist() == pytest.approx(scores, abs=1e-6)


def test_aesthetic_v25_is_a_head_on_siglips_pooled_picture(siglip: Path, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = {0: (5, 16), 2: (4, 5), 4: (3, 4), 6: (2, 3), 8: (1, 2)}  # the published head's layers; dropout between
    head = {f"scoring_head.{n}.weight": torch.randn(*size, generator=rng) for n, size in sizes.items()}
    head |= {f"scoring_head.{n}.bias": torch.randn(size[0], generator=rng) for n, size in sizes.items()}
    torch.save(head, tmp_path / "head.pth")
    (score,) = AestheticV25(str(tmp_path / "head.pth"), str(siglip))(PROMPTS[:1], pictures(1, side=8))
    found, _ = siglip_features(siglip, pictures(1, side=8)[0], PROMPTS[0])
    for number in sizes:
        found = head[f"scoring_head.{number}.weight"] @ found + head[f"scoring_head.{number}.bias"]
    assert score == pytest.approx(found.item(), abs=1e-4)


def test_same_meaning_pools_the_words_that_are_there(tmp_path: Path) -> None:
    words = tokenizer()
    words.padding_side = "right"
    words.save_pretrained(tmp_path)
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**tower, vocab_size=len(words), max_position_embeddings=32)).eval()
    model.save_pretrained(tmp_path)
    pooled = [
        model(torch.tensor([words(text).input_ids])).last_hidden_state[0].mean(0) for text in ("cat", "a red dog")
    ]
    expected = torch.nn.functional.cosine_similarity(*pooled, dim=0).item()
    scores = SameMeaning(str(tmp_path))(["?", "?"], ["cat", "a red dog"], answer=["a red dog", "a red dog"])
    assert scores == pytest.approx([expected, 1.0], abs=1e-5)


def test_similarity_to_the_condition_picture(clip: Path, tmp_path: Path) -> None:
    first, second = pictures()
    similarity = ImageSimilarity(str(clip))
    scores = similarity(PROMPTS, [first, second], images=[[first], []])
    assert scores[0] == pytest.approx(1.0, abs=1e-5) and scores[1] is None
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    Dinov2Model(Dinov2Config(**tower)).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert ImageSimilarity(str(tmp_path))(PROMPTS[:1], [first], images=[[first]]) == pytest.approx([1.0], abs=1e-5)


def test_the_probability_of_yes(quickstart: Path) -> None:
    question = "is there a {prompt}?"
    judge = YesProbability(str(quickstart / "shapes_vlm"), question=question, batch_size=2)
    shown = [Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "red")]
    together = judge(["red circle", "circle"], shown)
    alone = [judge([prompt], [picture])[0] for prompt, picture in zip(["red circle", "circle"], shown, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4) and all(0.0 <= value <= 1.0 for value in together)
    judge.among_all = True
    rest = judge(["red circle", "circle"], shown)
    assert all(0.0 < of_all < of_both for of_all, of_both in zip(rest, together, strict=True))
    judge.yes, judge.no = [*range(judge.model.config.text_config.vocab_size)], judge.no
    assert judge(["circle"], shown[:1]) == pytest.approx([1.0], abs=1e-5), "all tokens together"


def test_yes_share_by_hand() -> None:
    top = [{"token": " Yes", "logprob": math.log(0.3)}, {"token": "no", "logprob": math.log(0.1)}]
    assert yes_share([*top, {"token": "maybe", "logprob": math.log(0.6)}]) == pytest.approx(0.75)
    assert yes_share([{"token": "maybe", "logprob": 0.0}]) is None


class Server(BaseHTTPRequestHandler):
    """Answers every question with what it was given, and keeps the request."""

    seen: list[dict[str, Any]] = []
    answer: dict[str, Any] = {}
    refusals = 0

    def do_POST(self) -> None:
        if Server.refusals:
            Server.refusals -= 1
            self.send_error(429)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**body, "path": self.path, "token": self.headers["Authorization"]})
        reply = json.dumps({"choices": [self.answer]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_judge_behind_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    picture = pictures(1)[0]
    top = [{"token": "yes", "logprob": math.log(0.2)}, {"token": "No", "logprob": math.log(0.6)}]
    Server.answer = {"logprobs": {"content": [{"top_logprobs": top}]}, "message": {"content": "No"}}
    assert ChatJudge(url, "m", token_env="JUDGE_TOKEN")(["a cat"], [picture]) == [pytest.approx(0.25)]
    request = Server.seen.pop()
    assert (request["path"], request["token"]) == ("/v1/chat/completions", "Bearer secret")
    assert request["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": data_uri(picture)}},
        {"type": "text", "text": 'Does this figure show "a cat"? Please answer yes or no.'},
    ]
    Server.answer = {"message": {"content": "Style 3 of 5. Final score: 4.5"}}
    judge = ChatJudge(url, "m", question="{prompt} -> {completion}", read="number", token_env="UNSET")
    assert judge(["q"], ["a"]) == [4.5]
    request = Server.seen.pop()
    assert request["token"] is None and request["messages"][0]["content"][0]["text"] == "q -> a"
    Server.answer = {"message": {"content": "none"}}
    assert judge(["q"], ["a"]) == [None], "an answer without a number excludes the sample"
    server.shutdown()


def test_what_a_judge_is_shown_and_how_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    question = 'Rate "{completion}" for {prompt} as {"score": n}'
    judge = ChatJudge(
        f"http://127.0.0.1:{server.server_port}", "m", question=question, read="number", with_conditions=True
    )
    Server.answer = {"message": {"content": '{"score": 8/10}'}}
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why?"}]}]
    given, frame = pictures()
    said = [{"role": "assistant", "content": "so"}]
    assert judge([chat], [said], images=[[given]]) == [8.0]
    shown = Server.seen.pop()["messages"][0]["content"]
    assert [part["type"] for part in shown] == ["image_url", "text"]
    assert shown[1]["text"] == 'Rate "so" for why? as {"score": n}', "chat as text, other braces as they are"
    judge(["p"], [[frame, given]], images=[[]])
    shown = Server.seen.pop()["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in shown[:2]] == [data_uri(frame), data_uri(given)], "a video's frames"
    Server.answer = {"message": {"content": "At 9 of 10 I"}, "finish_reason": "length"}
    assert judge(["p"], ["a"]) == [None], "cut before it said its number"
    Server.refusals = 2
    monkeypatch.setattr("reward_models.vlm_judge.FIRST_PAUSE", 0.01)
    Server.answer = {"message": {"content": "7"}}
    assert judge(["p"], ["a"]) == [7.0] and Server.refusals == 0
    Server.refusals = 9
    with pytest.raises(urllib.error.HTTPError):
        judge(["p"], ["a"])
    Server.refusals = 0
    server.shutdown()

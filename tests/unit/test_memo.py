"""What is remembered of encoders, row by row."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from unified_rl.policies.memo import Memo
from unified_rl.policies.picture_memo import PictureMemo


def numbers(words: list[str]) -> Tensor:
    return torch.tensor([[float(len(word)), float(ord(word[0]))] for word in words])


class Encoders:
    """Ways in which pipelines return what they made of prompts; each notes the batches that it saw."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def doubled(self, prompt: list[str]) -> Tensor:
        self.seen.append(prompt)
        return torch.cat([-numbers(prompt), numbers(prompt)])

    def side_by_side(self, prompt: list[str]) -> Tensor:
        self.seen.append(prompt)
        return torch.stack([-numbers(prompt), numbers(prompt)], dim=1).flatten(0, 1)

    def lists(self, prompt: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Z-Image: a tensor of its own length for each prompt, nothing without guidance."""
        self.seen.append(prompt)
        return [torch.full((len(word), 2), float(ord(word[0]))) for word in prompt], []

    def layers(self, prompt: list[str]) -> tuple[Tensor, list[Tensor]]:
        """HiDream's and Bria's: the rows are the second dimension, or in a list of layers."""
        self.seen.append(prompt)
        words = numbers(prompt)
        return torch.stack([words, 2 * words, 3 * words]), [words, words + 1]

    def packed(self, prompt: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens of all rows in a line, and where each row ends."""
        self.seen.append(prompt)
        ends = torch.tensor([0, *(len(word) for word in prompt)]).cumsum(0)
        return torch.cat([torch.arange(float(len(word))) for word in prompt]), ends

    def masked(self, prompt: list[str]) -> tuple[Tensor, Tensor | None]:
        """Qwen-Image: padded to the longest, and no mask where nothing is."""
        self.seen.append(prompt)
        longest = max(map(len, prompt))
        mask = torch.tensor([[place < len(word) for place in range(longest)] for word in prompt])
        return torch.ones(len(prompt), longest, 2), None if mask.all() else mask

    def counted(self, prompt: list[str], batch_size: int) -> tuple[Tensor, Tensor]:
        """Stable Cascade: the negative rows are made by count."""
        self.seen.append(prompt)
        return numbers(prompt), torch.zeros(batch_size, 2)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if one is None:
        return other is None
    return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))


@pytest.mark.parametrize(
    ("kind", "in_the_end"),
    [
        ("doubled", []),
        ("lists", []),
        ("layers", []),
        ("counted", []),
        ("masked", [["bb", "a", "ccc"]]),  # padded together, and now beside a longer one
        ("side_by_side", [["bb", "a", "ccc"]]),
        ("packed", [["bb", "a", "ccc"]]),
    ],
)
def test_rows_are_found_in_other_batches(kind: str, in_the_end: list[list[str]]):
    encoders, memo = Encoders(), Memo()
    encode = getattr(encoders, kind)

    def through(*words: str) -> Any:
        more = {"batch_size": len(words)} if kind == "counted" else {}
        found = memo.by_row("encode", encode, ([*words],), more, len(words))
        encoders.seen, before = [], encoders.seen
        assert same(found, encode([*words], **more)), f"{words} as the encoder itself has them"
        encoders.seen = []
        return before

    for words in (["a"], ["a", "a"], ["a", "bb"], ["bb", "a"], ["ccc"], ["ccc", "ccc"]):
        through(*words)
    assert through("a", "bb") == [], "seen before"
    assert through("bb", "a", "ccc") == in_the_end
    assert through("bb", "a", "ccc") == []


def test_what_does_not_split_is_not_tried_again_and_again():
    encoders, memo = Encoders(), Memo()
    for _ in range(3):
        memo.by_row("encode", encoders.packed, (["a", "bb"],), {}, 2)
    assert encoders.seen == [["a"], ["a", "a"], ["a", "bb"]]


def test_more_rows_than_the_memo_holds():
    encoders, memo = Encoders(), Memo(40)  # two rows of 16 bytes
    words = ["a", "bb", "ccc", "dddd"]
    assert same(memo.by_row("encode", encoders.doubled, (words,), {}, 4), encoders.doubled(words))


@pytest.mark.parametrize("min_dims", [4, 3])
def test_pictures_of_other_batches_are_not_encoded_again(min_dims: int):
    seen = []

    def encode(pictures: Tensor) -> AutoencoderKLOutput:
        seen.append(len(pictures))
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(pictures.repeat(1, 2, 1, 1)))

    pictures = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 2, 4, 4)
    memo = PictureMemo()
    for rows in ([0, 1, 2], [2], [1, 0], [0, 1, 2]):
        found = memo.batch("vae", encode, (pictures[rows],), {}, min_dims=min_dims)
        assert torch.equal(found.latent_dist.mode(), pictures[rows])
    assert seen == [3]


def test_several_tensors_of_a_text_belong_together():
    """Row by row by what it is and by its mask; a batch of another length is another text."""
    seen = []

    def encode(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        seen.append(input_ids.shape)
        states = (input_ids * attention_mask)[..., None].float()
        return {"last": states, "all": (states, 2 * states)}

    ids, mask = torch.tensor([[3, 4, 0], [3, 4, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    memo = PictureMemo()
    for rows, length in (([0, 1], 3), ([1], 3), ([0], 3), ([0], 2), ([0], 2)):
        given = {"input_ids": ids[rows][:, :length], "attention_mask": mask[rows][:, :length]}
        found = memo.batch("text_encoder", encode, (), given, min_dims=2)
        assert found.keys() == {"last", "all"}
        assert torch.equal(found["all"][1], 2 * found["last"]) and found["last"].shape == (len(rows), length, 1)
        assert torch.equal(found["last"][..., 0].long(), (ids * mask)[rows][:, :length])
    assert seen == [(2, 3), (1, 2)]


@pytest.mark.parametrize("first", [1, 2])
def test_what_all_pictures_share_is_not_taken_for_a_row(first: int):
    """Paint by Example: an embedding for each picture, and the one of no picture."""
    nothing = torch.full((1, 1, 2), -1.0)
    seen = []

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(pixels))
        return pixels.mean((2, 3))[:, None], nothing

    pictures = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 2, 4, 4)
    memo = PictureMemo()
    memo.batch("image_encoder", encode, (pictures[:first],), {}, min_dims=4)
    memo.batch("image_encoder", encode, (pictures,), {}, min_dims=4)
    seen.clear()
    for rows in ([2], [1, 0], [2, 1, 0]):
        rows_found, shared = memo.batch("image_encoder", encode, (pictures[rows],), {}, min_dims=4)
        assert torch.equal(rows_found[:, 0, 0], torch.tensor(rows).float()) and torch.equal(shared, nothing)
    assert seen == []


def test_rows_that_arguments_do_not_tell_apart_are_those_of_the_call():
    """JoyImage: the pictures of all prompts in one list. Rows stay padded as they were encoded together."""
    seen = []

    def encode(prompt: list[str], images: list[int]) -> tuple[Tensor, Tensor]:
        seen.append(prompt)
        each, longest = len(images) // len(prompt), max(map(len, prompt))
        sums = [sum(images[row * each : (row + 1) * each]) for row in range(len(prompt))]
        mask = torch.tensor([[place < len(word) for place in range(longest)] for word in prompt])
        return torch.tensor(sums)[:, None] * mask, mask

    memo = PictureMemo()
    rows = {"a": [1, 2], "bb": [10, 20], "ccc": [100, 200]}

    def through(*words: str, image: int = 0) -> Tensor:
        images = [each + image for word in words for each in rows[word]]
        content = [(word, [each + image for each in rows[word]]) for word in words]
        return memo.of_rows("encode", encode, (), {"prompt": [*words], "images": images}, content)[0]

    assert through("a", "bb").tolist() == [[3, 0], [30, 30]]
    assert through("bb").tolist() == [[30, 30]] and through("a").tolist() == [[3, 0]], "padded as in the rollout"
    assert through("bb", "a").tolist() == [[30, 30], [3, 0]] and seen == [["a", "bb"]]
    assert through("a", image=1).tolist() == [[5]] and len(seen) == 2, "other pictures are another row"
    assert through("a", "ccc").tolist() == [[3, 0, 0], [300, 300, 300]] and len(seen) == 3


def test_a_lone_prompt_is_found_as_one_of_a_list():
    encoders, memo = Encoders(), Memo()
    assert memo.found("encode", (["bb"],), {}, 1) is None
    for words in (["a", "bb"], ["bb", "a"]):
        memo.by_row("encode", encoders.doubled, (words,), {}, 2)
    encoders.seen = []
    assert same(memo.found("encode", (["bb"],), {}, 1), encoders.doubled(["bb"]))
    assert memo.found("encode", (["ccc"],), {}, 1) is None and encoders.seen == [["bb"]]

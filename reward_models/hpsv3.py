"""HPSv3 (Ma et al. 2025, arXiv:2508.03789): a Qwen2-VL that reads an instruction, the prompt and the picture, and a
head on the state of its token `<|Reward|>` that gives a score and its uncertainty. Weights: MizzenAI/HPSv3 (MIT). Of
Qwen/Qwen2-VL-7B-Instruct (Apache-2.0) only the tokenizer, picture processor and configuration are needed.

Range: unbounded; a difference of two scores counts (Gaussian of the given mean and deviation).

The instruction that it was trained with is read, as text, from its authors' package: `pip install --no-deps hpsv3`.
"""

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reward_models.dual_encoder import batches
from reward_models.loading import hub_file, pinned, tensors_of
from reward_models.text_rules import asked_for

REWARD = "<|Reward|>"
PIXELS = 256 * 28 * 28
"""Every picture is scaled to about so many."""


class Hpsv3:
    """The mean of the score's distribution."""

    def __init__(
        self,
        model: str = "MizzenAI/HPSv3",
        revision: str | None = None,
        *,
        weights: str = "HPSv3.safetensors",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        base_revision: str | None = None,
        instruction: str | None = None,
        pixels: int = PIXELS,
        device: str = "cpu",
        dtype: str = "bfloat16",
        batch_size: int = 4,
    ) -> None:
        """Args:
        model: folder or hub name with `weights`.
        base: folder or hub name of the Qwen2-VL that was fine-tuned.
        instruction: with {text_prompt} and <|Reward|>; None: the one it was trained with.
        pixels: of a scaled picture.

        Raises:
            ValueError: if the weights do not fit `base`, or the instruction lacks a part.
        """
        import torch
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        self.instruction = published_instruction() if instruction is None else instruction
        if REWARD not in self.instruction or "{text_prompt}" not in self.instruction:
            raise ValueError(f"the instruction needs {{text_prompt}} and {REWARD}")
        commit = pinned(base, base_revision)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base, revision=commit, padding_side="right")
        self.tokenizer.add_tokens([REWARD], special_tokens=True)
        self.reward_id = self.tokenizer.convert_tokens_to_ids(REWARD)
        self.pictures = AutoImageProcessor.from_pretrained(base, revision=commit)
        config = AutoConfig.from_pretrained(base, revision=commit)
        state = tensors_of(hub_file(model, weights, revision))
        self.backbone = _backbone(config, qwen_names(state), getattr(torch, dtype)).to(device)
        numbers = sorted(int(name.split(".")[1]) for name in state if name.startswith("rm_head.") and "weight" in name)
        self.head = [
            tuple(state[f"rm_head.{number}.{kind}"].float().to(device) for kind in ("weight", "bias"))
            for number in numbers
        ]
        self.pixels, self.device, self.batch_size = pixels, device, batch_size

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Image.Image], **_: Any) -> list[float]:
        scores: list[float] = []
        for part in batches(len(prompts), self.batch_size):
            texts = [asked_for(prompt) for prompt in prompts[part]]
            scores += self.distributions(texts, completions[part])[:, 0].tolist()
        return scores

    def distributions(self, texts: Sequence[str], pictures: Sequence[Image.Image]) -> Any:
        """[B, 2] float32: mean and (raw) deviation of each score."""
        import torch

        inputs = self._inputs(texts, pictures)
        # One place after the other, pictures too, and not Qwen2-VL's three axes: so the published model was trained.
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            states = self.backbone(**inputs, position_ids=places.expand(3, -1, -1), use_cache=False).last_hidden_state
            found = states[inputs["input_ids"] == self.reward_id].float()
            for number, (weight, bias) in enumerate(self.head):
                found = found.relu() if number else found
                found = found @ weight.T + bias
        return found

    def _inputs(self, texts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        size = {"shortest_edge": self.pixels, "longest_edge": self.pixels}  # areas, whatever their names say
        shown = [picture.convert("RGB") for picture in pictures]
        seen = self.pictures(images=shown, size=size, return_tensors="pt")
        merged = self.pictures.merge_size**2
        placeholder = self.tokenizer.convert_ids_to_tokens(self.backbone.config.image_token_id)
        written = [
            self._written(text).replace(placeholder, placeholder * (int(grid.prod()) // merged), 1)
            for text, grid in zip(texts, seen["image_grid_thw"], strict=True)
        ]
        read = self.tokenizer(written, padding=True, return_tensors="pt")
        return {
            "input_ids": read["input_ids"].to(self.device),
            "attention_mask": read["attention_mask"].to(self.device),
            "pixel_values": seen["pixel_values"].to(self.device, self.backbone.dtype),
            "image_grid_thw": seen["image_grid_thw"].to(self.device),
        }

    def _written(self, text: str) -> str:
        """The chat with the picture's placeholder. Words of special tokens in a prompt are taken out."""
        for token in self.tokenizer.get_added_vocab():
            text = text.replace(token, "")
        asked = self.instruction.replace("{text_prompt}", text)
        content = [{"type": "image"}, {"type": "text", "text": asked}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )


def qwen_names(state: dict[str, Any]) -> dict[str, Any]:
    """The backbone's tensors as transformers' `Qwen2VLModel` names them, from names of any of its versions."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in (
            ("model.visual.", "visual."),
            ("model.language_model.", "language_model."),
            ("visual.", "visual."),
        ):
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = tensor
                break
        else:
            if name.startswith("model."):
                renamed["language_model." + name.removeprefix("model.")] = tensor
    return renamed


def published_instruction() -> str:
    """The text around the prompt, from the authors' package, which is parsed and not run.

    Raises:
        ValueError: if it is not installed.
    """
    spec = importlib.util.find_spec("hpsv3")
    if spec is None or spec.origin is None:
        raise ValueError("no instruction: pip install --no-deps hpsv3, or give the argument instruction")
    source = Path(spec.origin).parent / "dataset" / "data_collator_qwen.py"
    known: dict[str, str] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.targets[0], ast.Name)
        ):
            known[node.targets[0].id] = str(node.value.value)
    return known["INSTRUCTION"] + known["prompt_with_special_token"]


def _backbone(config: Any, state: dict[str, Any], dtype: Any) -> Any:
    """Qwen2-VL without its language head, of the vocabulary that the weights have."""
    from transformers import Qwen2VLModel

    config.get_text_config().vocab_size = state["language_model.embed_tokens.weight"].shape[0]
    loader: Any = Qwen2VLModel
    model, report = loader.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:
        raise ValueError(f"the weights do not fit the base model: {', '.join(sorted(wrong)[:3])}")
    return model.eval().requires_grad_(False)

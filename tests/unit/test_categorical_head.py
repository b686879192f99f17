"""Scoring under the logits processors, a chunk at a time: equal to doing it at once, with less memory."""

import pytest
import torch
from torch import Tensor

from unified_rl.policies import categorical_head
from unified_rl.policies.categorical_head import draw, processors, score
from unified_rl.recipe.policy import TextSampling

SETTINGS = TextSampling(temperature=0.7, top_k=20, top_p=0.95, min_p=0.01)
SUPPRESSED = (0, 5)


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 6, 50, generator=generator)).to(dtype)
    chain = processors(SETTINGS, SUPPRESSED, torch.device("cpu"))
    scores = chain(logits.flatten(0, 1)[:, :1].long(), logits.flatten(0, 1).float())
    tokens, _ = draw(scores, torch.rand(24, generator=generator, dtype=torch.float64))
    return logits, tokens.view(4, 6)


def scored(logits: Tensor, tokens: Tensor, entropy: str) -> tuple[Tensor, Tensor | None, Tensor]:
    leaf = logits.clone().requires_grad_()
    chain = processors(SETTINGS, SUPPRESSED, torch.device("cpu"))
    log_probs, values = score(leaf, tokens, chain, SETTINGS.temperature, entropy=entropy)
    weights = torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)
    loss = (log_probs * weights).sum()
    if values is not None and values.requires_grad:
        loss = loss + (values * weights).sum()
    loss.backward()
    assert leaf.grad is not None
    return log_probs.detach(), values, leaf.grad


@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_give_the_same_values_and_gradients(monkeypatch, entropy: str, dtype: torch.dtype):
    logits, tokens = case(dtype)
    whole = scored(logits, tokens, entropy)
    monkeypatch.setattr(categorical_head, "CHUNK_ELEMENTS", 50 * 7)  # 7 rows of 24: the last chunk is shorter
    for ours, theirs in zip(scored(logits, tokens, entropy), whole, strict=True):
        assert (ours is None) == (theirs is None) == (entropy == "none" and ours is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert whole[2].any()


def test_the_value_is_the_log_softmax_of_what_the_processors_left():
    logits, tokens = case()
    chosen = tokens.flatten()[:, None]
    chain = processors(SETTINGS, SUPPRESSED, torch.device("cpu"))
    expected = chain(chosen, logits.flatten(0, 1)).log_softmax(-1).gather(-1, chosen).view(4, 6)
    torch.testing.assert_close(scored(logits, tokens, "none")[0], expected, rtol=0, atol=1e-6)
    assert not torch.isin(tokens, torch.tensor(SUPPRESSED)).any()


def test_nothing_of_the_size_of_the_logits_is_kept_for_the_backward_pass(monkeypatch):
    logits, tokens = case(torch.bfloat16)
    logits.requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != logits.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes_kept(elements: int) -> int:
        kept.clear()
        monkeypatch.setattr(categorical_head, "CHUNK_ELEMENTS", elements)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            score(logits, tokens, processors(SETTINGS, SUPPRESSED, torch.device("cpu")), 0.7, entropy="gradient")
        return sum(kept.values())

    size = logits.numel() * logits.element_size()
    assert bytes_kept(50 * 7) < size < bytes_kept(logits.numel())


def test_a_token_that_rounding_dropped_stays_a_candidate():
    logits = torch.tensor([[[2.0, 1.9, 0.0]]])
    chain = processors(TextSampling(top_k=1), (), torch.device("cpu"))
    log_probs, _ = score(logits, torch.tensor([[1]]), chain, 1.0, entropy="none")
    expected = torch.tensor([2.0, 1.9]).log_softmax(0)[1]
    torch.testing.assert_close(log_probs[0, 0], expected)

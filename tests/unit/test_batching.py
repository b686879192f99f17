"""Batches of an even amount of work: which rows go through a language model together."""

from pathlib import Path

import pytest
import torch

from unified_rl import batching
from unified_rl.batching import filled, spans
from unified_rl.errors import RecipeError
from unified_rl.recipe.file import parse_recipe
from unified_rl.recipe.schema import EngineBlock
from unified_rl.types import Segment


def segment(contexts: list[int], lengths: list[int]) -> Segment:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Segment(
        actions={"tokens": [torch.arange(length) for length in lengths]},
        rollout_log_probs=torch.zeros(mask.shape),
        loss_mask=mask,
        turn_ids=torch.zeros(mask.shape, dtype=torch.int64),
        context_tokens=torch.tensor(contexts),
    )


def test_rows_of_similar_length_share_a_window_and_the_longest_come_first():
    part = segment([10, 10, 10, 10, 10], [2, 30, 3, 28, 4])
    # 40 tokens a row for the two long ones; 14, 13 and 12 for the others.
    assert filled(part, range(5), max_tokens=80, max_rows=8) == [[1, 3], [4, 2, 0]]
    assert filled(part, range(5), max_tokens=79, max_rows=8) == [[1], [3, 4], [2, 0]]
    assert filled(part, range(5), max_tokens=80, max_rows=2) == [[1, 3], [4, 2], [0]]
    assert filled(part, range(1, 5, 2), max_tokens=10, max_rows=8) == [[1], [3]], "too long alone: a window of its own"


def test_padding_counts():
    """A long prompt beside a long completion is as long as both."""
    part = segment([50, 5], [5, 50])
    assert filled(part, range(2), max_tokens=110, max_rows=8) == [[0], [1]]
    assert filled(part, range(2), max_tokens=200, max_rows=8) == [[0, 1]]


def test_processes_agree_on_the_number_of_windows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching.distributed, "max_over_ranks", lambda values: [4.0])
    chunks = filled(segment([1] * 5, [1] * 5), range(5), max_tokens=100, max_rows=8)
    assert len(chunks) == 4 and sorted(row for chunk in chunks for row in chunk) == [0, 1, 2, 3, 4]


def test_every_row_is_in_one_window_and_carries_its_own_data():
    part = segment([3, 9, 4], [5, 1, 2])
    engine = EngineBlock(micro_batch=2, micro_batch_tokens=18)
    (first, _), (second, _) = spans(part, range(3), [], engine, steps_per_forward=None)
    assert (first, second) == ([1], [0, 2])
    rows = part.rows([2, 0])
    assert [len(tokens) for tokens in rows.actions["tokens"]] == [2, 5]
    assert rows.context_tokens is not None and rows.context_tokens.tolist() == [4, 3]
    assert rows.loss_mask.sum(1).tolist() == [2, 5]


def test_a_denoiser_has_no_token_budget():
    body = {
        "policy": {"model": "x", "family": "diffusion", "sampling": {}},
        "data": {"prompts": "x.txt"},
        "rewards": [{"name": "compressibility"}],
        "engine": {"micro_batch_tokens": 64},
    }
    with pytest.raises(RecipeError, match=r"engine\.micro_batch_tokens: for language models"):
        parse_recipe(body, Path())

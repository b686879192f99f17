"""The words of a language model: which tokens it never writes, which end a text, and what rewards read of them."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unified_rl.errors import RecipeError, nearest
from unified_rl.recipe.policy import TextSampling

ENDS = "policy.sampling.end_tokens"
SPECIALS = "policy.sampling.special_tokens"


class Words:
    """Of one model, as a recipe lets it write."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, sampling: TextSampling) -> None:
        """
        Raises:
            RecipeError: if nothing names an end, or the recipe names a token that there is not.
        """
        self._tokenizer = tokenizer
        given = model.generation_config.eos_token_id
        ends = [] if given is None else [given] if isinstance(given, int) else list(given)
        # The tokenizer's end is one too: a generation config that leaves it out would forbid the end of a chat's turn.
        ends += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends += token_ids(tokenizer, sampling.end_tokens, ENDS)
        if not ends:
            raise RecipeError(f"policy.model: neither its generation config nor its tokenizer names an end; add {ENDS}")
        self.ends = [int(token) for token in dict.fromkeys(ends)]
        """Ids, the generation config's first."""
        self._keeps = bool(sampling.special_tokens)
        self.suppressed = suppressed_ids(model, tokenizer, self.ends, sampling.special_tokens)
        """Ids that are never drawn."""

    def text(self, tokens: Tensor) -> str:
        """What rewards read: tokens [L] without special ones, but with those that the recipe lets be drawn."""
        if not self._keeps:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        kept = tokens[~torch.isin(tokens, torch.tensor(self.ends))]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False)).strip()

    def lengths(self, tokens: Tensor) -> list[int]:
        """Decisions of each row of [B, S]: up to and including its first end."""
        ended = torch.isin(tokens, torch.tensor(self.ends))
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        return first.tolist()


def suppressed_ids(
    model: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], allowed: Sequence[str] = ()
) -> list[int]:
    """Tokens that are never sampled: special and image tokens (a sampled image token breaks the next forward), and ids
    beyond the tokenizer's vocabulary that padding of the embedding created.

    Args:
        allowed: special tokens that are sampled all the same.

    Raises:
        RecipeError: if one of them is no token, or stands for a picture.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    named = model.config.to_dict()
    media = {value for key, value in named.items() if re.search(r"(image|video|vision).*token_(id|index)$", key)}
    vocabulary = model.get_output_embeddings().weight.shape[0]
    beyond = range(len(tokenizer), vocabulary)
    kept = token_ids(tokenizer, allowed, SPECIALS)
    for token, name in zip(kept, allowed, strict=True):
        if token in media:
            raise RecipeError(f"{SPECIALS}: {name} stands for pictures, and would break the next forward; leave it out")
    return sorted((special | media | set(beyond)) - set(ends) - set(kept) - {None})


def token_ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], key: str) -> list[int]:
    """The ids of tokens that a recipe names.

    Args:
        key: of the recipe, which errors begin with.

    Raises:
        RecipeError: for a name that is no single token.
    """
    known = tokenizer.get_vocab()
    for name in names:
        if name not in known:
            added = [token.content for token in tokenizer.added_tokens_decoder.values()]
            raise RecipeError(f"{key}: {name!r} is no token of this model{nearest(name, added)}")
    return [known[name] for name in names]

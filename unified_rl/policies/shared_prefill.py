"""Generation that prefills each prompt once, repeats its cache for the group, and lets finished rows leave the batch.

It is a decoding method for `generate(custom_generate=...)`: transformers prepares inputs, positions and the cache, and
the loop below uses the model's own `prepare_inputs_for_generation` and `_update_model_kwargs_for_generation`. Token
positions travel with the rows, so that nothing that a model keeps on itself (Qwen-VL's rope deltas) is read again.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from unified_rl.errors import RecipeError
from unified_rl.policies.categorical_head import draw
from unified_rl.policies.sharded import goes_on_anywhere, is_sharded

STATE_ON_MODULES = ("recurrent_gemma",)
"""`model_type` of models that take a cache, and keep a part of their past elsewhere all the same."""


def can_share_prefill(model: Any) -> bool:
    """Whether one prefill can serve a group: the model keeps its whole past, recurrent states too, in a cache of the
    library's, whose rows can be selected. Not so, for instance, Mamba, RWKV and MiniMax-01."""
    accepted = inspect.signature(model.forward).parameters
    in_cache = "past_key_values" in accepted and model.config.model_type not in STATE_ON_MODULES
    return in_cache and model._supports_default_dynamic_cache()


class SharedPrefill:
    """Decodes N rows from the prefill of their U distinct prompts."""

    def __init__(
        self, chain: LogitsProcessorList, uniforms: Tensor, owner: Sequence[int], end_ids: Sequence[int], pad_id: int
    ) -> None:
        """
        Args:
            chain: the behaviour policy's logits processors.
            uniforms: [N, S] float64 in [0, 1).
            owner: for each row, the number of its prompt in the batch that is prefilled.
        """
        self._chain, self._uniforms, self._owner, self._end_ids = chain, uniforms, owner, end_ids
        self.tokens = torch.full(uniforms.shape, pad_id, dtype=torch.int64)
        """[N, S], of which each row is valid up to its end token."""
        self.log_probs = torch.zeros(uniforms.shape)
        """[N, S] in nats."""

    def __call__(self, model: Any, input_ids: Tensor, **given: Any) -> Tensor:
        """What `generate` calls after its preparations; returns the tokens [N, S].

        Raises:
            RecipeError: if the model is no decoder.
        """
        arguments = {key: value for key, value in given.items() if key not in _OF_GENERATE}
        prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **arguments)
        outputs = model(**prepared, return_dict=True)
        if not isinstance(outputs.past_key_values, Cache):
            name = type(model).__name__
            raise RecipeError(f"policy.model: {name} gave no cache, as encoders do; family: masked_text may be meant")
        arguments = model._update_model_kwargs_for_generation(outputs, arguments, is_encoder_decoder=False)
        owner = torch.tensor(self._owner, device=input_ids.device)
        arguments = take(arguments, owner, len(input_ids))
        input_ids, logits = input_ids[owner], outputs.logits[:, -1][owner]
        alive, end_ids = torch.arange(len(owner)), torch.tensor(self._end_ids)
        together, finished = is_sharded(model), False
        for step in range(self._uniforms.shape[1]):
            if step:
                prepared = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **arguments)
                outputs = model(**prepared, return_dict=True)
                arguments = model._update_model_kwargs_for_generation(outputs, arguments, is_encoder_decoder=False)
                logits = outputs.logits[:, -1]
            scores = self._chain(input_ids, logits.float())  # type: ignore[arg-type]  # annotated as LongTensor
            drawn, log_probs = draw(scores, self._uniforms[alive, step])
            input_ids = torch.cat([input_ids, drawn[:, None]], dim=1)
            going_on = (~torch.isin(drawn.cpu(), end_ids)).nonzero()[:, 0]
            if not finished:
                self.tokens[alive, step], self.log_probs[alive, step] = drawn.cpu(), log_probs.cpu()
                finished = not len(going_on)
            if not (goes_on_anywhere(not finished, input_ids.device) if together else not finished):
                break
            # Once finished, the last rows are decoded on for the other processes' sake, and thrown away.
            if len(going_on) < len(alive) and not finished:
                alive = alive[going_on]
                rows = going_on.to(input_ids.device)
                arguments, input_ids = take(arguments, rows, len(input_ids)), input_ids[rows]
        return self.tokens


_OF_GENERATE = {"logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"}


def take(arguments: dict[str, Any], rows: Tensor, num_rows: int) -> dict[str, Any]:
    """The arguments of a decoding step for some rows of the batch (each any number of times)."""
    taken: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Cache):
            value.reorder_cache(rows)  # type: ignore[arg-type]
        elif name in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL:
            continue  # the prefill has seen the pictures
        elif isinstance(value, Tensor) and name == "position_ids" and value.ndim == 3:
            value = value[:, rows]  # [axes, B, L]
        elif isinstance(value, Tensor) and value.ndim and len(value) == num_rows:
            value = value[rows]
        taken[name] = value
    return taken

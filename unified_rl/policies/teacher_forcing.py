"""The logits that a language model gave its completions, with gradients, in one or two forwards.

Inputs are continued for the completion by the model's own `_update_model_kwargs_for_generation` and
`prepare_inputs_for_generation`, as they were while sampling: positions, token types and masks are the same by
construction.

Rows of one prompt can share its part of the forward. The prompt is then prefilled once into a cache, with gradients;
the cache's rows are repeated for the group, and the completions continue from it. The gradient is the same: what
flows back into the cache from all rows of a group is summed there before it goes through the prompt.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import ModelOutput

from unified_rl.policies.shared_prefill import take
from unified_rl.policies.text_inputs import Inputs, is_token_column


def plain_logits(model: Any, batch: Inputs, rows: Sequence[Inputs], tokens: Tensor) -> Tensor:
    """[B, S, V] logits that predicted `tokens`, in the model's dtype, by one forward over prompts and completions.

    Args:
        batch: the B rows' prompts, joined.
        rows: the same, one by one.
        tokens: [B, S] completions, padded on the right.
    """
    num_steps = tokens.shape[1]
    arguments = model._update_model_kwargs_for_generation(
        ModelOutput(), _prompt_arguments(model, batch), is_encoder_decoder=False
    )
    arguments = _lengthened(arguments, {name for name in batch if is_token_column(rows, name)}, num_steps - 1)
    prepared = model.prepare_inputs_for_generation(
        torch.cat([batch["input_ids"], tokens], dim=1),
        is_first_iteration=True,
        use_cache=False,
        **arguments,
    )
    logits = model(**{**prepared, **_keep(model, num_steps + 1)}, return_dict=True).logits
    return logits[:, -(num_steps + 1) : -1]


def shared_logits(model: Any, batch: Inputs, rows: Sequence[Inputs], owner: Sequence[int], tokens: Tensor) -> Tensor:
    """[B, S, V] as `plain_logits`, the same to rounding, each distinct prompt computed once.

    Args:
        batch: the U distinct prompts, joined.
        rows: the same, one by one.
        owner: for each of the B completions, the number of its prompt.
        tokens: [B, S].
    """
    num_steps = tokens.shape[1]
    prompt_ids = batch["input_ids"]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    prepared = model.prepare_inputs_for_generation(
        prompt_ids,
        is_first_iteration=True,
        past_key_values=cache,
        **_prompt_arguments(model, batch),
    )
    outputs = model(**{**prepared, **_keep(model, 1)}, return_dict=True)
    index = torch.tensor(owner, device=prompt_ids.device)
    first = outputs.logits[:, -1:][index]
    if num_steps == 1:
        return first
    arguments = {**_prompt_arguments(model, batch), "use_cache": True}
    arguments = model._update_model_kwargs_for_generation(outputs, arguments, is_encoder_decoder=False)
    # The last token of a completion predicts nothing that is scored: S - 1 of them follow the prompt.
    arguments = _lengthened(arguments, {name for name in batch if is_token_column(rows, name)}, num_steps - 2)
    prepared = model.prepare_inputs_for_generation(
        torch.cat([prompt_ids[index], tokens[:, :-1]], dim=1),
        next_sequence_length=num_steps - 1,
        **take(arguments, index, len(prompt_ids)),
    )
    outputs = model(**{**prepared, **_keep(model, num_steps - 1)}, return_dict=True)
    return torch.cat([first, outputs.logits[:, -(num_steps - 1) :]], dim=1)


def can_share(model: Any) -> bool:
    """Whether scoring may continue from a cache now.

    Activation checkpointing switches a model's cache off. Layers with a state in place of keys and values (Qwen3.5,
    Jamba) update it in place, a token at a time: gradients do not flow through it, nor do several tokens at once.
    """
    return not model._is_stateful and not (model.is_activation_checkpointing and model.training)


def _prompt_arguments(model: Any, batch: Inputs) -> dict[str, Any]:
    """What goes with the prompts' ids into `prepare_inputs_for_generation`."""
    arguments: dict[str, Any] = {key: value for key, value in batch.items() if key != "input_ids"}
    if "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = model._prepare_position_ids_for_generation(batch["input_ids"], batch)
    return arguments


def _keep(model: Any, num_logits: int) -> dict[str, int]:
    """Ask for the last logits only, where the model can. Given to the model itself: some models' own preparation of
    inputs (Bamba's, Nemotron-H's) puts another number in its place."""
    return {"logits_to_keep": num_logits} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _lengthened(arguments: dict[str, Any], token_columns: set[str], num_more: int) -> dict[str, Any]:
    """Arguments for `num_more` tokens after the first of a completion.

    The model's own method is asked for one token, as while sampling: asked for several, it repeats the prompt's last
    token types, pictures' included. Every further token gets what the first one got, and the next position.
    """
    for name, value in arguments.items():
        if name == "position_ids":
            later = value[..., -1:] + torch.arange(1, num_more + 1, device=value.device)
            arguments[name] = torch.cat([value, later], dim=-1)
        elif name in token_columns:
            arguments[name] = torch.cat([value, *[value[:, -1:]] * num_more], dim=1)
    return arguments

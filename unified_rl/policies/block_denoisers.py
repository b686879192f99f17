"""The two kinds of text denoisers that diffusers has pipelines for: how each is called, in sampling and in scoring.

`MaskedBlocks` fills in mask tokens of one bidirectional sequence (LLaDA2Pipeline). `CanvasBlocks` denoises a canvas of
random tokens beside the encoded text so far, told of its own former prediction (DiffusionGemmaPipeline).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline, LLaDA2Pipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, DiffusionGemmaForBlockDiffusion

from unified_rl.policies.block_head import BlockHead, BlockTape, State, recorded_blocks
from unified_rl.policies.scheduler_head import UnsupportedPipelineError
from unified_rl.recipe.policy import MaskedTextSampling

Call = Callable[..., Any]


class BlockDenoiser(Protocol):
    """A model and its pipeline's loop."""

    call_keys: tuple[str, ...]
    """Arguments of the pipeline's call that a recipe may set under `call`; other keys set the rest."""

    def run(self, model: nn.Module, prompts: Tensor, settings: MaskedTextSampling, tape: BlockTape) -> Tensor:
        """The loop, for prompts [B, P] without padding: sequences [B, P + max_new_tokens or more]."""
        ...

    def logits(
        self, model: nn.Module, sequences: Sequence[Tensor], states: Sequence[State], limits: Sequence[int]
    ) -> Tensor:
        """[B, L, V] for the blocks of B states, with gradients if they are enabled; rows of shorter blocks go on with
        anything.

        Args:
            sequences: what each row's sequence ended up as.
            limits: where each row's sequence ends; a block may reach beyond it.
        """
        ...

    def span(self, prompt: int, end: int, settings: MaskedTextSampling, generator: torch.Generator) -> tuple[int, int]:
        """The places (from, up to but without) of a finished text that an estimator makes unknown and predicts at once.

        Args:
            prompt: tokens of the prompt.
            end: where the text ends, the end token included.
        """
        ...

    def corrupted(self, tokens: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
        """[L] tokens with those at `places` [L] (bool) made unknown, as the loop begins a block."""
        ...

    def most_steps(self, settings: MaskedTextSampling) -> int:
        """States that a row's run can have, at most."""
        ...


class MaskedBlocks:
    """A bidirectional model of one sequence, whose unknown tokens are masks."""

    call_keys: tuple[str, ...] = ("mask_token_id", "eos_early_stop", "max_post_steps", "minimal_topk")

    def __init__(self, model: nn.Module, mask_id: int, end_id: int) -> None:
        parameters = inspect.signature(model.forward).parameters
        for name in ("attention_mask", "position_ids"):
            if name not in parameters:
                raise UnsupportedPipelineError(
                    f"{type(model).__name__}.forward: takes no {name}, which LLaDA2Pipeline gives"
                )
        self._mask_id, self._end_id = mask_id, end_id
        self._head = BlockHead()
        self._scheduler = recorded_blocks(BlockRefinementScheduler(), self._head)

    def run(self, model: nn.Module, prompts: Tensor, settings: MaskedTextSampling, tape: BlockTape) -> Tensor:
        pipeline: Any = LLaDA2Pipeline(model=model, scheduler=self._scheduler, tokenizer=None)
        pipeline.set_progress_bar_config(disable=True)

        def denoise(forward: Call, ids: Tensor, **inputs: Any) -> Any:
            tape.start = ids.shape[1] - settings.block_length
            return forward(ids, **inputs)

        arguments: dict[str, Any] = {
            "input_ids": prompts,
            "gen_length": settings.max_new_tokens,
            "block_length": settings.block_length,
            "num_inference_steps": settings.num_inference_steps,
            "threshold": settings.threshold,
            "editing_threshold": settings.editing_threshold,
            "eos_token_id": self._end_id,
            "mask_token_id": self._mask_id,
            "output_type": "seq",
        }
        with self._head.driven(tape), _wrapped(model, denoise):
            generated = pipeline(**{**settings.call, **arguments}).sequences
        return torch.cat([prompts, generated], dim=1)

    def logits(
        self, model: nn.Module, sequences: Sequence[Tensor], states: Sequence[State], limits: Sequence[int]
    ) -> Tensor:
        device = next(model.parameters()).device
        rows = [
            torch.cat([sequence[: state.start], state.before])
            for sequence, state in zip(sequences, states, strict=True)
        ]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._mask_id).to(device)
        places = torch.arange(ids.shape[1], device=device)
        ends = [min(len(row), limit) for row, limit in zip(rows, limits, strict=True)]
        mask = (places < torch.tensor(ends, device=device)[:, None]).long()
        logits = model(ids, attention_mask=mask, position_ids=places.expand(len(rows), -1)).logits
        return _blocks(logits, states)

    def span(self, prompt: int, end: int, settings: MaskedTextSampling, generator: torch.Generator) -> tuple[int, int]:
        """The whole text, as published; what the sampler left in the rest of its last block is still seen."""
        aligned = -(-end // settings.block_length) * settings.block_length
        return prompt, min(aligned, prompt + settings.max_new_tokens)

    def corrupted(self, tokens: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
        return tokens.masked_fill(places, self._mask_id)

    def most_steps(self, settings: MaskedTextSampling) -> int:
        edits = settings.call.get("max_post_steps", _default(LLaDA2Pipeline, "max_post_steps")) + 1
        edits = 0 if settings.editing_threshold is None else edits
        return settings.num_blocks * (settings.num_inference_steps + edits)


class CanvasBlocks:
    """DiffusionGemma: a causal encoder of the text so far, and a decoder of a canvas of tokens, all of which are
    unknown until they are committed.

    The decoder is told of its former prediction: the expected embedding of every token. That is part of a state, so it
    is recorded ([canvas, hidden size], not the logits over the vocabulary) and scored as it was; no gradient flows
    through it, as in the training of such models.
    """

    call_keys: tuple[str, ...] = ("eos_early_stop",)

    def __init__(self, model: DiffusionGemmaForBlockDiffusion, end_id: int) -> None:
        config: Any = model.config
        self._canvas_length: int = config.canvas_length
        self._num_vocabulary: int = config.get_text_config(decoder=True).vocab_size
        self._end_id = end_id
        self._head = BlockHead()
        self._scheduler = recorded_blocks(BlockRefinementScheduler(), self._head)

    def run(self, model: nn.Module, prompts: Tensor, settings: MaskedTextSampling, tape: BlockTape) -> Tensor:
        config = {"threshold": settings.threshold, "editing_threshold": settings.editing_threshold}
        self._scheduler.register_to_config(**config)
        pipeline: Any = DiffusionGemmaPipeline(model=model, scheduler=self._scheduler, processor=_Encoded(prompts))
        pipeline.set_progress_bar_config(disable=True)

        def denoise(forward: Call, *, decoder_input_ids: Tensor, **inputs: Any) -> Any:
            if inputs["self_conditioning_logits"] is None:  # a new canvas, which the loop draws for all rows together
                drawn = [
                    torch.randint(self._num_vocabulary, (1, self._canvas_length), generator=g) for g in tape.generators
                ]
                decoder_input_ids = tape.canvas = torch.cat(drawn).to(decoder_input_ids.device)
                tape.start = int(inputs["decoder_position_ids"][0, 0])
            return forward(decoder_input_ids=decoder_input_ids, **inputs)

        def listen(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            tape.signal = inputs[1]

        arguments: dict[str, Any] = {
            "messages": [],
            "gen_length": settings.max_new_tokens,
            "num_inference_steps": settings.num_inference_steps,
            "temperature": 1.0,
            "eos_token_id": self._end_id,
            "confidence_threshold": None,  # it would put the likeliest tokens in the place of those that were drawn
            "output_type": "seq",
        }
        hook = _self_conditioning(model).register_forward_pre_hook(listen)
        try:
            with self._head.driven(tape), _wrapped(model, denoise):
                generated = pipeline(**{**settings.call, **arguments}).sequences
        finally:
            hook.remove()
        return torch.cat([prompts, generated], dim=1)

    def logits(
        self, model: nn.Module, sequences: Sequence[Tensor], states: Sequence[State], limits: Sequence[int]
    ) -> Tensor:
        device = next(model.parameters()).device
        known = [sequence[: state.start] for sequence, state in zip(sequences, states, strict=True)]
        ids = pad_sequence(known, batch_first=True, padding_side="left").to(device)
        lengths = torch.tensor([len(row) for row in known], device=device)[:, None]
        mask = torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths
        canvas = torch.stack([state.before for state in states]).to(device)
        places = torch.arange(canvas.shape[1], device=device)
        recorded = [state.signal for state in states]

        def tell(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            embeds, silence = inputs
            told = [silence[row] if signal is None else signal for row, signal in enumerate(recorded)]
            return embeds, torch.stack([signal.to(silence) for signal in told])

        hook = _self_conditioning(model).register_forward_pre_hook(tell)
        try:
            return model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                decoder_input_ids=canvas,
                decoder_attention_mask=torch.cat([mask, torch.ones_like(canvas, dtype=torch.bool)], dim=1),
                decoder_position_ids=lengths + places,
            ).logits
        finally:
            hook.remove()

    def span(self, prompt: int, end: int, settings: MaskedTextSampling, generator: torch.Generator) -> tuple[int, int]:
        """One canvas, any that the text needs: the decoder sees no other."""
        canvases = -(-(end - prompt) // self._canvas_length)
        start = prompt + self._canvas_length * int(torch.randint(canvases, (), generator=generator))
        return start, start + self._canvas_length

    def corrupted(self, tokens: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randint(self._num_vocabulary, tokens.shape, generator=generator)
        return torch.where(places, noise, tokens)

    def most_steps(self, settings: MaskedTextSampling) -> int:
        return -(-settings.max_new_tokens // self._canvas_length) * settings.num_inference_steps


class _Encoded:
    """Stands in for a pipeline's processor where prompts are tokens already."""

    eos_token_id = None

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def apply_chat_template(self, messages: Any, **settings: Any) -> BatchFeature:
        return BatchFeature({"input_ids": self._ids})


def _self_conditioning(model: Any) -> nn.Module:
    return model.model.decoder.self_conditioning


def _blocks(logits: Tensor, states: Sequence[State]) -> Tensor:
    """[B, T, V] to the [B, L, V] of each row's block."""
    starts = torch.tensor([state.start for state in states], device=logits.device)
    length = max(len(state.before) for state in states)
    places = (starts[:, None] + torch.arange(length, device=logits.device)).clamp(max=logits.shape[1] - 1)
    return logits[torch.arange(len(logits), device=logits.device)[:, None], places]


@contextmanager
def _wrapped(model: nn.Module, denoise: Call) -> Iterator[None]:
    """The model's forward called through `denoise(forward, ...)`."""
    own = model.forward
    model.forward = lambda *args, **kwargs: denoise(own, *args, **kwargs)
    try:
        yield
    finally:
        del model.forward  # the instance's; the class's own comes back


def _default(pipeline: type, name: str) -> Any:
    return inspect.signature(pipeline.__call__).parameters[name].default

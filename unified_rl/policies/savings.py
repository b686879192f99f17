"""What `policy.memory` and `policy.compile` switch on, by the libraries' own means where they have some."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from unified_rl.errors import RecipeError
from unified_rl.recipe.policy import PolicyBlock

COMPILERS = ("c++", "g++", "clang++")


def apply(pipeline: Any, denoisers: Sequence[Any], block: PolicyBlock) -> None:
    """Switch on all but the text encoders' part, for which see `TextEncoders`.

    Raises:
        RecipeError: if the model lacks what is asked for.
    """
    savings, name = block.memory, type(pipeline).__name__
    vae = pipeline.components.get("vae")
    for key, wanted in (("slicing", savings.vae_slicing), ("tiling", savings.vae_tiling)):
        switch = f"enable_{key}"
        if wanted and not hasattr(vae, switch):
            raise RecipeError(f"policy.memory.vae_{key}: {name} has no VAE with {switch}")
        if wanted:
            try:
                getattr(vae, switch)()
            except NotImplementedError as error:
                raise RecipeError(f"policy.memory.vae_{key}: {' '.join(str(error).split())}") from error
    if savings.decode_batch is not None:
        if vae is None:
            raise RecipeError(f"policy.memory.decode_batch: {name} has no VAE")
        vae.decode = in_chunks(vae.decode, savings.decode_batch)
    for denoiser in denoisers:
        if savings.gradient_checkpointing:
            checkpoint_blocks(denoiser)
        if block.compile:
            _compile(denoiser)


def checkpoint_blocks(denoiser: nn.Module) -> None:
    """Keep the inputs alone of the blocks that a denoiser runs through, and compute them again in the backward pass.

    Each block is called as ever. diffusers' own switch has another call of the blocks for each class, some of which
    leave an argument out (0.42: the mask of Chroma's single blocks, one by place in AudioLDM2's).

    Raises:
        RecipeError: if it has no lists of blocks.
    """
    blocks = _listed(denoiser)
    if not blocks:
        raise RecipeError(f"policy.memory.gradient_checkpointing: {type(denoiser).__name__} has no lists of blocks")
    for block in blocks:
        block.forward = functools.wraps(block.forward)(functools.partial(_kept_small, block.forward))


def _kept_small(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    leaves, form = tree_flatten((args, kwargs))

    def run(*given: Any) -> Any:
        # Copies, because some blocks add in place to what they are given (ControlNet-XS's).
        own_args, own_kwargs = tree_unflatten(
            [each.clone() if isinstance(each, Tensor) else each for each in given], form
        )
        return forward(*own_args, **own_kwargs)

    return checkpoint(run, *leaves, use_reentrant=False)


def _listed(denoiser: nn.Module) -> list[nn.Module]:
    """The parts of the lists that a denoiser runs through, also of lists in lists."""
    return [part for child in denoiser.children() if isinstance(child, nn.ModuleList) for part in _members(child)]


def _members(parts: nn.ModuleList) -> Iterator[nn.Module]:
    for part in parts:
        if isinstance(part, nn.ModuleList):
            yield from _members(part)
        elif part is not None:  # Wuerstchen's decoder has gaps
            yield part


def in_chunks(decode: Callable, size: int) -> Callable:
    """A VAE's `decode` that takes `size` rows at a time; other arguments with a row for each are cut alike."""

    @functools.wraps(decode)
    def chunked(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        def cut(value: Any, rows: slice) -> Any:
            return value[rows] if isinstance(value, (Tensor, list)) and len(value) == len(latents) else value

        parts = []
        for start in range(0, len(latents), size):
            rows = slice(start, start + size)
            more = {key: cut(value, rows) for key, value in kwargs.items()}
            parts.append(decode(latents[rows], *(cut(value, rows) for value in args), **more))
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(each) for each in zip(*parts, strict=True))
        return type(parts[0])(sample=torch.cat([part.sample for part in parts]))

    return chunked


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Inside it, a transformers model with activation checkpointing acts on it: its layers ask for training mode, which
    is set on them alone, so that nothing else of the model changes (their parts' dropout above all)."""
    flagged = [model, *(module for module in model.modules() if vars(module).get("gradient_checkpointing"))]
    for module in flagged:
        module.training = True
    try:
        yield
    finally:
        for module in flagged:
            module.training = False


def _compile(denoiser: Any) -> None:
    """Compile the denoiser's repeated blocks: those that diffusers names, else the parts of the lists that it runs
    through. Blocks of one kind and shape share one compilation.

    Raises:
        RecipeError: without a C++ compiler on a CPU, or for a model without repeated blocks.
    """
    named = [os.environ["CXX"]] if "CXX" in os.environ else [*COMPILERS]
    on_cpu = all(parameter.device.type == "cpu" for parameter in denoiser.parameters())
    if on_cpu and not any(shutil.which(compiler) for compiler in named):
        raise RecipeError(f"policy.compile: on a CPU it needs a C++ compiler ({', '.join(named)}), and there is none")
    if denoiser._repeated_blocks:
        denoiser.compile_repeated_blocks()
        return
    blocks = _listed(denoiser)
    if not blocks:
        raise RecipeError(f"policy.compile: {type(denoiser).__name__} has no repeated blocks")
    for block in blocks:
        block.compile()

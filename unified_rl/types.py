"""The records that travel through the trainer, one per stage of the data path; no field is filled in later.

    Prompt --sample--> Trajectory --score--> Scores --advantages--> Windows --log_prob--> StepStats

Dimension letters, here and everywhere: N trajectories on a rank, B rows of a window, G group size, S steps, T turns,
L sequence length, V vocabulary. A *step* is one stochastic transition (a token, a denoising step, an unmasking step).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Column = Tensor | list
Rows = slice | list[int]
Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What one trajectory is asked for. A group is `group_size` prompts that differ in `seed` only."""

    text: str | Messages
    """The prompt as text, or as chat messages."""
    images: tuple[Any, ...]
    """Condition pictures (PIL), in the order of their placeholders; empty for text-only rows."""
    columns: Mapping[str, Any]
    """The dataset row's other columns; rewards receive them by name."""
    group_id: int
    """Equal for all trajectories of one prompt in one rollout; unique over all processes."""
    seed: int
    """Seeds every random draw of this trajectory, so that a sample depends on no other row of its batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The decoded view of one trajectory: all that a reward may see."""

    text: str | None
    images: tuple[Any, ...]
    """Generated pictures (PIL); several for a video, one waveform (array) for sound, empty for text."""
    tokens: tuple[int, ...] | None = None
    """The ids of a text's tokens, with the one that ends it; None if it has none."""
    truncated: bool = False
    """Cut at the most tokens, or turns, that a completion may have."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What an environment said of an episode; rewards receive it by name, as they do columns."""
    spoiled: bool = False
    """Decoded to something that is not finite: it counts as failed with every reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One stretch of decisions of the same kind, for B trajectories of up to S steps each."""

    actions: Mapping[str, Column]
    """Replay payload: columns of B rows (tensors with leading dimension B, or lists of length B). Opaque to everyone
    but the policy that wrote it."""
    rollout_log_probs: Tensor
    """[B, S] float32, in nats as the policy reports them (Gaussian steps: mean over dims); 0 where masked."""
    loss_mask: Tensor
    """[B, S] bool: True where the policy made a random decision."""
    turn_ids: Tensor
    """[B, S] int64: the turn that a step belongs to; 0 in single-turn rollouts."""
    context_tokens: Tensor | None = None
    """[B] int64: tokens that a forward reads beside a row's steps (its prompt), for batches of an even amount of work;
    None where rows cost the same."""

    def __post_init__(self) -> None:
        shape = self.rollout_log_probs.shape
        assert self.loss_mask.shape == shape and self.turn_ids.shape == shape, "segment matrices must all be [B, S]"
        columns = [*self.actions.values(), *([] if self.context_tokens is None else [self.context_tokens])]
        assert all(len(column) == shape[0] for column in columns), "every column needs B rows"

    @property
    def num_rows(self) -> int:
        return self.rollout_log_probs.shape[0]

    def rows(self, index: Rows) -> "Segment":
        """Some of the rows, as a segment."""
        return Segment(
            actions={name: _rows_of(column, index) for name, column in self.actions.items()},
            rollout_log_probs=self.rollout_log_probs[index],
            loss_mask=self.loss_mask[index],
            turn_ids=self.turn_ids[index],
            context_tokens=None if self.context_tokens is None else self.context_tokens[index],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """B sampled trajectories with what is needed to evaluate each of their steps again."""

    group_ids: Tensor
    """[B] int64."""
    segments: Mapping[str, Segment]
    """By name: {"image"}, {"text"}, or both."""
    completions: Sequence[Completion]
    policy_version: int
    """Number of optimiser steps that the sampling policy had taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStates:
    """The states in which s steps of B trajectories were drawn, as a critic sees them."""

    state: Tensor
    """[B, s, ...]: the last hidden state [H] of tokens, latents [C, ...] of denoising steps."""
    level: Tensor | None
    """[B, s] noise level of latents as the schedule's time in [0, 1]; None for tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """A policy's evaluation of s steps of B trajectories. Gradients flow through every field."""

    log_probs: Tensor
    """[B, s] float32."""
    entropy: Tensor | None
    """[B, s] in nats, or None where the policy does not compute it."""
    mean: Tensor | None
    """[B, s, ...] mean of a Gaussian step; None for categorical steps."""
    std: Tensor | None
    """Full standard deviation of the step (sqrt(dt) included), broadcastable against `mean`."""
    states: StepStates | None = None
    """While a policy is watched, and where it costs no second forward."""
    values: Tensor | None = None
    """[B, s] of a critic, in units of the reward; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoised:
    """A denoiser's prediction for B noised samples at one noise level: x_t = signal * clean + level * noise.

    predicted clean - clean = clean_scale * (output - target), whatever the denoiser predicts."""

    output: Tensor
    """[B, ...] float32, with gradients: velocity, noise or clean sample, as the denoiser's scheduler has it."""
    target: Tensor
    """[B, ...] what a perfect prediction would be."""
    clean_scale: Tensor
    """[]."""
    level: Tensor
    """[] in (0, 1]: the share of noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A completion that some policy once gave, to be trained on as it is."""

    completion: Completion
    token_ids: Sequence[int] | None
    """What was drawn; None: the text's own tokens and an end."""
    log_probs: Sequence[float] | None
    """Of the tokens, by the policy that drew them; None: unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the rewards said about B completions."""

    total: Tensor
    """[B] weighted sum; NaN marks an excluded sample."""
    breakdown: Mapping[str, Tensor]
    """[B] per reward, as it said; NaN where it abstained or failed."""
    shaped: Mapping[str, Tensor]
    """[B] per reward, as it enters the sum before its weight: clipped, normalised, gated."""
    report: Mapping[str, float]
    """How the rewards fared, as metrics of all processes."""


def _rows_of(column: Column, index: Rows) -> Column:
    if isinstance(column, Tensor):
        return column[index]
    return column[index] if isinstance(index, slice) else [column[row] for row in index]


def _pad_steps(matrix: Tensor, num_steps: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, num_steps - matrix.shape[1]))


def _join_column(columns: Sequence[Column]) -> Column:
    if isinstance(columns[0], Tensor):
        return torch.cat([column for column in columns if isinstance(column, Tensor)])
    return [row for column in columns for row in column]


def concat_segments(segments: Sequence[Segment]) -> Segment:
    """Join segments by row. Shorter ones are padded with masked steps on the right."""
    num_steps = max(segment.rollout_log_probs.shape[1] for segment in segments)
    contexts = [segment.context_tokens for segment in segments if segment.context_tokens is not None]
    return Segment(
        actions={name: _join_column([part.actions[name] for part in segments]) for name in segments[0].actions},
        rollout_log_probs=torch.cat([_pad_steps(part.rollout_log_probs, num_steps) for part in segments]),
        loss_mask=torch.cat([_pad_steps(part.loss_mask, num_steps) for part in segments]),
        turn_ids=torch.cat([_pad_steps(part.turn_ids, num_steps) for part in segments]),
        context_tokens=None if not contexts else torch.cat(contexts),
    )


def concat_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """Join trajectories by row, all of the same policy version and with the same segments."""
    assert len({part.policy_version for part in parts}) == 1, "one rollout, one policy version"
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        group_ids=torch.cat([part.group_ids for part in parts]),
        segments={name: concat_segments([part.segments[name] for part in parts]) for name in parts[0].segments},
        completions=[completion for part in parts for completion in part.completions],
    )

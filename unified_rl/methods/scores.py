"""Losses of the scores of all samples of an update: imitation (SFT, RWR), preferences (DPO), groups (DGPO).

A sample's score is the log-prob of its text, or minus half its denoising error at a noise level. What compares the
members of a group gives them one noise; imitation gives each its own, as an average wants it. The loss's derivative by
each score is taken first, over all processes; a window then backpropagates its own scores with it.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_rl.assemble import Parts
from unified_rl.batching import spans
from unified_rl.engine import distributed
from unified_rl.methods.planning import (
    Planned,
    denoiser,
    levels_of,
    loss_of,
    noise_seeds,
    prompts_of,
    row_weights,
    rows_of,
    trained_mask,
)
from unified_rl.metrics import StepMetrics
from unified_rl.objectives import aggregate
from unified_rl.objectives.forward_process import denoising_score, squared_error
from unified_rl.objectives.preference import SCORE_LOSSES, ScoreLoss, ScoreTerms
from unified_rl.prepare import Prepared
from unified_rl.protocols import DenoisingPolicy, Policy
from unified_rl.types import Denoised, Rows
from unified_rl.windows import Window

WHOLE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTarget:
    """The scores of one optimiser step and what each is worth."""

    parts: Parts
    prepared: Prepared
    planned: Planned
    columns: list[int]
    """Noise levels, one a column of scores; [WHOLE] where a score is a whole text's."""
    slopes: Tensor
    """[N, K] derivative of the loss by each score of this process."""
    total: ScoreLoss
    """Of all processes; its loss is NaN if no scores were needed to know the slopes."""
    num_windows: int
    """Over all processes."""
    kl_coef: float
    kl_weights: Tensor
    """[N]."""


def plan(parts: Parts, prepared: Prepared, planned: Planned) -> list[Window]:
    """One window for each chunk of rows and column of scores."""
    policy, objective = parts.policy, prepared.objective
    texts = not isinstance(policy, DenoisingPolicy)
    columns = [WHOLE] if texts else levels_of(parts, denoiser(policy, planned.method), prepared, planned)
    places = spans(
        prepared.segment,
        rows_of(parts.recipe, prepared, planned),
        columns,
        parts.recipe.engine,
        steps_per_forward=None if texts else 1,
    )
    measured = planned.method != "sft"  # whose slopes do not depend on the scores
    score = _Scorer(parts, prepared, planned)
    now, ref, old = (torch.zeros(len(prepared.advantages), len(columns), dtype=torch.float64) for _ in range(3))
    if measured:
        for rows, step in places:
            at = (rows, columns.index(column_of(step)))
            now[at] = score(rows, step).to(now)
            ref[at] = score(rows, step, weights="reference").to(now)
            separate = objective.old_weights != "trained"
            old[at] = score(rows, step, weights=objective.old_weights).to(now) if separate else now[at]
    slopes, total = _slopes(parts, prepared, planned, now, ref, old)
    target = ScoredTarget(
        parts=parts,
        prepared=prepared,
        planned=planned,
        columns=columns,
        slopes=slopes * planned.coef,
        total=total if measured else ScoreLoss(loss=torch.tensor(torch.nan), metrics={}),
        num_windows=len(places) * distributed.world_size(),
        kl_coef=parts.memory.kl_coef(prepared.name, objective),
        kl_weights=row_weights(trained_mask(parts.recipe, prepared, planned)) * planned.coef / len(columns),
    )
    return [Window(target=target, rows=rows, steps=step, loss=scored_loss) for rows, step in places]


def column_of(step: slice) -> int:
    """The column of scores that a forward over `step` gives: its noise level, or the whole text's."""
    return WHOLE if step.start is None else step.start


def _slopes(
    parts: Parts, prepared: Prepared, planned: Planned, now: Tensor, ref: Tensor, old: Tensor
) -> tuple[Tensor, ScoreLoss]:
    """d loss / d score [N, K] of this process's rows, and the loss, from the scores of all processes."""
    objective = prepared.objective
    taught = trained_mask(parts.recipe, prepared, planned) & prepared.advantages.ne(0.0)
    texts = not isinstance(parts.policy, DenoisingPolicy)
    weights = _token_shares(prepared, taught) if texts else (row_weights(taught) / now.shape[1])[:, None].expand_as(now)
    lengths = prepared.segment.loss_mask.sum(1) if texts else torch.ones(len(now))
    scores = distributed.gather_rows(now).requires_grad_()
    terms = ScoreTerms(
        scores=scores,
        ref_scores=distributed.gather_rows(ref),
        old_scores=distributed.gather_rows(old),
        advantages=distributed.gather_rows(torch.where(taught, prepared.advantages.double(), 0.0)),
        group_ids=distributed.gather_rows(torch.tensor([prompt.group_id for prompt in prepared.prompts])),
        weights=distributed.gather_rows(weights),
        lengths=distributed.gather_rows(lengths.clamp(min=1).double()),
        pair_coef=objective.pair_coef,
        pair_form=objective.pair_form,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )
    total = loss_of(planned.method, SCORE_LOSSES)(terms)
    (slopes,) = torch.autograd.grad(total.loss, scores)
    start = distributed.rank() * len(now)
    return slopes[start : start + len(now)], total


def _token_shares(prepared: Prepared, taught: Tensor) -> Tensor:
    """[N, 1] share of each of the texts [N] of `taught`.

    A text's score is a sum over its tokens, and so its share is that of one of its tokens under the aggregation.
    """
    mask = prepared.segment.loss_mask & taught[:, None]
    num_steps, num_sequences = distributed.sum_over_ranks(aggregate.counts(mask))
    shares = aggregate.weights(
        mask,
        prepared.objective.aggregation,
        num_steps=num_steps,
        num_sequences=num_sequences,
        max_length=mask.shape[1],
        dtype=torch.float64,
    )
    return shares.amax(1, keepdim=True)


class _Scorer:
    """Scores of a prepared segment's rows without gradients."""

    def __init__(self, parts: Parts, prepared: Prepared, planned: Planned) -> None:
        self._parts, self._prepared, self._planned = parts, prepared, planned

    def __call__(self, rows: Rows, step: slice, weights: str = "trained") -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if weights == "reference":
                stack.enter_context(self._parts.policy.reference())
            else:
                stack.enter_context(self._parts.snapshots.use(weights))
            return evaluate(self._parts, self._prepared, self._planned, rows, step)[0]


def evaluate(
    parts: Parts, prepared: Prepared, planned: Planned, rows: Rows, step: slice
) -> tuple[Tensor, Denoised | None]:
    """Scores [B] of some rows, and a denoiser's prediction behind them."""
    policy, segment = parts.policy, prepared.segment.rows(rows)
    if not isinstance(policy, DenoisingPolicy):
        log_probs = policy.log_prob(prepared.name, segment, step).log_probs
        return log_probs.masked_fill(~segment.loss_mask.to(log_probs.device), 0.0).sum(1), None
    prompts = prompts_of(prepared, rows)
    names = [prompt.seed if planned.method == "sft" else prompt.group_id for prompt in prompts]
    seen = policy.predict(prepared.name, segment, step.start, noise_seeds(parts.recipe, planned, step.start, names))
    weight = prepared.objective.error_weight or "uniform"
    return denoising_score(seen.output, seen.target, seen.level, weight), seen


def scored_loss(policy: Policy, window: Window[ScoredTarget], metrics: StepMetrics, *, first_update: bool) -> Tensor:
    """The window's share of the loss, [] with gradients."""
    target = window.target
    ref = None
    if target.kl_coef > 0:
        with torch.no_grad(), policy.reference():
            _, ref = evaluate(target.parts, target.prepared, target.planned, window.rows, window.steps)
    scores, seen = evaluate(target.parts, target.prepared, target.planned, window.rows, window.steps)
    slopes = target.slopes[window.rows, target.columns.index(column_of(window.steps))].to(scores)
    taught = target.prepared.valid[window.rows].to(scores.device)
    num_rows = float(taught.sum())
    metrics.num_steps += num_rows
    metrics.add("score", scores, taught)
    for name, value in target.total.metrics.items():
        metrics.sums[name] += value * num_rows
    loss = (slopes * scores).sum()
    if not target.total.loss.isnan():
        # The same gradient, and in the metrics the loss itself.
        share = float(target.total.loss.detach()) * target.planned.coef / target.num_windows
        loss = loss - loss.detach() + share
    if ref is not None and seen is not None:
        distance = squared_error(seen.output, ref.output)
        loss = loss + target.kl_coef * (target.kl_weights[window.rows].to(distance) * distance).sum()
        metrics.add("kl", distance, taught)
    metrics.loss += float(loss.detach())
    return loss

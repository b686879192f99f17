"""Objectives over the samples of a group together: preferences (DPO) and group preferences (DGPO).

They need nothing of a sample but its score, the log-prob of a text or minus half the denoising error of a picture
(`forward_process.denoising_score`). A loss of all scores has one derivative a score; the trainer takes it once, over
all processes, and each window then backpropagates its own scores with it. The gradient is that of the whole loss,
however pairs and groups are spread over windows and processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTerms:
    """The scores of all samples of an update, over all processes; float64."""

    scores: Tensor
    """[N, K] of the trained policy: K = 1 for a text, one column a noise level for a denoiser."""
    ref_scores: Tensor
    """[N, K] of the reference."""
    old_scores: Tensor
    """[N, K] of the weights that `objective.old_weights` names, as constants."""
    advantages: Tensor
    """[N]; 0 where the reward excludes the sample."""
    group_ids: Tensor
    """[N]."""
    weights: Tensor
    """[N, K] share of each score under `objective.aggregation`; 0 for samples that are left out."""
    lengths: Tensor
    """[N] tokens of a text; 1 for a picture."""
    pair_coef: float
    pair_form: str
    clip_low: float
    clip_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLoss:
    """A loss over all samples of an update."""

    loss: Tensor
    """[]."""
    metrics: dict[str, float]
    """What it saw, for metrics.jsonl."""


ScoreFunction = Callable[[ScoreTerms], ScoreLoss]


def imitation_loss(terms: ScoreTerms) -> ScoreLoss:
    """-advantage * score: supervised fine-tuning, on the best, or weighted by rewards, as the advantage says."""
    return ScoreLoss(loss=-(terms.weights * terms.advantages[:, None] * terms.scores).sum(), metrics={})


def pair_losses(margins: Tensor, coef: float, form: str) -> Tensor:
    """The loss of preference margins, of any shape.

    A margin is how much more the policy's log-prob has risen over the reference's for the chosen sample than for the
    rejected one. sigmoid: -log sigmoid(coef * margin), DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) and
    Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14). ipo: (margin - 1 / (2 coef))^2 (Azar et al. 2023,
    arXiv 2310.12036, eq. 17). hinge: max(0, 1 - coef * margin) (SLiC, Zhao et al. 2023, arXiv 2305.10425).

    Raises:
        ValueError: for an unknown form.
    """
    if form == "sigmoid":
        return -logsigmoid(coef * margins)
    if form == "ipo":
        return (margins - 1.0 / (2.0 * coef)).square()
    if form == "hinge":
        return (1.0 - coef * margins).clamp(min=0.0)
    raise ValueError(f"pair_form {form!r}; known: sigmoid, ipo, hinge")


def dpo_loss(terms: ScoreTerms) -> ScoreLoss:
    """Mean over pairs of `pair_losses`: chosen is the sample of a group with a positive advantage, rejected the one
    with a negative one; groups without such a pair teach nothing. The margin of ipo is per token, as its authors meant
    it and TRL does."""
    chosen, rejected = _pairs(terms.advantages, terms.group_ids)
    gain = terms.scores - terms.ref_scores
    if terms.pair_form == "ipo":
        gain = gain / terms.lengths[:, None]
    margins = gain[chosen] - gain[rejected]
    losses = pair_losses(margins, terms.pair_coef, terms.pair_form)
    if not len(chosen):
        return ScoreLoss(loss=(terms.scores * 0.0).sum(), metrics={"pair/margin": 0.0, "pair/accuracy": 0.0})
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    metrics = {"pair/margin": float(margins.detach().mean()), "pair/accuracy": float(wins.mean())}
    return ScoreLoss(loss=losses.mean(), metrics=metrics)


def _pairs(advantages: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the chosen and of the rejected samples, group by group."""
    chosen, rejected = [], []
    for group in group_ids.unique():
        better = ((group_ids == group) & (advantages > 0)).nonzero().flatten()
        worse = ((group_ids == group) & (advantages < 0)).nonzero().flatten()
        if len(better) and len(worse):
            chosen.append(better[0])
            rejected.append(worse[0])
    empty = torch.zeros(0, dtype=torch.int64)
    return torch.stack(chosen) if chosen else empty, torch.stack(rejected) if rejected else empty


def dgpo_loss(terms: ScoreTerms) -> ScoreLoss:
    """Direct group preference optimisation: mean of w_group * A * error, with the error a sample's mean squared one.

    w_group = sigmoid(pair_coef * mean over the group of A * (error - reference's error)) is a constant: it is near 1
    while the preferred samples are predicted worse than by the reference. A sample is left out once
    exp(old error - error) has left [1 - clip_low, 1 + clip_high] in the direction of its advantage. Luo et al. 2025,
    arXiv 2510.08425, eq. 14, as its authors' code computes it.
    """
    error, ref_error, old_error = -2.0 * terms.scores, -2.0 * terms.ref_scores, -2.0 * terms.old_scores
    advantages = terms.advantages[:, None]
    _, group = terms.group_ids.unique(return_inverse=True)
    sums = torch.zeros(int(group.max()) + 1, error.shape[1], dtype=error.dtype)
    drift = terms.pair_coef * advantages * (error - ref_error).detach()
    sizes = group.bincount()[:, None]
    weights = (sums.index_add(0, group, drift) / sizes).sigmoid()[group]
    ratio = (old_error - error).detach().exp()
    left = ((advantages > 0) & (ratio > 1.0 + terms.clip_high)) | ((advantages < 0) & (ratio < 1.0 - terms.clip_low))
    per_sample = weights * advantages * error * (~left)
    share = float(left.double().mean())
    return ScoreLoss(
        loss=(terms.weights * per_sample).sum(),
        metrics={"group_weight/mean": float(weights.mean()), "clip_fraction/high": share},
    )


SCORE_LOSSES: dict[str, ScoreFunction] = {"sft": imitation_loss, "dpo": dpo_loss, "dgpo": dgpo_loss}
"""By the name that `objective.method` has for them; another of this kind is one function and one line."""

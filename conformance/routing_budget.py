"""The derived error budget of routing: how far float32 scores, ranks and weights may be from the float64 reference.

First order, in quadrature, as in `budget.py`; logits and biases are exact. Everything here is
a sigma: the caller multiplies with lambda from `calibration.json`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.routing import RENORMALIZE_GUARD
from .numerics import FLOAT32

# An approximate exp2 of a rounded product: GPUs' own is good to 2 ulp (CUDA C++ Programming Guide, "Intrinsic
# Functions"); the product adds 2 roundoffs of the exponent's magnitude.
EXP_ROUNDOFFS = 4.0
# Division, reciprocal, square root: 2 ulp at most in the fast forms (same table).
DIVISION_ROUNDOFFS = 2.0
# log1p to 4 ulp, in whichever way; log(1 + x) as it stands is no log1p, it loses x.
LOG1P_ROUNDOFFS = 4.0
# Approximate exp flushes results under the smallest normal float32 to zero.
SMALLEST_NORMAL = FLOAT32.smallest_normal


def _exp_error(exponent: Tensor) -> Tensor:
    """Squared relative error of exp(exponent), in unit roundoffs."""
    finite = torch.where(exponent.isinf(), 0.0, exponent)
    return (2 * finite) ** 2 + EXP_ROUNDOFFS**2


def score_error(logits: Tensor, scores: Tensor, scoring_func: str) -> Tensor:
    """Of float32 scores, `[M, E]`; logits and scores as in the reference, float64."""
    u = FLOAT32.unit_roundoff
    if scoring_func == "softmax":
        # exp(l - m) over a sum of E terms, whose errors average over random signs: E/3 roundoffs, squared.
        top = logits.amax(dim=-1, keepdim=True)
        distance = torch.where(logits == top, 0.0, (logits - top).abs())
        each = _exp_error(distance)
        common = (scores**2 * each).sum(dim=-1, keepdim=True) + logits.shape[-1] / 3 + DIVISION_ROUNDOFFS**2
        return u * (each + common).sqrt() * scores + SMALLEST_NORMAL
    if scoring_func == "sigmoid":
        # 1 / (1 + t), t = exp(-l): ds = s (1 - s) dt/t, then the rounding of the sum and of the quotient.
        slope = scores * torch.sigmoid(-logits)
        own = scores**2 * (1 + DIVISION_ROUNDOFFS**2)
        return u * (slope**2 * _exp_error(logits) + own).sqrt() + SMALLEST_NORMAL
    # sqrt(p), p = max(l, 0) + log1p(t), t = exp(-|l|): dp of the exp, of the log1p and of the sum, then dp / 2s.
    t = torch.exp(-logits.abs())
    logarithm = torch.log1p(t)
    dp = u * ((t / (1 + t)) ** 2 * _exp_error(logits) + (LOG1P_ROUNDOFFS * logarithm) ** 2 + scores**4).sqrt()
    through_root = torch.where(scores > 0, dp / (2 * scores), 0.0)
    # What float32 flushes to zero under the root is far larger above it.
    flushed = torch.where(scores > 0, SMALLEST_NORMAL / (2 * scores), 0.0).clamp(max=SMALLEST_NORMAL**0.5)
    return (through_root**2 + (u * DIVISION_ROUNDOFFS * scores) ** 2).sqrt() + flushed + SMALLEST_NORMAL


def rank_error(ranking: Tensor, of_scores: Tensor, *, has_bias: bool) -> Tensor:
    """Of what experts are compared by, `[M, E]`: the score's, and the rounding of its sum with a bias; 0 at -inf."""
    known = ranking.isfinite()
    own = FLOAT32.unit_roundoff * torch.where(known, ranking, 0.0) if has_bias else torch.zeros_like(ranking)
    return torch.where(known, (of_scores**2 + own**2).sqrt(), 0.0)


def group_error(values: Tensor, of_ranks: Tensor, group_ranking: str) -> Tensor:
    """Of what groups are compared by, `[M, groups]`: a maximum is off by no more than a term of it is."""
    worst = of_ranks.unflatten(-1, (values.shape[-1], -1)).amax(dim=-1)
    if group_ranking == "max":
        return worst
    own = FLOAT32.unit_roundoff * torch.where(values.isfinite(), values, 0.0)
    return (2 * worst**2 + own**2).sqrt()


def weight_error(scores: Tensor, of_scores: Tensor, *, renormalize: bool, routed_scaling_factor: float) -> Tensor:
    """Of the routing weights, `[M, top_k]`, from scores and their errors at the chosen ids, `[M, top_k]` each."""
    u = FLOAT32.unit_roundoff
    error = of_scores**2
    weights = scores
    if renormalize:
        total = scores.sum(dim=-1, keepdim=True) + RENORMALIZE_GUARD
        weights = scores / total
        division = (u * weights) ** 2 * (scores.shape[-1] / 3 + DIVISION_ROUNDOFFS**2)
        error = error / total**2 + (weights / total) ** 2 * error.sum(dim=-1, keepdim=True) + division
    scaling = (u * weights) ** 2
    return routed_scaling_factor * (error + scaling).sqrt() + SMALLEST_NORMAL


def sum_error(of_weights: Tensor, *, routed_scaling_factor: float) -> Tensor:
    """Of the sum of renormalised weights, `[M]`: their own errors, and that of the sum which divides them all alike."""
    common = routed_scaling_factor * FLOAT32.unit_roundoff * (of_weights.shape[-1] / 3) ** 0.5
    return (of_weights.pow(2).sum(dim=-1) + common**2).sqrt()

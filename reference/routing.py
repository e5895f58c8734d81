"""Routing: which experts a token goes to, and with what weight. Float64, pure torch.

Source: Shazeer et al. 2017 (arXiv 1701.06538, sparse gating); Fedus et al. 2021 (arXiv 2101.03961); the
renormalised form is Mixtral's (arXiv 2401.04088, softmax over the chosen logits).
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores_of(router_logits: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits as routing ranks them, `[M, E]`: a NaN counts as -inf, so that it is chosen last."""
    logits = router_logits.to(dtype)
    return logits.masked_fill(logits.isnan(), -torch.inf)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis as the limit of finite logits, `[M, E]`.

    Infinite logits share the whole weight evenly; a row without any information (all -inf) is uniform.
    """
    top = scores.amax(dim=-1, keepdim=True)
    at_top = (scores == top).to(scores.dtype)
    limit = at_top / at_top.sum(dim=-1, keepdim=True)
    return torch.where(top.isinf(), limit, torch.softmax(scores, dim=-1))


def softmax_topk(
    router_logits: Tensor, top_k: int, *, renormalize: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Softmax top-k routing.

    w = softmax(logits); the top_k largest logits are chosen, in descending order, and among equal logits the lower
    expert id wins; `renormalize` divides the chosen weights by their sum.

    Args:
        router_logits: `[M, E]`.
        top_k: experts chosen for each token, at most E.
        renormalize: whether the chosen weights sum to 1.
        dtype: of the computation.

    Returns:
        `topk_weights [M, top_k]` in `dtype` and `topk_ids [M, top_k]` int32.
    """
    scores = scores_of(router_logits, dtype)
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = softmax(scores).gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.to(torch.int32)

"""Routing: which experts a token goes to, and with what weight. Float64, pure torch.

A score s(l) of each expert, a choice of the top_k that rank highest, and a weight of each chosen one:

    softmax        s = exp(l_e) / sum exp(l)      Shazeer et al. 2017 (arXiv 1701.06538), Mixtral (arXiv 2401.04088)
    sigmoid        s = 1 / (1 + exp(-l_e))        DeepSeek-V3 (arXiv 2412.19437, eq. 15)
    sqrtsoftplus   s = sqrt(log(1 + exp(l_e)))    DeepSeek-V4 (`scoring_func` of its model card's configuration)

    choice    the top_k largest of s + b, b the correction bias (arXiv 2412.19437, eq. 16); with groups, of the experts
              in the topk_group best groups, a group being worth its best expert (DeepSeek-V2, arXiv 2405.04434, 2.2.2)
              or the sum of its best two (DeepSeek-V3, arXiv 2412.19437, 2.1.2)
    weight    s, never s + b; divided by the chosen ones' sum where renormalised; times routed_scaling_factor, once

Equal experts rank the lower id first, equal groups the lower group. The rules for what the papers leave open:

    NaN logit     counts as -inf
    -inf logit    s is 0, and the expert ranks below every finite one, whatever its bias; in a group's sum it is -inf
    +inf logit    the limit: all of a softmax, shared evenly; 1; float32's largest number stands for it in sqrtsoftplus
    sum of 0      weights are divided by their sum + 1e-20, as DeepSeek-V3's model code does, and so are 0
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RENORMALIZE_GUARD = 1e-20
_LARGEST_LOGIT = torch.finfo(torch.float32).max


def logits_of(router_logits: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits as routing reads them, `[M, E]`: a NaN counts as -inf."""
    logits = router_logits.to(dtype)
    return logits.masked_fill(logits.isnan(), -torch.inf)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis as the limit of finite logits, `[M, E]`.

    Infinite logits share the whole weight evenly; a row without any information (all -inf) is uniform.
    """
    top = logits.amax(dim=-1, keepdim=True)
    at_top = (logits == top).to(logits.dtype)
    limit = at_top / at_top.sum(dim=-1, keepdim=True)
    return torch.where(top.isinf(), limit, torch.softmax(logits, dim=-1))


def scores_of(logits: Tensor, scoring_func: str) -> Tensor:
    """The experts' scores, `[M, E]`, finite and not negative, from logits as `logits_of` gives them.

    Raises:
        ValueError: an unknown scoring function.
    """
    if scoring_func == "softmax":
        return softmax(logits)
    if scoring_func == "sigmoid":
        return torch.sigmoid(logits)
    if scoring_func == "sqrtsoftplus":
        return torch.logaddexp(logits.clamp(max=_LARGEST_LOGIT), torch.zeros_like(logits)).sqrt()
    raise ValueError(f"scoring_func: expected 'softmax', 'sigmoid' or 'sqrtsoftplus', got {scoring_func!r}")


def ranking_of(logits: Tensor, scores: Tensor, correction_bias: Tensor | None) -> Tensor:
    """What experts are compared by, `[M, E]`: score plus bias, or -inf where the logit is."""
    ranking = scores if correction_bias is None else scores + correction_bias.to(scores.dtype)
    return ranking.masked_fill(logits == -torch.inf, -torch.inf)


def group_values(ranking: Tensor, num_expert_group: int, group_ranking: str) -> Tensor:
    """What groups are compared by, `[M, num_expert_group]`: consecutive experts' best, or the sum of their best two.

    Raises:
        ValueError: an unknown ranking.
    """
    groups = ranking.unflatten(-1, (num_expert_group, ranking.shape[-1] // num_expert_group))
    if group_ranking == "max":
        return groups.amax(dim=-1)
    if group_ranking == "top2_sum":
        return groups.sort(dim=-1, descending=True).values[..., :2].sum(dim=-1)
    raise ValueError(f"group_ranking: expected 'max' or 'top2_sum', got {group_ranking!r}")


def best(values: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest of each row, in descending order, the lower of equal ones first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def weights_at(scores: Tensor, ids: Tensor, *, renormalize: bool, routed_scaling_factor: float = 1.0) -> Tensor:
    """Routing weights of chosen experts, `[M, top_k]`, from scores `[M, E]` and ids `[M, top_k]`."""
    weights = scores.gather(-1, ids.long())
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + RENORMALIZE_GUARD)
    return weights * routed_scaling_factor


def route(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = True,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_ranking: str = "max",
    e_score_correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    num_tokens_non_padded: Tensor | None = None,
    custom_routing_function: Callable[[Tensor, int, bool], tuple[Tensor, Tensor]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The experts of each token, best first, and their weights.

    Args:
        router_logits: `[M, E]`.
        top_k: experts chosen for each token, at most topk_group * E / num_expert_group.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus".
        renormalize: whether the chosen weights sum to routed_scaling_factor.
        num_expert_group: groups of consecutive experts; it divides E.
        topk_group: groups whose experts may be chosen.
        group_ranking: "max" or "top2_sum".
        e_score_correction_bias: `[E]`; it ranks, and never weighs.
        routed_scaling_factor: multiplies the weights.
        num_tokens_non_padded: `[1]` int32; tokens from there on are padding, with ids of -1 and weights of 0.
        custom_routing_function: decides instead: (logits, top_k, renormalize) to weights and ids.
        dtype: of the computation.

    Returns:
        `topk_weights [M, top_k]` in `dtype` and `topk_ids [M, top_k]` int32.
    """
    logits = logits_of(router_logits, dtype)
    if custom_routing_function is not None:
        weights, ids = custom_routing_function(router_logits, top_k, renormalize)
        weights = weights.to(dtype) * routed_scaling_factor
    else:
        scores = scores_of(logits, scoring_func)
        ranking = ranking_of(logits, scores, e_score_correction_bias)
        # A score grows with its logit and may saturate: where nothing is added, the logits themselves say who is first.
        values = logits if e_score_correction_bias is None else ranking
        if topk_group < num_expert_group:
            compared = values if group_ranking == "max" else ranking
            kept = best(group_values(compared, num_expert_group, group_ranking), topk_group)
            of_expert = torch.arange(logits.shape[-1], device=logits.device) // (logits.shape[-1] // num_expert_group)
            eligible = (of_expert[None, :, None] == kept[:, None, :]).any(dim=-1)
            # Of -inf there may be eligible ones, so the others go by their place in the order and not by a value.
            order = best(values, logits.shape[-1])
            ids = order.gather(-1, best(eligible.gather(-1, order).to(torch.int8), top_k))
        else:
            ids = best(values, top_k)
        weights = weights_at(scores, ids, renormalize=renormalize, routed_scaling_factor=routed_scaling_factor)
    if num_tokens_non_padded is not None:
        padding = torch.arange(logits.shape[0], device=logits.device)[:, None] >= num_tokens_non_padded
        weights, ids = weights.masked_fill(padding, 0.0), ids.masked_fill(padding, -1)
    return weights, ids.to(torch.int32)

"""ROUTE: what routing must say. Ids are judged as a legal answer, never compared with another's ids.

Softmax alone ranks by its logits, which are exact. Whatever else experts are compared by is a float32 number with an
error: an answer is legal if some honest errors, each within its budget, make it the right one. What is bit-equal in
logit and bias is computed alike by everybody, and obeys the tie rule exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...reference.routing import group_values, logits_of, ranking_of, scores_of, weights_at
from ..calibration import limits
from ..cases import RoutingCase
from ..judge import Verdict, declare
from ..routing_budget import group_error, rank_error, score_error, sum_error, weight_error

SHAPE = declare(
    "ROUTE-01", "topk_weights is [M, top_k] float32 and topk_ids [M, top_k] int32, on the logits' device", "route"
)
RANGE = declare("ROUTE-02", "every id that a token chooses is in [0, E), whatever the logits", "route")
DISTINCT = declare("ROUTE-03", "no token chooses an expert twice, whatever the logits", "route")
TOP = declare(
    "ROUTE-04",
    "every chosen expert ranks at least as high as every other one that the kept groups offer: by its logit where "
    "softmax is all, else by score plus bias within budget",
    "route",
)
TIES = declare(
    "ROUTE-05",
    "experts come in descending order of rank; of those with bit-equal logits and biases the lower id wins, and of "
    "groups of such the lower group",
    "route",
)
WEIGHTS = declare(
    "ROUTE-06",
    "weights are the scores at the chosen ids, without the bias, renormalised where asked, times the scaling factor, "
    "within budget",
    "route",
    is_value=True,
)
FINITE = declare("ROUTE-07", "weights are finite and not negative, whatever the logits", "route")
SUM = declare(
    "ROUTE-08",
    "renormalised weights sum to the scaling factor within budget: no scaling twice, none lost",
    "route",
    is_value=True,
)
PADDING = declare(
    "ROUTE-09",
    "tokens behind the number of real ones have ids of -1 and weights of 0, and no others do",
    "route",
    needs=lambda can: set(can.paddings) != {"none"},
)
KEPT = declare(
    "ROUTE-10",
    "the chosen experts lie in the topk_group groups that rank highest, within budget",
    "route",
    needs=lambda can: set(can.groups) != {"none"},
)
CUSTOM = declare(
    "ROUTE-11",
    "what a custom routing function answers is the answer, its weights times the scaling factor",
    "route",
    is_value=True,
    needs=lambda can: "custom" in can.scorings,
)


@dataclass(frozen=True)
class Truth:
    """What the reference says of the real tokens, and how far honest numbers may be from it.

    Attributes:
        logits: `[M, E]`, a NaN as -inf.
        bias: `[E]`, 0 without one.
        scores: `[M, E]`.
        score_error: `[M, E]`, sigma.
        ranking: `[M, E]`, what experts are compared by.
        rank_error: `[M, E]`, the largest allowed; 0 where softmax is all.
        groups: `[M, groups]`, what groups are compared by; one group without them.
        group_error: `[M, groups]`, the largest allowed.
        topk_group: groups kept.
    """

    logits: Tensor
    bias: Tensor
    scores: Tensor
    score_error: Tensor
    ranking: Tensor
    rank_error: Tensor
    groups: Tensor
    group_error: Tensor
    topk_group: int

    def widened(self, other: Truth) -> Truth:
        """The same, for numbers that have another case's errors too."""
        return replace(
            self, rank_error=self.rank_error + other.rank_error, group_error=self.group_error + other.group_error
        )


def truth_of(case: RoutingCase, *, by_scores: bool = False) -> Truth:
    """The truth of a case's real tokens; not of a custom routing function, which makes its own.

    Args:
        case: the operands.
        by_scores: whether softmax alone too ranks by its scores, within their budget, and not by its logits.
    """
    logits = logits_of(case.router_logits[: case.num_real_tokens])
    scores = scores_of(logits, case.scoring_func)
    of_scores = score_error(logits, scores, case.scoring_func)
    bias = case.e_score_correction_bias
    num_groups, kept = case.num_expert_group or 1, case.topk_group or 1
    if num_groups == kept:
        num_groups = kept = 1  # no restriction
    if case.scoring_func == "softmax" and bias is None and case.num_expert_group is None and not by_scores:
        ranking, of_ranks = logits, torch.zeros_like(logits)
    else:
        ranking = ranking_of(logits, scores, bias)
        of_ranks = rank_error(ranking, of_scores, has_bias=bias is not None)
    values = group_values(ranking, num_groups, case.group_ranking or "max")
    return Truth(
        logits=logits,
        bias=logits.new_zeros(logits.shape[1]) if bias is None else bias.double(),
        scores=scores,
        score_error=of_scores,
        ranking=ranking,
        rank_error=limits().elementwise * of_ranks,
        groups=values,
        group_error=limits().elementwise * group_error(values, of_ranks, case.group_ranking or "max"),
        topk_group=kept,
    )


def judge_routing(case: RoutingCase, topk_weights: Tensor, topk_ids: Tensor) -> list[Verdict]:
    """Every ROUTE verdict on one call."""
    device = case.router_logits.device
    shape = (case.router_logits.shape[0], case.top_k)
    shape_holds = (
        tuple(topk_weights.shape) == shape
        and tuple(topk_ids.shape) == shape
        and topk_weights.dtype == torch.float32
        and topk_ids.dtype == torch.int32
        and topk_weights.device == device == topk_ids.device
    )
    verdicts = [
        SHAPE.verdict(
            shape_holds,
            f"expected {list(shape)} float32 and int32 on {device}, got {list(topk_weights.shape)} "
            f"{topk_weights.dtype} on {topk_weights.device} and {list(topk_ids.shape)} {topk_ids.dtype}",
        )
    ]
    if not shape_holds:
        return verdicts
    real = case.num_real_tokens
    if case.num_tokens_non_padded is not None:
        behind = ((topk_ids != -1) | (topk_weights != 0)).any(dim=1)
        behind[:real] = (topk_ids[:real] == -1).any(dim=1)
        verdicts.append(PADDING.verdict(not behind.any(), f"{real} real tokens; {_row('ids', topk_ids, behind)}"))
        if behind.any():
            return verdicts
    if real == 0:
        return verdicts
    weights, ids = topk_weights[:real], topk_ids[:real].long()
    verdicts += _judge_form(case, weights, ids)
    if not all(verdict.holds for verdict in verdicts):
        return verdicts
    if case.custom_answer is not None:
        return [*verdicts, _judge_custom(case, weights, ids)]
    truth = truth_of(case)
    return [*verdicts, *judge_choice(truth, ids), *judge_weights(case, truth, weights, ids)]


def _judge_form(case: RoutingCase, weights: Tensor, ids: Tensor) -> list[Verdict]:
    """What holds whatever the method: ids in range and distinct, weights finite and not negative."""
    num_experts = case.router_logits.shape[1]
    in_range = (ids >= 0) & (ids < num_experts)
    finite = torch.isfinite(weights) & (weights >= 0)
    verdicts = [
        RANGE.verdict(in_range.all(), f"got {ids[~in_range][:4].tolist()}"),
        FINITE.verdict(finite.all(), f"got {weights[~finite][:4].tolist()}"),
    ]
    if in_range.all():
        distinct = _chosen(ids, num_experts).sum(dim=1) == case.top_k
        verdicts.append(DISTINCT.verdict(distinct.all(), _row("ids", ids, ~distinct)))
    return verdicts


def _judge_custom(case: RoutingCase, weights: Tensor, ids: Tensor) -> Verdict:
    answered = case.custom_answer or (weights, ids)
    expected, expected_ids = (tensor[: len(ids)] for tensor in answered)
    exact = expected.double() * case.routed_scaling_factor
    same = (ids == expected_ids) & ((weights.double() - exact).abs() <= torch.finfo(torch.float32).eps / 2 * exact)
    return CUSTOM.verdict(same.all(), f"expected {expected_ids.tolist()}; {_row('ids', ids, ~same.all(dim=1))}")


def _chosen(ids: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(ids), num_experts, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def judge_choice(truth: Truth, ids: Tensor) -> list[Verdict]:
    """ROUTE-04, 05 and 10: whether ids in range and distinct are a legal answer."""
    num_experts, num_groups = truth.logits.shape[1], truth.groups.shape[1]
    experts = torch.arange(num_experts, device=ids.device)
    chosen = _chosen(ids, num_experts)
    high, low = truth.ranking + truth.rank_error, truth.ranking - truth.rank_error
    # Of an expert that is not chosen: it ranks above a chosen one, or it equals one with a higher id.
    passed_over = ~chosen & (low > high.gather(1, ids).amin(dim=1, keepdim=True))
    alike = _alike(truth, ids)
    overtaken = ~chosen & (alike & (experts < ids[:, :, None])).any(dim=1)

    used = chosen.unflatten(1, (num_groups, -1)).any(dim=2)
    full = passed_over.unflatten(1, (num_groups, -1)).any(dim=2)
    tied = overtaken.unflatten(1, (num_groups, -1)).any(dim=2)
    anything = torch.ones_like(used)
    kept = _some_groups_may_be_kept(truth, used, anything)
    top = _some_groups_may_be_kept(truth, used, ~full)
    lower_first = _some_groups_may_be_kept(truth, used, ~full & ~tied, _equal_lower_groups(truth))

    falling = high.gather(1, ids)[:, :-1] >= low.gather(1, ids)[:, 1:]
    equal = alike.gather(2, ids[:, None, :].expand(-1, ids.shape[1], -1)).diagonal(offset=1, dim1=1, dim2=2)
    in_order = torch.where(equal, ids[:, :-1] < ids[:, 1:], falling).all(dim=1)
    verdicts = [
        TOP.verdict((top | ~kept).all(), _row("ids", ids, ~top & kept)),
        TIES.verdict((lower_first & in_order | ~top).all(), _row("ids", ids, ~(lower_first & in_order) & top)),
    ]
    if num_groups > 1:
        verdicts.append(KEPT.verdict(kept.all(), _row("ids", ids, ~kept)))
    return verdicts


def _alike(truth: Truth, ids: Tensor) -> Tensor:
    """`[M, top_k, E]`, whether an expert has the bits of a chosen one, so that everybody computes the same for both."""
    logits = truth.logits.gather(1, ids)[:, :, None]
    same_bias = truth.bias[ids][:, :, None] == truth.bias
    return (logits == truth.logits[:, None, :]) & (same_bias | (logits == -torch.inf))


def _some_groups_may_be_kept(truth: Truth, used: Tensor, allowed: Tensor, equal_lower: Tensor | None = None) -> Tensor:
    """`[M]`, whether topk_group groups may be the best within budget that include all `used` and only `allowed` ones.

    The kept groups may be the best if the lowest of them, as high as its error lets it be, is at least as high as every
    other at its lowest. So for each group as that lowest one: who ranks above it for certain is in, who ranks below it
    for certain is out, and between these the rest is filled up.

    Args:
        truth: of the case.
        used: `[M, groups]`.
        allowed: `[M, groups]`.
        equal_lower: `[M, groups, groups]`, whether the second one equals the first and is lower, where that counts.
    """
    high, low = truth.groups + truth.group_error, truth.groups - truth.group_error
    limit = high[:, :, None]
    inside = (low[:, None, :] > limit) | used[:, None, :]
    outside = (high[:, None, :] < limit) | ~allowed[:, None, :]
    if equal_lower is not None:
        equal = equal_lower.float()
        inside = inside | (inside.float() @ equal > 0)
        outside = outside | (outside.float() @ equal.transpose(1, 2) > 0)
    possible = ~(inside & outside).any(dim=2)
    count = truth.topk_group
    return (possible & (inside.sum(dim=2) <= count) & ((~outside).sum(dim=2) >= count)).any(dim=1)


def _equal_lower_groups(truth: Truth) -> Tensor:
    """`[M, groups, groups]`, whether the second group has the bits of the first, in any order, and a lower number."""
    num_groups = truth.groups.shape[1]
    bias = truth.bias.expand_as(truth.logits).masked_fill(truth.logits == -torch.inf, 0.0)
    bias, by_bias = bias.unflatten(1, (num_groups, -1)).sort(dim=2)
    logits = truth.logits.unflatten(1, (num_groups, -1)).gather(2, by_bias)
    logits, by_logit = logits.sort(dim=2, stable=True)
    bias = bias.gather(2, by_logit)
    equal = ((logits[:, :, None] == logits[:, None]) & (bias[:, :, None] == bias[:, None])).all(dim=3)
    return equal & torch.ones_like(equal[0]).tril(diagonal=-1)


def allowed_weight_error(case: RoutingCase, truth: Truth, ids: Tensor) -> Tensor:
    """`[M, top_k]`, how far the weights of chosen experts may be from the reference's."""
    return limits().elementwise * weight_error(
        truth.scores.gather(1, ids),
        truth.score_error.gather(1, ids),
        renormalize=case.renormalize,
        routed_scaling_factor=case.routed_scaling_factor,
    )


def judge_weights(case: RoutingCase, truth: Truth, weights: Tensor, ids: Tensor) -> list[Verdict]:
    """ROUTE-06 and 08 at whatever ids were chosen."""
    factor = case.routed_scaling_factor
    expected = weights_at(truth.scores, ids, renormalize=case.renormalize, routed_scaling_factor=factor)
    allowed = allowed_weight_error(case, truth, ids)
    error = (weights.double() - expected).abs().nan_to_num(torch.inf)
    used = error / allowed
    token, slot = divmod(int(used.argmax()), case.top_k)
    verdicts = [
        WEIGHTS.verdict(
            (used <= 1).all(),
            f"token {token}, slot {slot}, expert {int(ids[token, slot])}: expected {float(expected[token, slot]):.9g}, "
            f"got {float(weights[token, slot]):.9g}, error over budget {float(used.max()):.3g}",
            budget_used=float(used.max()),
        )
    ]
    if case.renormalize:
        off = (weights.double().sum(dim=1) - expected.sum(dim=1)).abs().nan_to_num(torch.inf)
        calibrated = limits().elementwise
        used = off / (calibrated * sum_error(allowed / calibrated, routed_scaling_factor=factor))
        token = int(used.argmax())
        verdicts.append(
            SUM.verdict(
                (used <= 1).all(),
                f"token {token}: expected {float(expected[token].sum()):.9g}, got {float(weights[token].sum()):.9g}, "
                f"error over budget {float(used.max()):.3g}",
                budget_used=float(used.max()),
            )
        )
    return verdicts


def _row(name: str, values: Tensor, bad: Tensor) -> str:
    if not bad.any():
        return ""
    token = int(bad.nonzero()[0])
    return f"token {token}: {name} {values[token].tolist()}"

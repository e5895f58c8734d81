"""ROUTE: what routing must say. Ids are judged as a legal answer, never compared with another's ids."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.routing import scores_of, softmax
from ..budget import routing_weight_error
from ..calibration import limits
from ..cases import RoutingCase
from ..judge import Verdict, declare

SHAPE = declare(
    "ROUTE-01", "topk_weights is [M, top_k] float32 and topk_ids [M, top_k] int32, on the logits' device", "route"
)
RANGE = declare("ROUTE-02", "every chosen id is in [0, E), whatever the logits", "route")
DISTINCT = declare("ROUTE-03", "no token chooses an expert twice, whatever the logits", "route")
TOP = declare("ROUTE-04", "every chosen expert's logit is at least every unchosen one's", "route")
TIES = declare(
    "ROUTE-05", "experts come in descending order of logit, and of bit-equal logits the lower id wins", "route"
)
WEIGHTS = declare(
    "ROUTE-06",
    "weights are the softmax at the chosen ids, renormalised where asked, within budget",
    "route",
    is_value=True,
)
FINITE = declare("ROUTE-07", "weights are finite and not negative, whatever the logits", "route")
SUM = declare(
    "ROUTE-08", "renormalised weights sum to 1 within budget: no scaling twice, none lost", "route", is_value=True
)


def judge_routing(case: RoutingCase, topk_weights: Tensor, topk_ids: Tensor) -> list[Verdict]:
    """Every ROUTE verdict on one call."""
    logits = case.router_logits
    num_tokens, num_experts = logits.shape
    shape = (num_tokens, case.top_k)
    shape_holds = (
        tuple(topk_weights.shape) == shape
        and tuple(topk_ids.shape) == shape
        and topk_weights.dtype == torch.float32
        and topk_ids.dtype == torch.int32
        and topk_weights.device == logits.device == topk_ids.device
    )
    verdicts = [
        SHAPE.verdict(
            shape_holds,
            f"expected {list(shape)} float32 and int32 on {logits.device}, got {list(topk_weights.shape)} "
            f"{topk_weights.dtype} on {topk_weights.device} and {list(topk_ids.shape)} {topk_ids.dtype}",
        )
    ]
    if not shape_holds or num_tokens == 0:
        return verdicts
    ids = topk_ids.long()
    in_range = (ids >= 0) & (ids < num_experts)
    verdicts.append(RANGE.verdict(in_range.all(), f"got {ids[~in_range][:4].tolist()}"))
    if not in_range.all():
        return verdicts
    chosen = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    distinct = chosen.sum(dim=1) == case.top_k
    verdicts.append(DISTINCT.verdict(distinct.all(), _row("ids", ids, ~distinct)))
    if not distinct.all():
        return verdicts

    scores = scores_of(logits)
    at_ids = scores.gather(1, ids)
    lowest_chosen = at_ids.amin(dim=1)
    highest_other = scores.masked_fill(chosen, -torch.inf).amax(dim=1)
    legal = lowest_chosen >= highest_other
    verdicts.append(TOP.verdict(legal.all(), _row("ids", ids, ~legal)))
    falling = at_ids[:, :-1] > at_ids[:, 1:]
    tie_in_order = (at_ids[:, :-1] == at_ids[:, 1:]) & (ids[:, :-1] < ids[:, 1:])
    ordered = (falling | tie_in_order).all(dim=1)
    # Of the experts that tie with the last chosen one, the chosen are the lowest ids.
    ties_with_last = (scores == lowest_chosen[:, None]) & ~chosen
    last_id = ids[:, -1:]
    overtaken = (ties_with_last & (torch.arange(num_experts, device=ids.device) < last_id)).any(dim=1)
    ruled = ordered & ~overtaken
    verdicts.append(TIES.verdict(ruled.all(), _row("ids", ids, ~ruled)))

    finite = torch.isfinite(topk_weights) & (topk_weights >= 0)
    verdicts.append(FINITE.verdict(finite.all(), f"got {topk_weights[~finite][:4].tolist()}"))
    expected = softmax(scores).gather(1, ids)
    if case.renormalize:
        expected = expected / expected.sum(dim=1, keepdim=True)
    allowed = limits().elementwise * routing_weight_error(scores, ids, expected, renormalize=case.renormalize)
    error = (topk_weights.double() - expected).abs().nan_to_num(torch.inf)
    used = error / allowed
    worst = int(used.argmax())
    token, slot = divmod(worst, case.top_k)
    verdicts.append(
        WEIGHTS.verdict(
            (used <= 1).all(),
            f"token {token}, slot {slot}, expert {int(ids[token, slot])}: expected {float(expected[token, slot]):.9g}, "
            f"got {float(topk_weights[token, slot]):.9g}, error over budget {float(used.max()):.3g}",
            budget_used=float(used.max()),
        )
    )
    if case.renormalize:
        off = (topk_weights.double().sum(dim=1) - 1).abs().nan_to_num(torch.inf) / allowed.pow(2).sum(dim=1).sqrt()
        verdicts.append(
            SUM.verdict((off <= 1).all(), f"error over budget {float(off.max()):.3g}", budget_used=float(off.max()))
        )
    return verdicts


def _row(name: str, values: Tensor, bad: Tensor) -> str:
    if not bad.any():
        return ""
    token = int(bad.nonzero()[0])
    return f"token {token}: {name} {values[token].tolist()}"

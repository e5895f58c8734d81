"""One verdict on one output: what benchmarks ask before they time anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arena import Arena
from .cases import ExpertsCase
from .judge import first_violated
from .numerics import Numerics
from .properties.num import budget_of, judge_values, reference_of

# Tokens judged at a time: the float64 reference holds its intermediates for each routed pair.
CHUNK = 512


@dataclass(frozen=True)
class ExpertsVerdict:
    """Whether an output is within budget of the reference.

    Attributes:
        holds: every NUM property holds.
        budget_used: the largest of their statistics over its limit; above 1 something is violated.
        detail: the first violated property with its worst element; empty where all hold.
    """

    holds: bool
    budget_used: float
    detail: str = ""


def verify_experts(
    output: Tensor,
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    numerics: Numerics | None = None,
    max_tokens: int | None = None,
) -> ExpertsVerdict:
    """Judge an output `[M, H]` of the routed experts; the other operands are those of the reference, on any device.

    Args:
        output: what the implementation returned.
        hidden_states: `[M, H]`.
        w13: `[E_local, 2I, H]`.
        w2: `[E_local, H, I]`.
        topk_weights: `[M, top_k]`.
        topk_ids: `[M, top_k]`.
        expert_map: `[E]` or None.
        apply_router_weight_on_input: the routing weight multiplies the experts' input.
        numerics: what it declares; the default declaration where None.
        max_tokens: judge this many tokens, spread evenly over the batch; None judges all.
    """
    num_tokens = hidden_states.shape[0]
    if output.shape != hidden_states.shape or output.dtype != hidden_states.dtype:
        expected = f"{list(hidden_states.shape)} {hidden_states.dtype}"
        return ExpertsVerdict(False, float("inf"), f"expected {expected}, got {list(output.shape)} {output.dtype}")
    rows = torch.arange(num_tokens, device=output.device)
    if max_tokens is not None and num_tokens > max_tokens:
        rows = torch.linspace(0, num_tokens - 1, max_tokens, device=output.device).round().long().unique()
    worst, detail = 0.0, ""
    for chunk in rows.split(CHUNK):
        case = ExpertsCase(
            hidden_states[chunk],
            w13,
            w2,
            topk_weights[chunk],
            topk_ids[chunk],
            num_experts=w13.shape[0] if expert_map is None else expert_map.numel(),
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            arena=Arena(),
        )
        trace = reference_of(case)
        budget = budget_of(case, trace, numerics or Numerics())
        verdicts = judge_values(case, output[chunk], trace, budget)
        worst = max([worst, *(v.budget_used for v in verdicts if v.budget_used is not None)])
        violated = first_violated(verdicts)
        if violated is not None and not detail:
            detail = f"{violated.property.id}: {violated.detail}"
    return ExpertsVerdict(not detail, worst, detail)

"""One verdict on one output: what benchmarks ask before they time anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.activations import SILU, Activation
from ..reference.lora import TokenAdapters
from ..reference.quantization import ActivationQuantization, QuantizedWeight
from .budget import experts_budget
from .judge import first_violated
from .numerics import Numerics
from .operands import ExpertsOperands
from .properties.num import judge_values
from .quantization_budget import is_shared_by_rows

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
    w13: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    activation: Activation = SILU,
    quantize_input: ActivationQuantization | None = None,
    quantize_hidden: ActivationQuantization | None = None,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    adapters: TokenAdapters | None = None,
    numerics: Numerics | None = None,
    max_tokens: int | None = None,
) -> ExpertsVerdict:
    """Judge an output `[M, H]` of the routed experts; the other operands are those of the reference, on any device.

    Args:
        output: what the implementation returned.
        hidden_states: `[M, H]`.
        w13: `[E_local, 2I, H]`, plain or quantised.
        w2: `[E_local, H, I]`, plain or quantised.
        topk_weights: `[M, top_k]`.
        topk_ids: `[M, top_k]`.
        w13_bias: `[E_local, 2I]` or None.
        w2_bias: `[E_local, H]` or None.
        activation: between the two GEMMs.
        quantize_input: how the first GEMM's input is quantised, or None.
        quantize_hidden: how the second GEMM's is, or None.
        expert_map: `[E]` or None.
        apply_router_weight_on_input: the routing weight multiplies the experts' input.
        adapters: of the tokens, or None.
        numerics: what it declares; the default declaration where None.
        max_tokens: judge this many tokens, spread evenly over the batch; None judges all. Where all tokens share one
            dynamic scale, all are judged, and at once.
    """
    call = ExpertsOperands(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        w13_bias,
        w2_bias,
        activation,
        expert_map,
        apply_router_weight_on_input,
        quantize_input,
        quantize_hidden,
        adapters,
    )
    num_tokens = hidden_states.shape[0]
    if output.shape != hidden_states.shape or output.dtype != hidden_states.dtype:
        expected = f"{list(hidden_states.shape)} {hidden_states.dtype}"
        return ExpertsVerdict(False, float("inf"), f"expected {expected}, got {list(output.shape)} {output.dtype}")
    rows = torch.arange(num_tokens, device=output.device)
    one_scale = is_shared_by_rows(quantize_input) or is_shared_by_rows(quantize_hidden)
    if max_tokens is not None and num_tokens > max_tokens and not one_scale:
        rows = torch.linspace(0, num_tokens - 1, max_tokens, device=output.device).round().long().unique()
    worst, detail = 0.0, ""
    for chunk in [rows] if one_scale else rows.split(CHUNK):
        part = call.of_tokens(chunk)
        trace = part.trace()
        verdicts = judge_values(part, output[chunk], trace, experts_budget(trace, part, numerics or Numerics()))
        worst = max([worst, *(v.budget_used for v in verdicts if v.budget_used is not None)])
        violated = first_violated(verdicts)
        if violated is not None and not detail:
            detail = f"{violated.property.id}: {violated.detail}"
    return ExpertsVerdict(not detail, worst, detail)

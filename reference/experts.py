"""The routed experts of one MoE layer: the executable specification. Float64, expert by expert, pure torch.

For token t with experts e_1 .. e_k and weights c_1 .. c_k:

    out[t] = sum_j c_j * W2[e_j] @ (silu(g) * u),   [g; u] = W13[e_j] @ x[t]

(Shazeer et al. 2017, arXiv 1701.06538, with SwiGLU experts as in Mixtral, arXiv 2401.04088). With the routing weight
on the input (Llama 4), [g; u] = W13[e_j] @ (c_j * x[t]) and c_j is not applied again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import gated_silu


@dataclass(frozen=True)
class Trace:
    """The intermediates of `experts`, by token and slot; the slots of absent experts are zero.

    Attributes:
        local_ids: `[M, top_k]`, index into the weights held here; -1 where the expert is absent.
        gate: `[M, top_k, I]`, W_gate x.
        up: `[M, top_k, I]`, W_up x.
        hidden: `[M, top_k, I]`, silu(gate) * up.
        expert_output: `[M, top_k, H]`, W2 hidden, before any routing weight.
        output_weights: `[M, top_k]`, what multiplies `expert_output`.
        output: `[M, H]`.
    """

    local_ids: Tensor
    gate: Tensor
    up: Tensor
    hidden: Tensor
    expert_output: Tensor
    output_weights: Tensor
    output: Tensor


def to_local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Global expert ids to the indices of the weights held here, `[M, top_k]` int64; -1 stays -1.

    Args:
        topk_ids: `[M, top_k]`, global ids; -1 means no expert.
        expert_map: `[E]`, global to local id, -1 = on another rank; None where all experts are here.
    """
    ids = topk_ids.long()
    if expert_map is None:
        return ids
    return torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])


def trace_experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Trace:
    """The experts' weighted sum with its intermediates; arguments as in `experts`."""
    num_tokens, top_k = topk_ids.shape
    num_local, two_i, hidden_size = w13.shape
    intermediate_size = two_i // 2
    local_ids = to_local_ids(topk_ids, expert_map)
    x = hidden_states.to(dtype)
    weights = topk_weights.to(dtype)
    gate = x.new_zeros(num_tokens, top_k, intermediate_size)
    up, hidden = torch.zeros_like(gate), torch.zeros_like(gate)
    expert_output = x.new_zeros(num_tokens, top_k, hidden_size)
    for expert in range(num_local):
        token, slot = (local_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        rows = x[token]
        if apply_router_weight_on_input:
            rows = rows * weights[token, slot, None]
        g, u = (rows @ w13[expert].to(dtype).T).split(intermediate_size, dim=-1)
        h = gated_silu(g, u)
        gate[token, slot], up[token, slot], hidden[token, slot] = g, u, h
        expert_output[token, slot] = h @ w2[expert].to(dtype).T
    output_weights = torch.ones_like(weights) if apply_router_weight_on_input else weights
    output_weights = output_weights.masked_fill(local_ids < 0, 0)
    output = (output_weights[..., None] * expert_output).sum(dim=1)
    return Trace(local_ids, gate, up, hidden, expert_output, output_weights, output)


def experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    dtype: torch.dtype = torch.float64,
    trace: bool = False,
) -> Tensor | tuple[Tensor, Trace]:
    """The routed experts' weighted sum.

    Args:
        hidden_states: `[M, H]`.
        w13: `[E_local, 2I, H]`, gate rows first, then up rows.
        w2: `[E_local, H, I]`.
        topk_weights: `[M, top_k]`.
        topk_ids: `[M, top_k]`, global expert ids; -1 means no expert, and contributes zero.
        expert_map: `[E]`, global to local id, -1 = on another rank, whose experts contribute zero here.
        apply_router_weight_on_input: the routing weight multiplies the expert's input instead of its output.
        dtype: of the computation.
        trace: whether to return the intermediates too.

    Returns:
        `[M, H]` in `dtype`, and the `Trace` where asked for.
    """
    traced = trace_experts(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        dtype=dtype,
    )
    return (traced.output, traced) if trace else traced.output

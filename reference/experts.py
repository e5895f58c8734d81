"""The routed experts of one MoE layer: the executable specification. Float64, expert by expert, pure torch.

For token t with experts e_1 .. e_k and weights c_1 .. c_k:

    out[t] = sum_j c_j * (W2[e_j] @ Q(act(g, u)) + b2[e_j]),   [g; u] = W13[e_j] @ Q(x[t]) + b13[e_j]

(Shazeer et al. 2017, arXiv 1701.06538, with SwiGLU experts as in Mixtral, arXiv 2401.04088, and biases as in gpt-oss,
arXiv 2508.10925). Q quantises activations, and is nothing where none is asked for. With the routing weight on the
input (Llama 4), [g; u] = c_j * (W13[e_j] @ Q(x[t])) + b13[e_j] and c_j is not applied again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import SILU, Activation
from .lora import TokenAdapters
from .quantization import ActivationQuantization, QuantizedWeight, expert_weight


@dataclass(frozen=True)
class Trace:
    """The intermediates of `experts`, by token and slot; the slots of absent experts are zero.

    Attributes:
        local_ids: `[M, top_k]`, index into the weights held here; -1 where the expert is absent.
        x: `[M, H]`, the hidden states as the first GEMM reads them, quantised and scaled back where asked for.
        gate: `[M, top_k, I]`, the gate rows of the first GEMM.
        up: `[M, top_k, I]`, its up rows; 0 for an activation that is not gated.
        activated: `[M, top_k, I]`, act(gate, up).
        hidden: `[M, top_k, I]`, the same as the second GEMM reads it, quantised and scaled back where asked for.
        expert_output: `[M, top_k, H]`, W2 hidden + b2, before any routing weight.
        output_weights: `[M, top_k]`, what multiplies `expert_output`.
        output: `[M, H]`.
    """

    local_ids: Tensor
    x: Tensor
    gate: Tensor
    up: Tensor
    activated: Tensor
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
    w13: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    activation: Activation = SILU,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    quantize_input: ActivationQuantization | None = None,
    quantize_hidden: ActivationQuantization | None = None,
    adapters: TokenAdapters | None = None,
    dtype: torch.dtype = torch.float64,
) -> Trace:
    """The experts' weighted sum with its intermediates; arguments as in `experts`."""
    num_tokens, top_k = topk_ids.shape
    num_local, hidden_size, intermediate_size = w2.shape
    local_ids = to_local_ids(topk_ids, expert_map)
    x = hidden_states.to(dtype)
    if quantize_input is not None:
        x = quantize_input.rounded(x)
    weights = topk_weights.to(dtype)
    gate = x.new_zeros(num_tokens, top_k, intermediate_size)
    up, activated, hidden = torch.zeros_like(gate), torch.zeros_like(gate), torch.zeros_like(gate)
    expert_output = x.new_zeros(num_tokens, top_k, hidden_size)
    pairs_of = [(local_ids == expert).nonzero(as_tuple=True) for expert in range(num_local)]
    for expert, (token, slot) in enumerate(pairs_of):
        if token.numel() == 0:
            continue
        rows = x[token] @ expert_weight(w13, expert, dtype).T
        if adapters is not None:
            seen = x if adapters.sees_quantized else hidden_states.to(dtype)
            rows = rows + adapters.added("gate_up", expert, token, seen[token])
        if apply_router_weight_on_input:
            rows = rows * weights[token, slot, None]
        if w13_bias is not None:
            rows = rows + w13_bias[expert].to(dtype)
        gate[token, slot], up[token, slot] = activation.split(rows)
        activated[token, slot] = activation(gate[token, slot], up[token, slot])
    here = local_ids >= 0
    hidden[here] = activated[here] if quantize_hidden is None else quantize_hidden.rounded(activated[here])
    for expert, (token, slot) in enumerate(pairs_of):
        if token.numel() == 0:
            continue
        y = hidden[token, slot] @ expert_weight(w2, expert, dtype).T
        if adapters is not None:
            y = y + adapters.added("down", expert, token, activated[token, slot])
        expert_output[token, slot] = y if w2_bias is None else y + w2_bias[expert].to(dtype)
    output_weights = torch.ones_like(weights) if apply_router_weight_on_input else weights
    output_weights = output_weights.masked_fill(local_ids < 0, 0)
    output = (output_weights[..., None] * expert_output).sum(dim=1)
    return Trace(local_ids, x, gate, up, activated, hidden, expert_output, output_weights, output)


def experts(
    hidden_states: Tensor,
    w13: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    activation: Activation = SILU,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    quantize_input: ActivationQuantization | None = None,
    quantize_hidden: ActivationQuantization | None = None,
    dtype: torch.dtype = torch.float64,
    trace: bool = False,
) -> Tensor | tuple[Tensor, Trace]:
    """The routed experts' weighted sum.

    Args:
        hidden_states: `[M, H]`.
        w13: `[E_local, 2I, H]`, gate rows first, then up rows, or as `activation` says; plain or quantised.
        w2: `[E_local, H, I]`, plain or quantised.
        topk_weights: `[M, top_k]`.
        topk_ids: `[M, top_k]`, global expert ids; -1 means no expert, and contributes zero.
        w13_bias: `[E_local, 2I]` or None, in the order of w13's rows; the routing weight does not multiply it.
        w2_bias: `[E_local, H]` or None; the routing weight multiplies it, unless that is on the input.
        activation: between the two GEMMs.
        expert_map: `[E]`, global to local id, -1 = on another rank, whose experts contribute zero here.
        apply_router_weight_on_input: the routing weight multiplies the expert's input instead of its output.
        quantize_input: how the first GEMM's input is quantised; None leaves it as it is.
        quantize_hidden: how the second GEMM's is; a scale of the whole tensor is that of the pairs held here.
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
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        activation=activation,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        quantize_input=quantize_input,
        quantize_hidden=quantize_hidden,
        dtype=dtype,
    )
    return (traced.output, traced) if trace else traced.output

"""The routed experts in the batched activation format: each expert's tokens in a slab of their own. Float64.

For expert e with n[e] tokens, the first rows of its slab:

    out[e, r] = W2[e] @ Q(act(g, u)) + b2[e],   [g; u] = W13[e] @ Q(x[e, r]) + b13[e],   r < n[e]

which is the routed layer (`experts.py`) for tokens that are dispatched already and combined elsewhere, where the
routing weights are applied (DeepSeek-V3, arXiv 2412.19437, section 3.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import SILU, Activation
from .quantization import ActivationQuantization, QuantizedWeight, expert_weight


def batched_experts(
    hidden_states: Tensor,
    w13: Tensor | QuantizedWeight,
    w2: Tensor | QuantizedWeight,
    expert_num_tokens: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    activation: Activation = SILU,
    quantize_input: ActivationQuantization | None = None,
    quantize_hidden: ActivationQuantization | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each token through its expert.

    Args:
        hidden_states: `[E_local, max_tokens, H]`; rows behind an expert's count are not looked at.
        w13: `[E_local, 2I, H]`, gate rows first, then up rows, or as `activation` says; plain or quantised.
        w2: `[E_local, H, I]`, plain or quantised.
        expert_num_tokens: `[E_local]`, in [0, max_tokens].
        w13_bias: `[E_local, 2I]` or None.
        w2_bias: `[E_local, H]` or None.
        activation: between the two GEMMs.
        quantize_input: how the first GEMM's input is quantised; a scale of the whole tensor is that of all tokens.
        quantize_hidden: how the second GEMM's is.
        dtype: of the computation.

    Returns:
        `[E_local, max_tokens, H]` in `dtype`, zero behind each expert's count.
    """
    out = torch.zeros(hidden_states.shape, dtype=dtype, device=hidden_states.device)
    counts = expert_num_tokens.tolist()
    x = torch.cat([slab[:count] for slab, count in zip(hidden_states, counts, strict=True)]).to(dtype)
    x = x if quantize_input is None else quantize_input.rounded(x)
    hidden = []
    for expert, rows in enumerate(x.split(counts)):
        rows = rows @ expert_weight(w13, expert, dtype).T
        hidden.append(activation(*activation.split(rows if w13_bias is None else rows + w13_bias[expert].to(dtype))))
    h = torch.cat(hidden)
    h = h if quantize_hidden is None else quantize_hidden.rounded(h)
    for expert, rows in enumerate(h.split(counts)):
        y = rows @ expert_weight(w2, expert, dtype).T
        out[expert, : counts[expert]] = y if w2_bias is None else y + w2_bias[expert].to(dtype)
    return out


def routed_call(
    hidden_states: Tensor, expert_num_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The routed call of one expert a token that says the same.

    Args:
        hidden_states: `[E_local, max_tokens, H]`.
        expert_num_tokens: `[E_local]`.

    Returns:
        For the M tokens in the order of the slabs: `hidden_states [M, H]`, `topk_weights [M, 1]` float32, all 1,
        `topk_ids [M, 1]` int32, and the slab and row of each, which index a `[E_local, max_tokens, …]` tensor.
    """
    rows = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    slab, row = (rows[None, :] < expert_num_tokens[:, None]).nonzero(as_tuple=True)
    ids = slab[:, None].to(torch.int32)
    return hidden_states[slab, row], torch.ones(ids.shape, device=ids.device), ids, (slab, row)

"""Shared experts: a dense gated MLP that every token passes, beside the routed ones. Float64, pure torch.

    out[t] = routed[t] + g[t] * (W2 @ act(g1, u1)),   [g1; u1] = W13 @ x[t],   g[t] = sigmoid(w_g . x[t]) or 1

DeepSeekMoE (arXiv 2401.06066, eq. 9; DeepSeek-V3, arXiv 2412.19437, eq. 12) without a gate of its own, Qwen2-MoE (arXiv
2407.10671, 2.2.2) with one. The routing weights and their scaling factor have no part in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import SILU, Activation


def shared_gate(hidden_states: Tensor, gate: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """What multiplies each token's shared output, `[M]`; `gate` is `[1, H]`, or None where nothing does."""
    if gate is None:
        return torch.ones(hidden_states.shape[0], dtype=dtype, device=hidden_states.device)
    return torch.sigmoid(hidden_states.to(dtype) @ gate[0].to(dtype))


def shared_experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    gate: Tensor | None = None,
    *,
    activation: Activation = SILU,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The shared output.

    Args:
        hidden_states: `[M, H]`.
        w13: `[2I, H]`, gate rows first, or as `activation` says.
        w2: `[H, I]`.
        gate: `[1, H]` or None.
        activation: between the two linear maps.
        dtype: of the computation.

    Returns:
        `[M, H]` in `dtype`.
    """
    rows = hidden_states.to(dtype) @ w13.to(dtype).T
    return shared_gate(hidden_states, gate, dtype)[:, None] * (activation(*activation.split(rows)) @ w2.to(dtype).T)

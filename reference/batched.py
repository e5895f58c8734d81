"""The routed experts in the batched activation format: each expert's tokens in a slab of their own. Float64.

For expert e with n[e] tokens, the first rows of its slab:

    out[e, r] = W2[e] @ (silu(g) * u),   [g; u] = W13[e] @ x[e, r],   r < n[e]

which is the routed layer (`experts.py`) for tokens that are dispatched already and combined elsewhere, where the
routing weights are applied (DeepSeek-V3, arXiv 2412.19437, section 3.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import gated_silu


def batched_experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    expert_num_tokens: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each token through its expert.

    Args:
        hidden_states: `[E_local, max_tokens, H]`; rows behind an expert's count are not looked at.
        w13: `[E_local, 2I, H]`, gate rows first, then up rows.
        w2: `[E_local, H, I]`.
        expert_num_tokens: `[E_local]`, in [0, max_tokens].
        dtype: of the computation.

    Returns:
        `[E_local, max_tokens, H]` in `dtype`, zero behind each expert's count.
    """
    out = torch.zeros(hidden_states.shape, dtype=dtype, device=hidden_states.device)
    for expert, count in enumerate(expert_num_tokens.tolist()):
        x = hidden_states[expert, :count].to(dtype)
        gate, up = (x @ w13[expert].to(dtype).T).chunk(2, dim=-1)
        out[expert, :count] = gated_silu(gate, up) @ w2[expert].to(dtype).T
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

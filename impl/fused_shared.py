"""Shared experts as routed experts that every token chooses, with the weight 1, where their shapes allow.

One launch then computes both. The routed choices stay as many as they were: a slot is added for each shared expert,
and none is taken (https://github.com/sgl-project/sglang/pull/36515). The weight is not scaled with the routed ones.
Only for a rank that holds every expert: on several ranks each would add the whole of it
(https://github.com/sgl-project/sglang/pull/26845).
"""

from __future__ import annotations

import torch

from .align import IDS
from .checks import MOST_LISTED, expect_int, expect_tensor


def can_fuse_shared_experts(
    w13: torch.Tensor, w2: torch.Tensor, shared_w13: torch.Tensor, shared_w2: torch.Tensor
) -> str | None:
    """Why shared experts cannot stand among the routed ones, in words for the user; None where they can.

    Args:
        w13: `[E, 2I, H]`, gate rows first, of an activation with a gate.
        w2: `[E, H, I]`.
        shared_w13: `[2 n I, H]`, gate rows first.
        shared_w2: `[H, n I]`.

    Raises:
        TypeError, ValueError: no tensors, or of another rank or layout, by name.
    """
    for name, tensor, dims in (
        ("w13", w13, 3),
        ("w2", w2, 3),
        ("shared_w13", shared_w13, 2),
        ("shared_w2", shared_w2, 2),
    ):
        expect_tensor(name, tensor, shape=("E", "rows", "columns")[-dims:])
    size, shared_size = w2.shape[2], shared_w2.shape[1]
    if shared_w2.shape[0] != w2.shape[1]:
        return f"their hidden size {shared_w2.shape[0]} is not the routed experts' {w2.shape[1]}"
    if not size or shared_size % size:
        return f"their intermediate size {shared_size} is no multiple of the routed experts' {size}"
    if shared_w13.dtype != w13.dtype or shared_w2.dtype != w2.dtype:
        return f"their dtypes {shared_w13.dtype} and {shared_w2.dtype} are not {w13.dtype} and {w2.dtype}"
    if not w13.dtype.is_floating_point or w13.dtype.itemsize == 1:
        return f"their scales would have to be joined too, and the weights are {w13.dtype}"
    return None


def fuse_shared_experts(
    w13: torch.Tensor, w2: torch.Tensor, shared_w13: torch.Tensor, shared_w2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routed weights with the shared ones behind them; arguments as `can_fuse_shared_experts`.

    A shared MLP of n times the width is n experts, whose outputs add up: its columns of I do not meet.

    Returns:
        `w13 [E + n, 2I, H]` and `w2 [E + n, H, I]`.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not allow it, with the reason.
    """
    reason = can_fuse_shared_experts(w13, w2, shared_w13, shared_w2)
    if reason is not None:
        raise ValueError(f"shared_experts: expected ones that can stand among the routed experts, got others: {reason}")
    hidden_size, size = w2.shape[1:]
    expect_tensor("shared_w13", shared_w13, shape=(2 * shared_w2.shape[1], hidden_size), dtypes=(w13.dtype,), like=w13)
    expect_tensor("w13", w13, shape=(w2.shape[0], 2 * size, hidden_size), dtypes=(w13.dtype,), like=w2)
    gate, up = shared_w13.chunk(2)
    rows = torch.cat([gate.unflatten(0, (-1, size)), up.unflatten(0, (-1, size))], dim=1)
    columns = shared_w2.unflatten(1, (-1, size)).transpose(0, 1)
    return torch.cat([w13, rows]), torch.cat([w2, columns])


def append_shared_experts(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, num_shared_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's routed choices, and behind them the ids E .. E + n - 1 with the weight 1.

    Args:
        topk_weights: `[M, top_k]` float32, scaled already.
        topk_ids: `[M, top_k]` int32 or int64; a token without any choice (padding) gets no shared expert either.
        num_experts: E, routed experts alone.
        num_shared_experts: n.

    Returns:
        `[M, top_k + n]` each.

    Raises:
        TypeError, ValueError: by name.
    """
    expect_int("num_experts", num_experts, low=1, high=MOST_LISTED)
    expect_int("num_shared_experts", num_shared_experts, low=1, high=MOST_LISTED)
    expect_tensor("topk_ids", topk_ids, shape=("M", "top_k"), dtypes=IDS)
    expect_tensor("topk_weights", topk_weights, shape=topk_ids.shape, dtypes=(torch.float32,), like=topk_ids)
    num_tokens = topk_ids.shape[0]
    ids = torch.arange(num_experts, num_experts + num_shared_experts, dtype=topk_ids.dtype, device=topk_ids.device)
    ids = ids.expand(num_tokens, num_shared_experts)
    ids = ids.masked_fill((topk_ids < 0).all(dim=1, keepdim=True), -1)
    ones = topk_weights.new_ones((num_tokens, num_shared_experts))
    return torch.cat([topk_weights, ones], dim=1), torch.cat([topk_ids, ids], dim=1)

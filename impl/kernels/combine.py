"""The weighted sum's last step: each token's rows added up in the order of its choices, in float32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..platform import Platform, Vendor
from .pairs import local_expert, map_arguments
from .sizes import cdiv


@triton.jit(
    do_not_specialize=[
        "has_expert_map",
        "num_tokens",
        "num_experts",
        "num_local_experts",
        "stride_topk_ids",
        "top_k",
    ]
)
def combine_kernel(
    y_ptr,
    out_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    num_tokens,
    hidden_size,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    stride_out,
    top_k,
    UNROLL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A pair without a local expert adds nothing, and its row, which nobody wrote, is not read."""
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    live = tokens < num_tokens
    inside = (columns < hidden_size)[None, :]
    rows = tokens.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_TOKENS, BLOCK_H), tl.float32)
    for first in range(0, top_k, UNROLL):
        for j in tl.static_range(UNROLL):  # pyright: ignore[reportGeneralTypeIssues]
            choice = first + j
            chosen = live & (choice < top_k)
            expert = local_expert(
                topk_ids_ptr,
                stride_topk_ids,
                tokens * top_k + choice,
                chosen,
                expert_map_ptr,
                num_experts,
                num_local_experts,
                top_k,
                has_expert_map,
            )
            mask = (expert >= 0)[:, None] & inside
            row = tl.load(y_ptr + (rows * top_k + choice) * hidden_size + columns[None, :], mask=mask, other=0.0)
            total += row.to(tl.float32)
    tl.store(
        out_ptr + rows * stride_out + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & inside,
    )


def combine(
    out: torch.Tensor,
    y: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    num_local_experts: int,
    platform: Platform,
) -> None:
    """Launch the kernel: `y [M * top_k, H]`, dense, to `out [M, H]`."""
    num_tokens, hidden_size = out.shape
    top_k = topk_ids.shape[1]
    if platform.vendor is Vendor.CPU:
        block_tokens, block_h, num_warps, unroll = 64, 128, 4, min(8, top_k)
    else:
        block_tokens, block_h, num_warps, unroll = 1, 512, 2, 8
    path.launch(
        combine_kernel,
        (cdiv(num_tokens, block_tokens), cdiv(hidden_size, block_h)),
        y,
        out,
        topk_ids,
        *map_arguments(topk_ids, expert_map),
        num_tokens,
        hidden_size,
        num_experts,
        num_local_experts,
        topk_ids.stride(0),
        out.stride(0),
        top_k,
        # The loads of one round are in flight together; masked ones cost less than another variant to compile.
        UNROLL=unroll,
        BLOCK_TOKENS=block_tokens,
        BLOCK_H=block_h,
        num_warps=num_warps,
    )

"""A layer of very few tokens as two matrix-vector kernels: nothing is sorted, padded or summed by a launch of its own.

With a row or two for each expert the time is that of reading the weights. So weights go from memory to registers,
16 bytes a thread and many at a time; the vector units have several times the arithmetic that it takes.

`gate_up_rows_kernel` gives the activation of each pair, `down_rows_kernel` a token's output: it reads all of the
token's experts side by side, and adds them up in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import path
from ..config import ActivationFunction
from .activation import activated
from .pairs import local_expert, map_arguments
from .sizes import cdiv, next_power_of_2


@triton.jit(
    do_not_specialize=[
        "num_experts",
        "num_local_experts",
        "stride_topk_ids",
        "stride_weights",
        "stride_bias",
        "top_k",
        "has_expert_map",
        "alpha",
        "limit",
        "bias_step",
        "up_bias",
    ]
)
def gate_up_rows_kernel(
    x_ptr,
    w_ptr,
    h_ptr,
    bias_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    num_experts,
    num_local_experts,
    size,
    K,
    stride_x,
    stride_e,
    stride_part,
    stride_row,
    stride_bias,
    stride_topk_ids,
    stride_weights,
    top_k,
    alpha,
    limit,
    bias_step,
    up_bias,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MUL_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_I columns of h of one pair; rows of pairs without a local expert are not written."""
    num_tiles = tl.cdiv(size, BLOCK_I)
    pair = tl.program_id(0) // num_tiles
    columns = tl.program_id(0) % num_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = local_expert(
        topk_ids_ptr,
        stride_topk_ids,
        pair,
        True,
        expert_map_ptr,
        num_experts,
        num_local_experts,
        top_k,
        has_expert_map,
    )
    if expert < 0:
        return
    inside = columns < size
    lane_k = tl.arange(0, BLOCK_K)
    token = pair // top_k
    x_ptrs = x_ptr + token.to(tl.int64) * stride_x + lane_k
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_e + columns.to(tl.int64)[:, None] * stride_row + lane_k[None, :]
    gate_acc = tl.zeros((BLOCK_I, BLOCK_K), tl.float32)
    up_acc = tl.zeros((BLOCK_I, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_I and EVEN_K:
            x = tl.load(x_ptrs + k).to(tl.float32)
            gate = tl.load(w_ptrs + k)
            if PARTS == 2:
                up = tl.load(w_ptrs + k + stride_part)
        else:
            mask = inside[:, None] & (lane_k < K - k)[None, :]
            x = tl.load(x_ptrs + k, mask=lane_k < K - k, other=0.0).to(tl.float32)
            gate = tl.load(w_ptrs + k, mask=mask, other=0.0)
            if PARTS == 2:
                up = tl.load(w_ptrs + k + stride_part, mask=mask, other=0.0)
        gate_acc += gate.to(tl.float32) * x[None, :]
        if PARTS == 2:
            up_acc += up.to(tl.float32) * x[None, :]
    gate = tl.sum(gate_acc, axis=1)
    up = tl.sum(up_acc, axis=1) if PARTS == 2 else gate
    # Constants: the branch that a run-time value would take costs two registers, to save which the compiler once moved
    # half of a step's loads behind the first products, and the kernel took 45 % more time.
    if MUL_WEIGHT:
        weight = tl.load(topk_weights_ptr + token.to(tl.int64) * stride_weights + pair % top_k)
        gate, up = gate * weight, up * weight
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * stride_bias + columns * bias_step
        gate += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)
        if PARTS == 2:
            up += tl.load(bias_ptrs + up_bias, mask=inside, other=0.0).to(tl.float32)
    STORAGE: tl.constexpr = h_ptr.dtype.element_ty
    h = activated(gate.to(STORAGE).to(tl.float32), up.to(STORAGE).to(tl.float32), alpha, limit, ACTIVATION)
    tl.store(h_ptr + pair.to(tl.int64) * size + columns, h.to(STORAGE), mask=inside)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_experts",
        "num_local_experts",
        "stride_topk_ids",
        "stride_weights",
        "stride_bias",
        "has_expert_map",
    ]
)
def down_rows_kernel(
    h_ptr,
    w_ptr,
    out_ptr,
    bias_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    num_tokens,
    num_experts,
    num_local_experts,
    N,
    K,
    stride_e,
    stride_row,
    stride_bias,
    stride_topk_ids,
    stride_weights,
    stride_out,
    TOP_K: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
    MUL_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N columns of one token's output. A choice without a local expert adds nothing, and its row is not read."""
    # Tokens that share an expert read the same rows soon after each other.
    token = tl.program_id(0) % num_tokens
    columns = tl.program_id(0) // num_tokens * BLOCK_N + tl.arange(0, BLOCK_N)
    choices = tl.arange(0, BLOCK_TOP_K)
    lane_k = tl.arange(0, BLOCK_K)
    # Which experts are chosen is known since before the kernel that gives h began.
    expert = local_expert(
        topk_ids_ptr,
        stride_topk_ids,
        token * TOP_K + choices,
        choices < TOP_K,
        expert_map_ptr,
        num_experts,
        num_local_experts,
        TOP_K,
        has_expert_map,
    )
    chosen = expert >= 0
    h_ptrs = h_ptr + (token.to(tl.int64) * TOP_K + choices)[:, None, None] * K + lane_k[None, None, :]
    w_rows = tl.where(chosen, expert, 0).to(tl.int64)[:, None] * stride_e + columns.to(tl.int64)[None, :] * stride_row
    w_ptrs = w_ptr + w_rows[:, :, None] + lane_k[None, None, :]
    inside = columns < N
    w_mask = chosen[:, None] & inside[None, :]
    acc = tl.zeros((BLOCK_TOP_K, BLOCK_N, BLOCK_K), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            h = tl.load(h_ptrs + k, mask=chosen[:, None, None], other=0.0)
            w = tl.load(w_ptrs + k, mask=w_mask[:, :, None], other=0.0)
        else:
            rest = lane_k < K - k
            h = tl.load(h_ptrs + k, mask=chosen[:, None, None] & rest[None, None, :], other=0.0)
            w = tl.load(w_ptrs + k, mask=w_mask[:, :, None] & rest[None, None, :], other=0.0)
        acc += w.to(tl.float32) * h.to(tl.float32)
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + tl.where(chosen, expert, 0).to(tl.int64)[:, None] * stride_bias + columns[None, :]
        y += tl.load(bias_ptrs, mask=w_mask, other=0.0).to(tl.float32)
    if MUL_WEIGHT:
        weight_ptrs = topk_weights_ptr + token.to(tl.int64) * stride_weights + choices
        y *= tl.load(weight_ptrs, mask=chosen, other=0.0)[:, None]
    STORAGE: tl.constexpr = out_ptr.dtype.element_ty
    total = tl.sum(tl.where(chosen[:, None], y.to(STORAGE).to(tl.float32), 0.0), axis=0)
    tl.store(out_ptr + token.to(tl.int64) * stride_out + columns, total.to(STORAGE), mask=inside)


@dataclass(frozen=True)
class StreamTile:
    """One launch of a kernel that streams rows.

    Attributes:
        rows: of gate (and of up), or of w2, a program; of as many experts as a token has in the second.
        columns: of the inner dimension a step.
        stages: steps in flight in shared memory; 1: in registers.
        num_warps: warps a program.
    """

    rows: int
    columns: int
    stages: int = 1
    num_warps: int = 4


def gate_up_rows(
    h: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    bias: torch.Tensor | None,
    function: ActivationFunction,
    *,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    mul_weight: bool,
    expert_map: torch.Tensor | None,
    num_experts: int,
    tile: StreamTile,
    pdl: bool = False,
    triggers: bool = False,
) -> None:
    """Launch the kernel on checked arguments: `h [M * top_k, I]`, dense; the others as in `fused_experts`.

    With `triggers` the kernel behind it, launched with `pdl`, may start early; with `pdl` this one starts early too.
    """
    num_local_experts, _, k = w13.shape
    size = h.shape[1]
    gated = function.kind.is_gated
    stride = w13.stride(1)
    interleaved = function.interleaved
    path.launch(
        gate_up_rows_kernel,
        (topk_ids.numel() * cdiv(size, tile.rows),),
        x,
        w13,
        h,
        h if bias is None else bias,
        topk_weights,
        topk_ids,
        *map_arguments(topk_ids, expert_map),
        num_experts,
        num_local_experts,
        size,
        k,
        x.stride(0),
        w13.stride(0),
        stride if interleaved else size * stride,
        2 * stride if interleaved else stride,
        0 if bias is None else bias.stride(0),
        topk_ids.stride(0),
        topk_weights.stride(0),
        topk_ids.shape[1],
        function.alpha,
        function.limit,
        2 if interleaved else 1,
        1 if interleaved else size,
        PARTS=2 if gated else 1,
        ACTIVATION=str(function.kind),
        MUL_WEIGHT=mul_weight,
        HAS_BIAS=bias is not None,
        EVEN_I=size % tile.rows == 0,
        EVEN_K=k % tile.columns == 0,
        BLOCK_I=tile.rows,
        BLOCK_K=tile.columns,
        STAGES=tile.stages,
        PDL=pdl or triggers,
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )


def down_rows(
    out: torch.Tensor,
    h: torch.Tensor,
    w2: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    mul_weight: bool,
    expert_map: torch.Tensor | None,
    num_experts: int,
    tile: StreamTile,
    pdl: bool = False,
) -> None:
    """Launch the kernel on checked arguments: `out [M, H]`, `h [M * top_k, I]` dense."""
    num_local_experts, n, k = w2.shape
    num_tokens, top_k = topk_ids.shape
    path.launch(
        down_rows_kernel,
        (num_tokens * cdiv(n, tile.rows),),
        h,
        w2,
        out,
        h if bias is None else bias,
        topk_weights,
        topk_ids,
        *map_arguments(topk_ids, expert_map),
        num_tokens,
        num_experts,
        num_local_experts,
        n,
        k,
        w2.stride(0),
        w2.stride(1),
        0 if bias is None else bias.stride(0),
        topk_ids.stride(0),
        topk_weights.stride(0),
        out.stride(0),
        TOP_K=top_k,
        BLOCK_TOP_K=next_power_of_2(top_k),
        MUL_WEIGHT=mul_weight,
        HAS_BIAS=bias is not None,
        EVEN_N=n % tile.rows == 0,
        EVEN_K=k % tile.columns == 0,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        STAGES=tile.stages,
        PDL=pdl,
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )

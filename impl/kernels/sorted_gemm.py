"""The second GEMM on rows that lie in the alignment's order: y[pair] = h[slot] @ w2[expert]^T, times its weight.

Both operands are tiles of the copy engine. Rows go back to their pairs' places, or (SORTED) stay in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import path
from .descriptors import row_tiles, weight_tiles
from .gated_gemm import SortedTile, tile_at
from .pairs import routing_weight_ptrs
from .sizes import cdiv


@triton.jit
def _sorted_rows(
    h_desc,
    w_desc,
    y_ptr,
    y_desc,
    slots_ptr,
    bias_ptr,
    topk_weights_ptr,
    slot,
    expert,
    pid_n,
    num_pairs,
    N,
    K,
    stride_bias,
    stride_weights,
    top_k,
    mul_weight,
    has_bias,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    EVEN_N: tl.constexpr,
    SORTED: tl.constexpr,
):
    """ROWS slots from `slot` on, BLOCK_N columns of y."""
    if SWAP_AB:
        acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    else:
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        h = h_desc.load([slot, k])
        w = tl.reshape(w_desc.load([expert, pid_n * BLOCK_N, k]), (BLOCK_N, BLOCK_K))
        if SWAP_AB:
            acc = tl.dot(w, h.T, acc)
        else:
            acc = tl.dot(h, w.T, acc)
    if SWAP_AB:
        acc = tl.trans(acc)
    slots = slot + tl.arange(0, ROWS)
    pairs = tl.load(slots_ptr + slots)
    real = pairs < num_pairs
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Run-time values, which take a branch: as constants they would multiply the compiled variants.
    if has_bias != 0:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * stride_bias + columns
        acc += tl.load(bias_ptrs, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if mul_weight != 0:
        weight_ptrs = routing_weight_ptrs(topk_weights_ptr, stride_weights, pairs, top_k)
        acc *= tl.load(weight_ptrs, mask=real, other=0.0)[:, None]
    y = acc.to(y_ptr.dtype.element_ty)
    if y_desc is not None:
        y_desc.store([slot, pid_n * BLOCK_N], y)
    else:
        y_rows = slots if SORTED else pairs
        y_ptrs = y_ptr + y_rows.to(tl.int64)[:, None] * N + columns[None, :]
        mask = real[:, None] if EVEN_N else real[:, None] & (columns < N)[None, :]
        tl.store(y_ptrs, y, mask=mask)


@triton.jit
def _sorted_tile(
    index,
    h_desc,
    half_desc,
    w_desc,
    y_ptr,
    y_desc,
    slots_ptr,
    expert_ids_ptr,
    bias_ptr,
    topk_weights_ptr,
    num_pairs,
    num_m_blocks,
    N,
    K,
    stride_bias,
    stride_weights,
    top_k,
    mul_weight,
    has_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP_AB: tl.constexpr,
    EVEN_N: tl.constexpr,
    SORTED: tl.constexpr,
    HALF: tl.constexpr,
):
    pid_m, pid_n = tile_at(index, num_m_blocks, tl.cdiv(N, BLOCK_N), GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    expert = tl.load(expert_ids_ptr + pid_m)
    slot = pid_m * BLOCK_M
    if expert >= 0:
        if HALF:
            if tl.load(slots_ptr + slot + BLOCK_M // 2) >= num_pairs:
                _sorted_rows(
                    half_desc,
                    w_desc,
                    y_ptr,
                    None,
                    slots_ptr,
                    bias_ptr,
                    topk_weights_ptr,
                    slot,
                    expert,
                    pid_n,
                    num_pairs,
                    N,
                    K,
                    stride_bias,
                    stride_weights,
                    top_k,
                    mul_weight,
                    has_bias,
                    BLOCK_M // 2,
                    BLOCK_N,
                    BLOCK_K,
                    SWAP_AB,
                    EVEN_N,
                    SORTED,
                )
            else:
                _sorted_rows(
                    h_desc,
                    w_desc,
                    y_ptr,
                    y_desc,
                    slots_ptr,
                    bias_ptr,
                    topk_weights_ptr,
                    slot,
                    expert,
                    pid_n,
                    num_pairs,
                    N,
                    K,
                    stride_bias,
                    stride_weights,
                    top_k,
                    mul_weight,
                    has_bias,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    SWAP_AB,
                    EVEN_N,
                    SORTED,
                )
        else:
            _sorted_rows(
                h_desc,
                w_desc,
                y_ptr,
                y_desc,
                slots_ptr,
                bias_ptr,
                topk_weights_ptr,
                slot,
                expert,
                pid_n,
                num_pairs,
                N,
                K,
                stride_bias,
                stride_weights,
                top_k,
                mul_weight,
                has_bias,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                SWAP_AB,
                EVEN_N,
                SORTED,
            )


@triton.jit(
    do_not_specialize=[
        "num_pairs",
        "num_m_blocks",
        "stride_bias",
        "stride_weights",
        "top_k",
        "mul_weight",
        "has_bias",
    ]
)
def sorted_gemm_kernel(
    h_desc,
    half_desc,
    w_desc,
    y_ptr,
    y_desc,
    slots_ptr,
    expert_ids_ptr,
    used_slots_ptr,
    bias_ptr,
    topk_weights_ptr,
    num_pairs,
    num_m_blocks,
    N,
    K,
    stride_bias,
    stride_weights,
    top_k,
    mul_weight,
    has_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP_AB: tl.constexpr,
    EVEN_N: tl.constexpr,
    SORTED: tl.constexpr,
    HALF: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of y: one a program, or (PERSISTENT) every `num_programs`-th of those in use.

    HALF: a block whose second half is padding computes its first half alone, in tiles of `half_desc`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if PERSISTENT:
        num_m_blocks = tl.load(used_slots_ptr) // BLOCK_M
        for index in range(tl.program_id(0), num_m_blocks * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
            _sorted_tile(
                index,
                h_desc,
                half_desc,
                w_desc,
                y_ptr,
                y_desc,
                slots_ptr,
                expert_ids_ptr,
                bias_ptr,
                topk_weights_ptr,
                num_pairs,
                num_m_blocks,
                N,
                K,
                stride_bias,
                stride_weights,
                top_k,
                mul_weight,
                has_bias,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                GROUP_M,
                SWAP_AB,
                EVEN_N,
                SORTED,
                HALF,
            )
    else:
        _sorted_tile(
            tl.program_id(0),
            h_desc,
            half_desc,
            w_desc,
            y_ptr,
            y_desc,
            slots_ptr,
            expert_ids_ptr,
            bias_ptr,
            topk_weights_ptr,
            num_pairs,
            num_m_blocks,
            N,
            K,
            stride_bias,
            stride_weights,
            top_k,
            mul_weight,
            has_bias,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GROUP_M,
            SWAP_AB,
            EVEN_N,
            SORTED,
            HALF,
        )


def sorted_gemm(
    y: torch.Tensor,
    h: torch.Tensor,
    w2: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    topk_weights: torch.Tensor,
    mul_weight: bool,
    slots: torch.Tensor,
    expert_ids: torch.Tensor,
    used_slots: torch.Tensor,
    is_sorted: bool,
    tile: SortedTile,
    pdl: bool = False,
) -> None:
    """Launch the kernel on checked arguments.

    Args:
        y: [M * top_k, H] of pairs, or [slots, H] (`is_sorted`), dense.
        h: [slots, I], dense.
        w2: [E_local, H, I], rows contiguous, on 16 bytes.
        bias: [E_local, H] or None.
        topk_weights: [M, top_k] float32.
        mul_weight: multiply them into the float32 accumulator, behind the bias.
        slots: the alignment's pairs for `tile.block_size_m`.
        expert_ids: the alignment's experts.
        used_slots: [1] int32.
        is_sorted: the results stay in the alignment's order.
        tile: the tile choice.
        pdl: launched while the kernel before it still runs, for which it waits.
    """
    n, k = y.shape[1], h.shape[1]
    m, block_n, block_k = tile.block_size_m, tile.block_size_n, tile.block_size_k
    num_m_blocks = expert_ids.shape[0]
    num_tiles = num_m_blocks * cdiv(n, block_n)
    path.launch(
        sorted_gemm_kernel,
        (min(tile.programs, num_tiles) or num_tiles,),
        row_tiles(h, m, block_k),
        row_tiles(h, m // 2, block_k) if tile.half else None,
        weight_tiles(w2, block_n, block_k),
        y,
        row_tiles(y, m, block_n) if tile.tma_store else None,
        slots,
        expert_ids,
        used_slots,
        y if bias is None else bias,
        topk_weights,
        topk_weights.numel(),
        num_m_blocks,
        n,
        k,
        0 if bias is None else bias.stride(0),
        topk_weights.stride(0),
        topk_weights.shape[1],
        int(mul_weight),
        int(bias is not None),
        BLOCK_M=m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=tile.group_size_m,
        SWAP_AB=tile.swap_ab,
        EVEN_N=n % block_n == 0,
        SORTED=is_sorted,
        HALF=tile.half,
        PERSISTENT=tile.programs > 0,
        PDL=pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"launch_pdl": True} if pdl else {}),
    )

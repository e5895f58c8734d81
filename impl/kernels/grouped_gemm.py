"""The grouped GEMM: every routed pair's row times its expert's weight, `C[p] = A[row of p] @ B[expert of p]^T`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..tuning.kernel_config import KernelConfig
from .sizes import cdiv
from .tile import product_of_tile, tile_of_program, tile_options


@triton.jit(
    do_not_specialize=[
        "num_pairs",
        "num_experts",
        "stride_expert_ids",
        "stride_weights",
        "a_top_k",
        "top_k",
        "mul_weight",
    ]
)
def grouped_gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    topk_weights_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_pairs,
    N,
    K,
    num_experts,
    stride_am,
    stride_be,
    stride_bn,
    stride_expert_ids,
    stride_weights,
    a_top_k,
    top_k,
    mul_weight,
    NAIVE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE_B: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of C.

    Aligned: `sorted_token_ids` lists the pairs of each row block, `expert_ids` the block's expert. Naive: block p is
    pair p alone, in row 0, and `expert_ids` is `topk_ids` itself, with its row stride.

    What a constant would not make faster is a run-time value, so that few variants are compiled.
    """
    pid_m, pid_n = tile_of_program(N, BLOCK_N, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    lane_m = tl.arange(0, BLOCK_M)
    if NAIVE:
        expert = tl.load(expert_ids_ptr + (pid_m // top_k).to(tl.int64) * stride_expert_ids + pid_m % top_k)
        pairs = tl.where(lane_m == 0, pid_m, num_pairs)
        nobody = (expert < 0) | (expert >= num_experts)
    else:
        expert = tl.load(expert_ids_ptr + pid_m)
        pairs = tl.load(sorted_token_ids_ptr + pid_m.to(tl.int64) * BLOCK_M + lane_m)
        nobody = expert < 0
    if nobody:
        return

    real = pairs < num_pairs
    a_rows = (pairs // a_top_k).to(tl.int64) * stride_am
    acc = product_of_tile(
        a_ptr,
        a_rows,
        real,
        b_ptr,
        expert,
        pid_n,
        N,
        K,
        stride_be,
        stride_bn,
        EVEN_N,
        EVEN_K,
        WIDE_B,
        SWAP_AB,
        INPUT_PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if mul_weight:
        weight_ptrs = topk_weights_ptr + (pairs // top_k).to(tl.int64) * stride_weights + pairs % top_k
        acc *= tl.load(weight_ptrs, mask=real, other=0.0)[:, None]
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ptrs = c_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
    c_mask = real[:, None] if EVEN_N else real[:, None] & (columns < N)[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=c_mask)


def grouped_gemm(
    c: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    mul_weight: bool,
    sorted_token_ids: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    a_row_is_token: bool,
    allow_tf32: bool,
    config: KernelConfig,
) -> None:
    """Launch the kernel on checked arguments.

    Args:
        c: [M * top_k, N], dense; rows of pairs that no block holds are not written.
        a: [M, K] (`a_row_is_token`) or [M * top_k, K], rows contiguous.
        b: [E_local, N, K], rows contiguous.
        topk_ids: [M, top_k].
        topk_weights: [M, top_k] float32.
        mul_weight: multiply them into the float32 accumulator.
        sorted_token_ids: the alignment's pairs for `config.block_size_m`, or None for naive blocks.
        expert_ids: the alignment's experts, or None for naive blocks.
        a_row_is_token: row p // top_k of `a` belongs to pair p, else row p.
        allow_tf32: float32 operands may be rounded to TF32.
        config: the tile choice.
    """
    num_pairs = topk_ids.numel()
    top_k = topk_ids.shape[1]
    num_experts, n, k = b.shape
    naive = sorted_token_ids is None
    num_m_blocks = num_pairs if expert_ids is None else expert_ids.shape[0]
    path.launch(
        grouped_gemm_kernel,
        (num_m_blocks * cdiv(n, config.block_size_n),),
        a,
        b,
        c,
        topk_weights,
        sorted_token_ids,
        topk_ids if expert_ids is None else expert_ids,
        num_pairs,
        n,
        k,
        num_experts,
        a.stride(0),
        b.stride(0),
        b.stride(1),
        topk_ids.stride(0),
        topk_weights.stride(0),
        top_k if a_row_is_token else 1,
        top_k,
        int(mul_weight),
        NAIVE=naive,
        **tile_options(b, config, allow_tf32),
    )

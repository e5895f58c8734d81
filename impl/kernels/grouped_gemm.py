"""The grouped GEMM: every routed pair's row times its expert's weight, `C[p] = A[row of p] @ B[expert of p]^T`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..tuning.kernel_config import KernelConfig
from .sizes import cdiv


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

    Offsets that grow with the experts or the tokens are 64-bit, and computed once. What a constant would not make
    faster is a run-time value, so that few variants are compiled.
    """
    pid = tl.program_id(0)
    num_n_blocks = tl.cdiv(N, BLOCK_N)
    if GROUP_M == 1:
        pid_m = pid // num_n_blocks
        pid_n = pid % num_n_blocks
    else:
        # A group of row blocks walks the weight rows together, so that their tiles meet in L2.
        num_m_blocks = tl.num_programs(0) // num_n_blocks
        group = pid // (GROUP_M * num_n_blocks)
        in_group = pid % (GROUP_M * num_n_blocks)
        group_size = min(num_m_blocks - group * GROUP_M, GROUP_M)
        pid_m = group * GROUP_M + in_group % group_size
        pid_n = in_group // group_size

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
    lane_k = tl.arange(0, BLOCK_K)
    lane_n = tl.arange(0, BLOCK_N)
    inside = pid_n * BLOCK_N + lane_n < N
    # The weight tile starts at a 64-bit address; within it 32 bits reach, unless rows are enormous.
    b_tile_ptr = b_ptr + expert.to(tl.int64) * stride_be + (pid_n * BLOCK_N).to(tl.int64) * stride_bn
    b_rows = (lane_n.to(tl.int64) if WIDE_B else lane_n) * stride_bn

    # The loop advances two base addresses and keeps the offsets: a block of advancing pointers costs registers and a
    # quarter more instructions a step.
    if SWAP_AB:
        a_offsets = a_rows[None, :] + lane_k[:, None]
        b_offsets = b_rows[:, None] + lane_k[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        a_offsets = a_rows[:, None] + lane_k[None, :]
        b_offsets = b_rows[None, :] + lane_k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for k in range(0, K, BLOCK_K):
        if SWAP_AB:
            a_mask = real[None, :] if EVEN_K else real[None, :] & (lane_k < K - k)[:, None]
            a = tl.load(a_ptr + a_offsets, mask=a_mask, other=0.0)
            if EVEN_N and EVEN_K:
                b = tl.load(b_tile_ptr + b_offsets)
            else:
                b_mask = inside[:, None] if EVEN_K else inside[:, None] & (lane_k < K - k)[None, :]
                b = tl.load(b_tile_ptr + b_offsets, mask=b_mask, other=0.0)
            acc = tl.dot(b, a, acc, input_precision=INPUT_PRECISION)
        else:
            a_mask = real[:, None] if EVEN_K else real[:, None] & (lane_k < K - k)[None, :]
            a = tl.load(a_ptr + a_offsets, mask=a_mask, other=0.0)
            if EVEN_N and EVEN_K:
                b = tl.load(b_tile_ptr + b_offsets)
            else:
                b_mask = inside[None, :] if EVEN_K else inside[None, :] & (lane_k < K - k)[:, None]
                b = tl.load(b_tile_ptr + b_offsets, mask=b_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
        a_ptr += BLOCK_K
        b_tile_ptr += BLOCK_K

    if SWAP_AB:
        acc = tl.trans(acc)
    if mul_weight:
        weight_ptrs = topk_weights_ptr + (pairs // top_k).to(tl.int64) * stride_weights + pairs % top_k
        acc *= tl.load(weight_ptrs, mask=real, other=0.0)[:, None]
    c_ptrs = c_ptr + pairs.to(tl.int64)[:, None] * N + pid_n * BLOCK_N + lane_n[None, :]
    c_mask = real[:, None] if EVEN_N else real[:, None] & inside[None, :]
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
        EVEN_N=n % config.block_size_n == 0,
        EVEN_K=k % config.block_size_k == 0,
        WIDE_B=b.stride(1) * config.block_size_n >= 2**31,
        SWAP_AB=config.swap_ab,
        INPUT_PRECISION="tf32" if allow_tf32 else "ieee",
        BLOCK_M=config.block_size_m,
        BLOCK_N=config.block_size_n,
        BLOCK_K=config.block_size_k,
        GROUP_M=config.group_size_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

"""What every grouped GEMM shares: which tile a program computes, and the product of a block of rows with weights.

Both functions are inlined; each kernel says which rows, which expert and where the result goes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..tuning.kernel_config import KernelConfig


@triton.jit
def tile_of_program(N, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The row block and the column block of this program; axis 0 of the grid counts their pairs."""
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
    return pid_m, pid_n


@triton.jit
def product_of_tile(
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
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE_B: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of A times BLOCK_N rows of one expert's weight, `[BLOCK_M, BLOCK_N]` float32.

    `a_rows` are 64-bit offsets from `a_ptr`, and a row that is not `real` is not read. Offsets that grow with the
    experts or the tokens are 64-bit, and computed once.
    """
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
    return acc


def tile_options(b: torch.Tensor, config: KernelConfig, allow_tf32: bool) -> dict[str, Any]:
    """The constants and options of a launch over the weights `b [E_local, N, K]`.

    Args:
        b: rows contiguous.
        config: the tile choice.
        allow_tf32: float32 operands may be rounded to TF32.
    """
    _, n, k = b.shape
    return {
        "EVEN_N": n % config.block_size_n == 0,
        "EVEN_K": k % config.block_size_k == 0,
        "WIDE_B": b.stride(1) * config.block_size_n >= 2**31,
        "SWAP_AB": config.swap_ab,
        "INPUT_PRECISION": "tf32" if allow_tf32 else "ieee",
        "BLOCK_M": config.block_size_m,
        "BLOCK_N": config.block_size_n,
        "BLOCK_K": config.block_size_k,
        "GROUP_M": config.group_size_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

"""The GEMM of the batched format: every expert's slab of rows times its weight, `C[e, r] = A[e, r] @ B[e]^T`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..tuning.kernel_config import KernelConfig
from .lora_expand import adapter_arguments, adapter_options, add_adapters, tile_with_adapters
from .lora_rows import adapters_of_block
from .lora_shrink import Shrunk
from .sizes import cdiv
from .slabs import tokens_of_slab
from .tile import GemmOperands, bias_arguments, bias_of, product_of_tile, tile_of_program, tile_options


@triton.jit(
    do_not_specialize=[
        "max_tokens",
        "stride_bias",
        "has_bias",
        "scale_rows",
        "scale_columns",
        "part",
        "num_slots",
        "num_listed",
        "num_runs",
        "lora_part_rows",
        "lora_first_row",
        "lora_b_rows",
    ]
)
def batched_gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    a_scale_ptr,
    b_scale_ptr,
    b_zero_ptr,
    bias_ptr,
    expert_num_tokens_ptr,
    max_tokens,
    N,
    K,
    stride_ae,
    stride_am,
    stride_be,
    stride_bn,
    stride_bias,
    stride_ce,
    stride_cm,
    scale_rows,
    scale_columns,
    part,
    has_bias,
    lora_slots_ptr,
    lora_lists_ptr,
    shrunk_ptr,
    lora_b_ptr,
    num_slots,
    num_listed,
    lora_width,
    num_runs,
    stride_runs,
    lora_part_rows,
    lora_first_row,
    lora_b_rows,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE_B: tl.constexpr,
    SWAP_AB: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr,
    B_FORMAT: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    LORA: tl.constexpr,
    LORA_PARTS: tl.constexpr,
    LORA_BLOCK_R: tl.constexpr,
    LORA_LISTED: tl.constexpr,
    LORA_RUNS: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of the slab that axis 1 of the grid names.

    The host does not know the counts, so the grid covers whole slabs, and a program whose rows are all behind its
    expert's count returns after one load.
    """
    expert = tl.program_id(1)
    pid_m, pid_n = tile_of_program(N, BLOCK_N, GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    num_tokens = tokens_of_slab(expert_num_tokens_ptr, expert, max_tokens)
    if pid_m * BLOCK_M >= num_tokens:
        return

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < num_tokens
    rows = rows.to(tl.int64)
    acc = product_of_tile(
        a_ptr + expert.to(tl.int64) * stride_ae,
        rows * stride_am,
        a_scale_ptr,
        expert.to(tl.int64) * max_tokens + rows,
        real,
        b_ptr,
        b_scale_ptr,
        b_zero_ptr,
        expert,
        pid_n,
        N,
        K,
        stride_be,
        stride_bn,
        scale_rows,
        scale_columns,
        part,
        EVEN_N,
        EVEN_K,
        WIDE_B,
        SWAP_AB,
        INPUT_PRECISION,
        A_SCALE,
        B_SCALE,
        B_FORMAT,
        SCALE_N,
        SCALE_K,
        ONE_SCALE,
        WINDOW,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if LORA != "none":
        block = expert * tl.cdiv(max_tokens, BLOCK_M) + pid_m
        slots = tl.load(lora_slots_ptr + block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
        adapters, listed = adapters_of_block(lora_lists_ptr, block, num_listed, BLOCK_M)
        if adapters > 0:
            acc = add_adapters(
                acc,
                slots,
                listed,
                adapters,
                rows,
                shrunk_ptr + expert.to(tl.int64) * max_tokens * LORA_PARTS * lora_width,
                lora_b_ptr,
                expert,
                pid_n,
                lora_width,
                tl.num_programs(1),
                num_runs,
                stride_runs,
                lora_part_rows,
                lora_first_row,
                lora_b_rows,
                LORA_LISTED,
                LORA,
                LORA_PARTS,
                LORA_RUNS,
                INPUT_PRECISION,
                SWAP_AB,
                BLOCK_M,
                BLOCK_N,
                LORA_BLOCK_R,
            )
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if has_bias:
        bias_at = expert.to(tl.int64) * stride_bias + columns
        acc += bias_of(bias_ptr, has_bias, bias_at, columns < N)[None, :]
    c_ptrs = c_ptr + expert.to(tl.int64) * stride_ce + (rows * stride_cm)[:, None] + columns[None, :]
    c_mask = real[:, None] if EVEN_N else real[:, None] & (columns < N)[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=c_mask)


def batched_gemm(
    c: torch.Tensor,
    a: torch.Tensor,
    operands: GemmOperands,
    expert_num_tokens: torch.Tensor,
    *,
    allow_tf32: bool,
    config: KernelConfig,
    shrunk: Shrunk | None = None,
) -> None:
    """Launch the kernel on checked arguments.

    Args:
        c: [E_local, max_tokens, N], rows contiguous; rows behind an expert's count are not written.
        a: [E_local, max_tokens, K], rows contiguous; rows behind an expert's count are not read.
        operands: the weights, with scales and bias.
        expert_num_tokens: [E_local] int32.
        allow_tf32: float32 operands may be rounded to TF32.
        config: the tile choice.
        shrunk: of the adapters that are added; None without any.
    """
    b, bias = operands.b, operands.bias
    max_tokens = a.shape[1]
    config = tile_with_adapters(config, shrunk)
    bias_ptr, has_bias = bias_arguments(bias, c)
    path.launch(
        batched_gemm_kernel,
        (cdiv(max_tokens, config.block_size_m) * cdiv(operands.n, config.block_size_n), b.shape[0]),
        a,
        b,
        c,
        operands.a_scale,
        operands.b_scale,
        operands.b_zero,
        bias_ptr,
        expert_num_tokens,
        max_tokens,
        operands.n,
        operands.k,
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        0 if bias is None else bias.stride(0),
        c.stride(0),
        c.stride(1),
        *operands.numbers,
        has_bias,
        *adapter_arguments(shrunk, config),
        **tile_options(operands, config, allow_tf32),
        **adapter_options(shrunk, config),
    )

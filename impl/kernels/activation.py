"""silu(gate) * up on GEMM1's output: float32 inside, rounded once to the storage dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..platform import Platform, Vendor
from .pairs import local_expert
from .sizes import cdiv
from .slabs import tokens_of_slab


@triton.jit
def activate_rows(gate_up_ptr, out_ptr, rows, real, columns, size):
    """silu(gate) * up of those `rows` (64-bit) that are `real`, at `columns`; both operands are dense."""
    mask = real[:, None] & (columns < size)[None, :]
    gate_ptrs = gate_up_ptr + rows[:, None] * (2 * size) + columns[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
    # A large negative gate makes exp infinite and the quotient -0.0, which is silu's limit.
    activated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + rows[:, None] * size + columns[None, :], activated.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_local_experts", "stride_topk_ids", "top_k"])
def silu_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    num_pairs,
    size,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    top_k,
    HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Rows of pairs without a local expert are neither read nor written: GEMM1 left them as they were."""
    pairs = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    expert = local_expert(
        topk_ids_ptr,
        stride_topk_ids,
        pairs,
        pairs < num_pairs,
        expert_map_ptr,
        num_experts,
        num_local_experts,
        top_k,
        HAS_EXPERT_MAP,
    )
    activate_rows(gate_up_ptr, out_ptr, pairs.to(tl.int64), expert >= 0, columns, size)


@triton.jit(do_not_specialize=["max_tokens"])
def batched_silu_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    expert_num_tokens_ptr,
    max_tokens,
    size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Rows behind their expert's count are neither read nor written; a program that has no others returns at once."""
    expert = tl.program_id(1)
    num_i_blocks = tl.cdiv(size, BLOCK_I)
    first = tl.program_id(0) // num_i_blocks * BLOCK_ROWS
    num_tokens = tokens_of_slab(expert_num_tokens_ptr, expert, max_tokens)
    if first >= num_tokens:
        return
    rows = first + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(0) % num_i_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    slab = expert.to(tl.int64) * max_tokens
    activate_rows(gate_up_ptr, out_ptr, slab + rows, rows < num_tokens, columns, size)


def silu_and_mul(
    out: torch.Tensor,
    gate_up: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    num_local_experts: int,
    platform: Platform,
) -> None:
    """Launch the kernel: `gate_up [M * top_k, 2I]` to `out [M * top_k, I]`, both dense."""
    num_pairs, size = out.shape
    block_pairs, block_i, num_warps = _block(num_pairs, platform)
    path.launch(
        silu_and_mul_kernel,
        (cdiv(num_pairs, block_pairs), cdiv(size, block_i)),
        gate_up,
        out,
        topk_ids,
        expert_map,
        num_pairs,
        size,
        num_experts,
        num_local_experts,
        topk_ids.stride(0),
        topk_ids.shape[1],
        HAS_EXPERT_MAP=expert_map is not None,
        BLOCK_PAIRS=block_pairs,
        BLOCK_I=block_i,
        num_warps=num_warps,
    )


def batched_silu_and_mul(
    out: torch.Tensor, gate_up: torch.Tensor, expert_num_tokens: torch.Tensor, platform: Platform
) -> None:
    """Launch the kernel: `gate_up [E_local, max_tokens, 2I]` to `out [E_local, max_tokens, I]`, both dense."""
    num_experts, max_tokens, size = out.shape
    block_rows, block_i, num_warps = _block(num_experts * max_tokens, platform)
    path.launch(
        batched_silu_and_mul_kernel,
        (cdiv(max_tokens, block_rows) * cdiv(size, block_i), num_experts),
        gate_up,
        out,
        expert_num_tokens,
        max_tokens,
        size,
        BLOCK_ROWS=block_rows,
        BLOCK_I=block_i,
        num_warps=num_warps,
    )


def _block(num_rows: int, platform: Platform) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps."""
    if platform.vendor is Vendor.CPU:
        return 64, 128, 4
    # 16 bytes of gate and of up a thread while few rows must fill the device, four times that when many do.
    return (4 if num_rows <= 2048 else 16), 256, 4

"""silu(gate) * up on GEMM1's output: float32 inside, rounded once to the storage dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..platform import Platform, Vendor
from .pairs import local_expert
from .sizes import cdiv


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
    rows = pairs.to(tl.int64)[:, None]
    mask = (expert >= 0)[:, None] & (columns < size)[None, :]
    gate_ptrs = gate_up_ptr + rows * (2 * size) + columns[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
    # A large negative gate makes exp infinite and the quotient -0.0, which is silu's limit.
    activated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + rows * size + columns[None, :], activated.to(out_ptr.dtype.element_ty), mask=mask)


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
    if platform.vendor is Vendor.CPU:
        block_pairs, block_i, num_warps = 64, 128, 4
    else:
        # 16 bytes of gate and of up a thread while few pairs must fill the device, four times that when many do.
        block_pairs, block_i, num_warps = (4 if num_pairs <= 2048 else 16), 256, 4
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

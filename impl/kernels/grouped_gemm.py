"""The grouped GEMM: every routed pair's row times its expert's weight, `C[p] = A[row of p] @ B[expert of p]^T`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..tuning.kernel_config import KernelConfig
from .lora_expand import adapter_arguments, adapter_options, add_adapters, tile_with_adapters
from .lora_rows import adapters_of_block, known_slot
from .lora_shrink import Shrunk
from .pairs import routing_weight_ptrs
from .sizes import cdiv
from .tile import GemmOperands, bias_arguments, bias_of, product_of_tile, tile_of_program, tile_options

# When the routing weight multiplies; 0 where it does not.
ON_INPUT, ON_OUTPUT = tl.constexpr(1), tl.constexpr(2)


@triton.jit(
    do_not_specialize=[
        "num_pairs",
        "num_experts",
        "stride_expert_ids",
        "stride_weights",
        "stride_bias",
        "a_top_k",
        "top_k",
        "mul_weight",
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
    ],
    do_not_specialize_on_alignment=["topk_weights_ptr", "lora_slots_ptr"],
)
def grouped_gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    a_scale_ptr,
    b_scale_ptr,
    b_zero_ptr,
    bias_ptr,
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
    stride_bias,
    stride_expert_ids,
    stride_weights,
    scale_rows,
    scale_columns,
    part,
    a_top_k,
    top_k,
    mul_weight,
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
    NAIVE: tl.constexpr,
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
    """One [BLOCK_M, BLOCK_N] tile of C.

    Aligned: `sorted_token_ids` lists the pairs of each row block, `expert_ids` the block's expert. Naive: block p is
    pair p alone, in row 0, and `expert_ids` is `topk_ids` itself, with its row stride.

    With LORA the rows' adapters are added to the accumulator, before anything else happens to it.

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
    if LORA != "none" and LORA_LISTED:
        slots = tl.load(lora_slots_ptr + pid_m.to(tl.int64) * BLOCK_M + lane_m)
        adapters, listed = adapters_of_block(lora_lists_ptr, pid_m, num_listed, BLOCK_M)
    if nobody:
        return

    real = pairs < num_pairs
    a_index = pairs // a_top_k
    if LORA != "none" and not LORA_LISTED:
        # Looked at behind the product, so that nothing waits for them before.
        ids = tl.load(lora_slots_ptr + pairs // top_k, mask=real, other=-1)
    acc = product_of_tile(
        a_ptr,
        a_index.to(tl.int64) * stride_am,
        a_scale_ptr,
        a_index,
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
        if not LORA_LISTED:
            slots = known_slot(ids, num_slots)
            adapters, listed = tl.max(tl.where(slots >= 0, lane_m + 1, 0), axis=0), slots
        if adapters > 0:
            acc = add_adapters(
                acc,
                slots,
                listed,
                adapters,
                pairs.to(tl.int64),
                shrunk_ptr,
                lora_b_ptr,
                expert,
                pid_n,
                lora_width,
                num_experts,
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
    weight_ptrs = routing_weight_ptrs(topk_weights_ptr, stride_weights, pairs, top_k)
    if mul_weight == ON_INPUT:
        acc *= tl.load(weight_ptrs, mask=real, other=0.0)[:, None]
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if has_bias:
        bias_at = expert.to(tl.int64) * stride_bias + columns
        acc += bias_of(bias_ptr, has_bias, bias_at, columns < N)[None, :]
    if mul_weight == ON_OUTPUT:
        acc *= tl.load(weight_ptrs, mask=real, other=0.0)[:, None]
    c_ptrs = c_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
    c_mask = real[:, None] if EVEN_N else real[:, None] & (columns < N)[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=c_mask)


def grouped_gemm(
    c: torch.Tensor,
    a: torch.Tensor,
    operands: GemmOperands,
    *,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    mul_weight: bool,
    sorted_token_ids: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    a_row_is_token: bool,
    allow_tf32: bool,
    config: KernelConfig,
    shrunk: Shrunk | None = None,
) -> None:
    """Launch the kernel on checked arguments.

    Args:
        c: [M * top_k, N], dense; rows of pairs that no block holds are not written.
        a: [M, K] (`a_row_is_token`) or [M * top_k, K], rows contiguous.
        operands: the weights, with scales and bias.
        topk_ids: [M, top_k].
        topk_weights: [M, top_k] float32.
        mul_weight: multiply them into the float32 accumulator: before the bias where they stand for the input (of
            the first GEMM, `a_row_is_token`), behind it where they weigh the output.
        sorted_token_ids: the alignment's pairs for `config.block_size_m`, or None for naive blocks.
        expert_ids: the alignment's experts, or None for naive blocks.
        a_row_is_token: row p // top_k of `a` belongs to pair p, else row p.
        allow_tf32: float32 operands may be rounded to TF32.
        config: the tile choice.
        shrunk: of the adapters that are added; None without any.
    """
    num_pairs = topk_ids.numel()
    top_k = topk_ids.shape[1]
    b, n, bias = operands.b, operands.n, operands.bias
    num_m_blocks = num_pairs if expert_ids is None else expert_ids.shape[0]
    config = tile_with_adapters(config, shrunk)
    bias_ptr, has_bias = bias_arguments(bias, c)
    path.launch(
        grouped_gemm_kernel,
        (num_m_blocks * cdiv(n, config.block_size_n),),
        a,
        b,
        c,
        operands.a_scale,
        operands.b_scale,
        operands.b_zero,
        bias_ptr,
        topk_weights,
        sorted_token_ids,
        topk_ids if expert_ids is None else expert_ids,
        num_pairs,
        n,
        operands.k,
        b.shape[0],
        a.stride(0),
        b.stride(0),
        b.stride(1),
        0 if bias is None else bias.stride(0),
        topk_ids.stride(0),
        topk_weights.stride(0),
        *operands.numbers,
        top_k if a_row_is_token else 1,
        top_k,
        (1 if a_row_is_token else 2) * mul_weight,
        has_bias,
        *adapter_arguments(shrunk, config),
        NAIVE=sorted_token_ids is None,
        **tile_options(operands, config, allow_tf32),
        **adapter_options(shrunk, config),
    )

"""The activation on GEMM1's output: float32 inside, rounded once to the storage dtype, quantised where asked for."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .. import path
from ..config import ActivationFunction
from ..platform import Platform, Vendor
from ..quantization import LARGEST, ActivationScale
from .pairs import local_expert
from .quantize import Rows, largest_of_rows, quantized, scale_of
from .sizes import cdiv, next_power_of_2
from .slabs import tokens_of_slab


@triton.jit
def activated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """The activation of float32 blocks; `up` is not looked at where nothing is gated.

    A large negative gate makes exp infinite and the quotient -0.0, which is the limit of every sigmoid form.
    """
    if ACTIVATION == "silu":
        result = gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "silu_no_mul":
        result = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_no_mul":
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2z): no cancellation for a negative gate.
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        result = gate / (1.0 + tl.exp(-z)) * up
    elif ACTIVATION == "relu2_no_mul":
        positive = tl.where(gate < 0.0, 0.0, gate)  # NaN stays NaN
        result = positive * positive
    else:
        tl.static_assert(ACTIVATION == "swigluoai")
        g = tl.where(gate > limit, limit, gate)
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        result = g / (1.0 + tl.exp(-alpha * g)) * (u + 1.0)
    return result


@triton.jit
def activated_by_number(gate, up, alpha, limit, number, IS_GATED: tl.constexpr):
    """`activated` of the NUMBERS, known at run time: one kernel for all activations that few models have."""
    if IS_GATED:
        if number == 0:
            result = activated(gate, up, alpha, limit, "gelu")
        else:
            result = activated(gate, up, alpha, limit, "gelu_tanh")
    else:
        if number == 2:
            result = activated(gate, up, alpha, limit, "silu_no_mul")
        elif number == 3:
            result = activated(gate, up, alpha, limit, "gelu_no_mul")
        else:
            result = activated(gate, up, alpha, limit, "relu2_no_mul")
    return result


NUMBERS = {"gelu": 0, "gelu_tanh": 1, "silu_no_mul": 2, "gelu_no_mul": 3, "relu2_no_mul": 4}


@triton.jit
def activated_rows(
    gate_up_ptr,
    rows,
    real,
    columns,
    end,
    size,
    alpha,
    limit,
    number,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The activation of those `rows` (64-bit) of dense GEMM1 output that are `real`, at `columns`, float32.

    Columns from `end` on are 0 (of every activation: act(0, 0) = 0).
    """
    mask = real[:, None] & (columns < end)[None, :]
    if IS_GATED:
        row_ptrs = gate_up_ptr + rows[:, None] * (2 * size)
        if INTERLEAVED:
            gate = tl.load(row_ptrs + 2 * columns[None, :], mask=mask, other=0.0).to(tl.float32)
            up = tl.load(row_ptrs + 2 * columns[None, :] + 1, mask=mask, other=0.0).to(tl.float32)
        else:
            gate = tl.load(row_ptrs + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            up = tl.load(row_ptrs + size + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        gate = tl.load(gate_up_ptr + rows[:, None] * size + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        up = gate
    if ACTIVATION == "by_number":
        result = activated_by_number(gate, up, alpha, limit, number, IS_GATED)
    else:
        result = activated(gate, up, alpha, limit, ACTIVATION)
    return result


@triton.jit
def _activate_and_store(
    gate_up_ptr,
    out_ptr,
    rows,
    real,
    columns,
    size,
    alpha,
    limit,
    number,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    result = activated_rows(
        gate_up_ptr, rows, real, columns, size, size, alpha, limit, number, ACTIVATION, IS_GATED, INTERLEAVED
    )
    mask = real[:, None] & (columns < size)[None, :]
    tl.store(out_ptr + rows[:, None] * size + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "has_expert_map",
        "num_pairs",
        "num_experts",
        "num_local_experts",
        "stride_topk_ids",
        "top_k",
        "number",
    ]
)
def activation_kernel(
    gate_up_ptr,
    out_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    num_pairs,
    size,
    alpha,
    limit,
    number,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    top_k,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Rows of pairs without a local expert are neither read nor written: GEMM1 left them as they were."""
    pairs = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
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
        has_expert_map,
    )
    _activate_and_store(
        gate_up_ptr,
        out_ptr,
        pairs.to(tl.int64),
        expert >= 0,
        columns,
        size,
        alpha,
        limit,
        number,
        ACTIVATION,
        IS_GATED,
        INTERLEAVED,
    )


@triton.jit(do_not_specialize=["max_tokens", "number"])
def batched_activation_kernel(
    gate_up_ptr,
    out_ptr,
    expert_num_tokens_ptr,
    max_tokens,
    size,
    alpha,
    limit,
    number,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
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
    _activate_and_store(
        gate_up_ptr,
        out_ptr,
        slab + rows,
        rows < num_tokens,
        columns,
        size,
        alpha,
        limit,
        number,
        ACTIVATION,
        IS_GATED,
        INTERLEAVED,
    )


@triton.jit
def _activate_and_quantize(
    gate_up_ptr,
    out_ptr,
    plain_ptr,
    scale_ptr,
    rows,
    real,
    index,
    num_groups,
    size,
    group,
    alpha,
    limit,
    number,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STORAGE: tl.constexpr,
    STATIC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Group `index` of rows: activate, round to the storage dtype, find the scale (or take it, STATIC), quantise.

    `plain_ptr` takes the rounded rows too, where LoRA reads them.

    A group that one block holds stays in registers; a wider one (a scale a token) is activated twice, since its second
    reading comes from the L2 cache.
    """
    first = index * group
    end = tl.minimum(first + group, size)
    scale = tl.full(rows.shape, 0.0, tl.float32)
    if STATIC:
        scale += tl.load(scale_ptr)
    elif not ONE_BLOCK:
        amax = tl.full(rows.shape, 0.0, tl.float32)
        for start in range(first, end, BLOCK_I):
            h = activated_rows(
                gate_up_ptr,
                rows,
                real,
                start + tl.arange(0, BLOCK_I),
                end,
                size,
                alpha,
                limit,
                number,
                ACTIVATION,
                IS_GATED,
                INTERLEAVED,
            )
            h = h.to(STORAGE).to(tl.float32)
            amax = tl.maximum(amax, largest_of_rows(h), propagate_nan=tl.PropagateNan.ALL)
        scale = scale_of(amax, LARGEST)
    for start in range(first, end, BLOCK_I):
        columns = start + tl.arange(0, BLOCK_I)
        h = activated_rows(
            gate_up_ptr, rows, real, columns, end, size, alpha, limit, number, ACTIVATION, IS_GATED, INTERLEAVED
        )
        h = h.to(STORAGE).to(tl.float32)
        if ONE_BLOCK and not STATIC:
            scale = scale_of(largest_of_rows(h), LARGEST)
        q = quantized(h, tl.broadcast_to(scale[:, None], h.shape), LARGEST)
        mask = real[:, None] & (columns < end)[None, :]
        tl.store(out_ptr + rows[:, None] * size + columns[None, :], q, mask=mask)
        if plain_ptr is not None:
            tl.store(plain_ptr + rows[:, None] * size + columns[None, :], h.to(STORAGE), mask=mask)
    if not STATIC:
        tl.store(scale_ptr + rows * num_groups + index, scale, mask=real)


@triton.jit(
    do_not_specialize=[
        "has_expert_map",
        "num_pairs",
        "num_experts",
        "num_local_experts",
        "stride_topk_ids",
        "top_k",
        "number",
    ]
)
def quantized_activation_kernel(
    gate_up_ptr,
    out_ptr,
    plain_ptr,
    scale_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    num_pairs,
    size,
    group,
    alpha,
    limit,
    number,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    top_k,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STORAGE: tl.constexpr,
    STATIC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One group of columns of some pairs; pairs without a local expert are neither read nor written."""
    pairs = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    expert = local_expert(
        topk_ids_ptr,
        stride_topk_ids,
        pairs,
        pairs < num_pairs,
        expert_map_ptr,
        num_experts,
        num_local_experts,
        top_k,
        has_expert_map,
    )
    _activate_and_quantize(
        gate_up_ptr,
        out_ptr,
        plain_ptr,
        scale_ptr,
        pairs.to(tl.int64),
        expert >= 0,
        tl.program_id(1),
        tl.num_programs(1),
        size,
        group,
        alpha,
        limit,
        number,
        ACTIVATION,
        IS_GATED,
        INTERLEAVED,
        STORAGE,
        STATIC,
        ONE_BLOCK,
        LARGEST,
        BLOCK_I,
    )


@triton.jit(do_not_specialize=["max_tokens", "number"])
def batched_quantized_activation_kernel(
    gate_up_ptr,
    out_ptr,
    plain_ptr,
    scale_ptr,
    expert_num_tokens_ptr,
    max_tokens,
    size,
    group,
    alpha,
    limit,
    number,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STORAGE: tl.constexpr,
    STATIC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One group of columns of some rows of a slab; rows behind its count are neither read nor written."""
    expert = tl.program_id(1)
    num_groups = tl.cdiv(size, group)
    first = tl.program_id(0) // num_groups * BLOCK_ROWS
    num_tokens = tokens_of_slab(expert_num_tokens_ptr, expert, max_tokens)
    if first >= num_tokens:
        return
    rows = first + tl.arange(0, BLOCK_ROWS)
    _activate_and_quantize(
        gate_up_ptr,
        out_ptr,
        plain_ptr,
        scale_ptr,
        expert.to(tl.int64) * max_tokens + rows,
        rows < num_tokens,
        tl.program_id(0) % num_groups,
        num_groups,
        size,
        group,
        alpha,
        limit,
        number,
        ACTIVATION,
        IS_GATED,
        INTERLEAVED,
        STORAGE,
        STATIC,
        ONE_BLOCK,
        LARGEST,
        BLOCK_I,
    )


def activate(
    out: torch.Tensor,
    gate_up: torch.Tensor,
    function: ActivationFunction,
    rows: Rows,
    platform: Platform,
) -> None:
    """Launch the kernel on dense rows of pairs, or of slabs.

    Args:
        out: [rows, I]; rows that hold nothing are not written.
        gate_up: [rows, 2I], or [rows, I] where nothing is gated.
        function: the activation.
        rows: which rows hold something.
        platform: where it runs.
    """
    block_rows, block_i, num_warps = _block(rows, platform)
    _launch(
        activation_kernel,
        batched_activation_kernel,
        rows,
        block_rows,
        cdiv(out.shape[-1], block_i),
        (gate_up, out),
        (out.shape[-1],),
        function,
        {"BLOCK_ROWS": block_rows, "BLOCK_I": block_i, "num_warps": num_warps},
    )


def activate_and_quantize(
    out: torch.Tensor,
    gate_up: torch.Tensor,
    function: ActivationFunction,
    scale: ActivationScale,
    group: int,
    static_scale: torch.Tensor | None,
    rows: Rows,
    plain: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernel on dense rows of pairs, or of slabs.

    Args:
        out: [rows, I] float8_e4m3fn or int8; rows that hold nothing are not written.
        gate_up: [rows, 2I], or [rows, I] where nothing is gated.
        function: the activation.
        scale: static, one a token, or one a group.
        group: columns of a group.
        static_scale: [1] float32 of `ActivationScale.STATIC`, else None.
        rows: which rows hold something.
        plain: [rows, I] of the storage dtype, which takes the rows as they are before they are quantised; None where
            nobody reads them.

    Returns:
        The scales, float32 [1], [rows, 1] or [rows, ceil(I / group)].
    """
    size = out.shape[-1]
    static = static_scale is not None
    block_i = min(1024, next_power_of_2(group if scale is ActivationScale.GROUP else size))
    width = group if scale is ActivationScale.GROUP else size if scale is ActivationScale.TOKEN else block_i
    num_groups = cdiv(size, width)
    if static_scale is not None:
        scales = static_scale
    else:
        scales = torch.empty((rows.count, num_groups), dtype=torch.float32, device=out.device)
    block_rows = max(1, min(4, 2048 // block_i))
    _launch(
        quantized_activation_kernel,
        batched_quantized_activation_kernel,
        rows,
        block_rows,
        num_groups,
        (gate_up, out, plain, scales),
        (size, width),
        function,
        {
            "STORAGE": _TRITON_DTYPES[gate_up.dtype],
            "STATIC": static,
            "ONE_BLOCK": width <= block_i,
            "LARGEST": LARGEST[out.dtype],
            "BLOCK_ROWS": block_rows,
            "BLOCK_I": block_i,
            "num_warps": 4,
        },
    )
    return scales


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _launch(
    of_pairs: Any,
    of_slabs: Any,
    rows: Rows,
    block_rows: int,
    num_column_blocks: int,
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    function: ActivationFunction,
    options: dict[str, Any],
) -> None:
    """Launch the kernel of the rows' kind."""
    topk_ids, expert_map, has_expert_map, expert_num_tokens = rows.pointers
    constants = {
        "ACTIVATION": "by_number" if function.kind in NUMBERS else str(function.kind),
        "IS_GATED": function.kind.is_gated,
        "INTERLEAVED": function.interleaved,
        **options,
    }
    numbers = (*sizes, function.alpha, function.limit, NUMBERS.get(function.kind, 0))
    if expert_num_tokens is None:
        path.launch(
            of_pairs,
            (cdiv(rows.count, block_rows), num_column_blocks),
            *tensors,
            topk_ids,
            expert_map,
            has_expert_map,
            rows.count,
            *numbers,
            *rows.numbers[:4],
            **constants,
        )
        return
    path.launch(
        of_slabs,
        (cdiv(rows.max_tokens, block_rows) * num_column_blocks, rows.count // rows.max_tokens),
        *tensors,
        expert_num_tokens,
        rows.max_tokens,
        *numbers,
        **constants,
    )


def _block(rows: Rows, platform: Platform) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps."""
    if platform.vendor is Vendor.CPU:
        return 64, 128, 4
    # 16 bytes of gate and of up a thread while few rows must fill the device, four times that when many do. How many
    # rows of slabs hold something the host does not know.
    return (4 if rows.kind == "slabs" or rows.count <= 2048 else 16), 256, 4

"""Activations in few bits: q = round(x / scale), scale = amax / largest, for a tensor, a row or a group of columns.

Where the quantised values go next to other work (the activation between the GEMMs), that kernel calls the functions
here, so that all of them round alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import path
from ..quantization import LARGEST, ActivationScale
from .pairs import local_expert, map_arguments
from .sizes import cdiv, next_power_of_2
from .slabs import tokens_of_slab


@triton.jit
def largest_of_rows(x):
    """The largest magnitude in each row of float32 `x`; NaN where one is in it, which Triton's maximum passes over."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)  # of floats that are not negative, in the floats' order; NaN is highest
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr):
    """amax / largest, and 1 where everything is zero."""
    return tl.where(amax == 0.0, 1.0, tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32)))


@triton.jit
def quantized(x, scale, LARGEST: tl.constexpr):
    """x / scale, both float32 and of one shape, clamped and rounded to nearest even: fp8 e4m3 or int8."""
    v = tl.div_rn(x, scale)
    v = tl.where(v > LARGEST, LARGEST, tl.where(v < -LARGEST, -LARGEST, v))  # NaN stays NaN
    if LARGEST == 127.0:
        # Adding and taking away 1.5 * 2^23 rounds a float32 of up to 2^22 to the nearest integer, ties to even.
        q = ((v + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        q = v.to(tl.float8e4nv)
    return q


@triton.jit
def _real_rows(
    rows,
    num_rows,
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    expert_num_tokens_ptr,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    top_k,
    max_tokens,
    ROWS: tl.constexpr,
):
    """Which rows hold something: all (`tokens`), `pairs` with a local expert, those within the counts of `slabs`."""
    inside = rows < num_rows
    if ROWS == "pairs":
        expert = local_expert(
            topk_ids_ptr,
            stride_topk_ids,
            rows,
            inside,
            expert_map_ptr,
            num_experts,
            num_local_experts,
            top_k,
            has_expert_map,
        )
        inside = inside & (expert >= 0)
    if ROWS == "slabs":
        slab = tl.where(inside, rows // max_tokens, 0)
        inside = inside & (rows % max_tokens < tokens_of_slab(expert_num_tokens_ptr, slab, max_tokens))
    return inside


_RUN_TIME = [
    "has_expert_map",
    "num_rows",
    "num_experts",
    "num_local_experts",
    "stride_topk_ids",
    "top_k",
    "max_tokens",
]


@triton.jit(do_not_specialize=_RUN_TIME)
def amax_kernel(
    x_ptr,
    amax_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    expert_num_tokens_ptr,
    num_rows,
    size,
    stride_slab,
    stride_row,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    top_k,
    max_tokens,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest magnitude of all real rows, into one float32 that was 0 before: an order-free maximum of bits."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = _real_rows(
        rows,
        num_rows,
        topk_ids_ptr,
        expert_map_ptr,
        has_expert_map,
        expert_num_tokens_ptr,
        num_experts,
        num_local_experts,
        stride_topk_ids,
        top_k,
        max_tokens,
        ROWS,
    )
    offsets = (rows // max_tokens).to(tl.int64) * stride_slab + (rows % max_tokens).to(tl.int64) * stride_row
    mask = real[:, None] & (columns < size)[None, :]
    x = tl.load(x_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    bits = tl.abs(x).to(tl.int32, bitcast=True)  # of floats that are not negative, in the floats' order; NaN is highest
    tl.atomic_max(amax_ptr, tl.max(tl.max(bits, axis=1), axis=0), sem="relaxed")


@triton.jit(do_not_specialize=_RUN_TIME)
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    given_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    has_expert_map,
    expert_num_tokens_ptr,
    num_rows,
    size,
    group,
    stride_slab,
    stride_row,
    num_experts,
    num_local_experts,
    stride_topk_ids,
    top_k,
    max_tokens,
    ROWS: tl.constexpr,
    GIVEN: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows to dense q. Axis 1 of the grid counts groups of `group` columns (a row's whole, for a scale a row).

    GIVEN: `dynamic` finds the scale of each row and group, `amax` makes one of the tensor's largest magnitude (and
    stores it), `scale` takes it as it stands.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    index = tl.program_id(1)
    real = _real_rows(
        rows,
        num_rows,
        topk_ids_ptr,
        expert_map_ptr,
        has_expert_map,
        expert_num_tokens_ptr,
        num_experts,
        num_local_experts,
        stride_topk_ids,
        top_k,
        max_tokens,
        ROWS,
    )
    offsets = (rows // max_tokens).to(tl.int64) * stride_slab + (rows % max_tokens).to(tl.int64) * stride_row
    first = index * group
    end = tl.minimum(first + group, size)
    if GIVEN == "dynamic":
        amax = tl.zeros((BLOCK_ROWS,), tl.float32)
        for start in range(first, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = real[:, None] & (columns < end)[None, :]
            x = tl.load(x_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, largest_of_rows(x), propagate_nan=tl.PropagateNan.ALL)
        scale = scale_of(amax, LARGEST)
        tl.store(scale_ptr + rows.to(tl.int64) * tl.num_programs(1) + index, scale, mask=real)
    else:
        scale = tl.zeros((BLOCK_ROWS,), tl.float32) + tl.load(given_ptr)
        if GIVEN == "amax":
            scale = scale_of(scale, LARGEST)
            tl.store(scale_ptr + rows * 0, scale, mask=(rows == 0) & (index == 0))
    for start in range(first, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = real[:, None] & (columns < end)[None, :]
        x = tl.load(x_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        q = quantized(x, tl.broadcast_to(scale[:, None], x.shape), LARGEST)
        tl.store(q_ptr + rows.to(tl.int64)[:, None] * size + columns[None, :], q, mask=mask)


class Rows:
    """Which rows of an operand hold something; made once for a call, handed to every kernel that quantises.

    Args:
        kind: `tokens` (all), `pairs` (those with a local expert) or `slabs` (those within an expert's count).
        count: rows.
        topk_ids, expert_map, num_experts, num_local_experts: of pairs.
        expert_num_tokens, max_tokens: of slabs.
    """

    __slots__ = ("count", "kind", "max_tokens", "numbers", "pointers")

    def __init__(
        self,
        kind: str,
        count: int,
        *,
        topk_ids: torch.Tensor | None = None,
        expert_map: torch.Tensor | None = None,
        num_experts: int = 0,
        num_local_experts: int = 0,
        expert_num_tokens: torch.Tensor | None = None,
        max_tokens: int = 0,
    ) -> None:
        self.count = count
        # Rows of one slab follow each other at the row's stride; without slabs all of them do.
        self.max_tokens = max_tokens or max(count, 1)
        map_pointer, has_map = (None, 0) if topk_ids is None else map_arguments(topk_ids, expert_map)
        self.pointers = (topk_ids, map_pointer, has_map, expert_num_tokens)
        stride, top_k = (0, 1) if topk_ids is None else (topk_ids.stride(0), topk_ids.shape[1])
        self.numbers = (num_experts, num_local_experts, stride, top_k, self.max_tokens)
        self.kind = kind


def quantize_rows(
    x: torch.Tensor,
    dtype: torch.dtype,
    scale: ActivationScale,
    group: int = 0,
    static_scale: torch.Tensor | None = None,
    *,
    rows: Rows | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels on checked arguments.

    Args:
        x: [rows, K] or [slabs, rows, K], last dimension contiguous.
        dtype: float8_e4m3fn or int8.
        scale: what shares one.
        group: columns of a group.
        static_scale: [1] float32 of `ActivationScale.STATIC`.
        rows: which rows hold something; None takes all. The others are neither read nor written.

    Returns:
        values: of `dtype` and the shape of `x`, dense.
        scales: float32 [1] (static, tensor), [rows, 1] (token) or [rows, ceil(K / group)] (group); slabs' rows count
            through.
    """
    size = x.shape[-1]
    if rows is None:
        rows = Rows("tokens", x.numel() // max(size, 1))
    count = rows.count
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = min(1024, next_power_of_2(size))
    if scale is ActivationScale.GROUP:
        width, num_groups, given = group, cdiv(size, group), "dynamic"
        block = min(block, next_power_of_2(group))
        scales = torch.empty((count, num_groups), dtype=torch.float32, device=x.device)
    elif scale is ActivationScale.TOKEN:
        width, num_groups, given = size, 1, "dynamic"
        scales = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    else:
        width, num_groups = block, cdiv(size, block)
        if static_scale is None:
            given = "amax"
            static_scale = largest_magnitude(x, rows)
            scales = torch.empty(1, dtype=torch.float32, device=x.device)
        else:
            given, scales = "scale", static_scale.view(1)
    if count == 0:
        return values, scales
    block_rows = max(1, min(4, 4096 // block))
    path.launch(
        quantize_rows_kernel,
        (cdiv(count, block_rows), num_groups),
        x,
        values,
        scales,
        static_scale,
        *rows.pointers,
        count,
        size,
        width,
        *_strides(x, rows),
        *rows.numbers,
        ROWS=rows.kind,
        GIVEN=given,
        LARGEST=LARGEST[dtype],
        BLOCK_ROWS=block_rows,
        BLOCK=block,
        num_warps=4,
    )
    return values, scales


def _strides(x: torch.Tensor, rows: Rows) -> tuple[int, int]:
    """From one slab to the next and from one row to the next, also where dense slabs lie in one matrix."""
    if rows.kind != "slabs":
        return 0, x.stride(-2)  # one slab: a stride that no number of tokens changes
    return (x.stride(0) if x.ndim == 3 else rows.max_tokens * x.stride(0)), x.stride(-2)


def largest_magnitude(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Launch the kernel: the largest magnitude of the real rows of `x`, float32 [1]; 0 where there is none."""
    size = x.shape[-1]
    amax = torch.zeros(1, dtype=torch.float32, device=x.device)
    if rows.count == 0:
        return amax
    block = min(1024, next_power_of_2(size))
    block_rows = max(1, min(16, 4096 // block))
    path.launch(
        amax_kernel,
        (cdiv(rows.count, block_rows), cdiv(size, block)),
        x,
        amax.view(torch.int32),
        *rows.pointers,
        rows.count,
        size,
        *_strides(x, rows),
        *rows.numbers,
        ROWS=rows.kind,
        BLOCK_ROWS=block_rows,
        BLOCK=block,
        num_warps=4,
    )
    return amax

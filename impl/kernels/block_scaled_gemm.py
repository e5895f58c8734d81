"""Both GEMMs of fp8 with scales of blocks, on rows in the alignment's order.

The first one gathers rows by token, activates its sums and quantises what it stores, one group of columns a tile; the
second one reads both operands as tiles of the copy engine. A step spans one block of scales, so that they multiply a
step's product once for each row. Rounding points are those of the general kernels: gate and up and the activation's
result go through the storage dtype on their way to fp8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import path
from ..config import ActivationFunction
from ..quantization import LARGEST
from .activation import activated
from .descriptors import gate_up_tiles, row_tiles, weight_tiles
from .gated_gemm import GROUP, tile_at
from .pairs import routing_weight_ptrs
from .quantize import quantized, scale_of
from .sizes import cdiv
from .tile import bias_arguments, bias_of

_STORAGE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _gated_columns(
    x_ptr,
    offsets,
    x_scale_ptrs,
    w_desc,
    gate_scale_ptr,
    up_scale_ptr,
    bias_ptr,
    weight_ptrs,
    real,
    expert,
    column,
    size,
    K,
    stride_bias,
    alpha,
    limit,
    mul_weight,
    has_bias,
    EXTRAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORAGE: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Columns of h from `column` on, before they are quantised, of rows at `offsets`: [ROWS, COLUMNS] of STORAGE."""
    lane = tl.arange(0, BLOCK)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(tl.cdiv(K, BLOCK)):
        # Scales are asked for ahead of the products that they wait for.
        x_scale = tl.load(x_scale_ptrs + step)
        gate_scale = tl.load(gate_scale_ptr + step)
        up_scale = tl.load(up_scale_ptr + step)
        if EVEN_K:
            x = tl.load(x_ptr + offsets)
        else:
            x = tl.load(x_ptr + offsets, mask=(lane < K - step * BLOCK)[None, :], other=0.0)
        w = tl.reshape(w_desc.load([expert, column // GROUP, 0, 0, step * BLOCK]), (2 * COLUMNS, BLOCK))
        products = tl.reshape(tl.dot(x, w.T), (ROWS, COLUMNS // GROUP, 2, GROUP))
        gates, ups = tl.split(tl.permute(products, (0, 1, 3, 2)))
        gate += tl.reshape(gates, (ROWS, COLUMNS)) * (x_scale * gate_scale)[:, None]
        up += tl.reshape(ups, (ROWS, COLUMNS)) * (x_scale * up_scale)[:, None]
        x_ptr += BLOCK
    if EXTRAS:
        # Which of them there is, is a run-time value: as constants they would multiply the compiled variants.
        if mul_weight != 0:
            weight = tl.load(weight_ptrs, mask=real, other=0.0)[:, None]
            gate, up = gate * weight, up * weight
        if has_bias != 0:
            columns = column + tl.arange(0, COLUMNS)
            bias_at = expert.to(tl.int64) * stride_bias + columns
            gate += bias_of(bias_ptr, has_bias, bias_at, columns < size)[None, :]
            up += bias_of(bias_ptr, has_bias, bias_at + size, columns < size)[None, :]
    h = activated(gate.to(STORAGE).to(tl.float32), up.to(STORAGE).to(tl.float32), alpha, limit, ACTIVATION)
    return h.to(STORAGE)


@triton.jit
def _store_quantized(h_ptr, h, scale, slots, columns, size, LARGEST: tl.constexpr, EVEN_I: tl.constexpr):
    q = quantized(h.to(tl.float32), tl.broadcast_to(scale[:, None], h.shape), LARGEST)
    h_ptrs = h_ptr + slots.to(tl.int64)[:, None] * size + columns[None, :]
    if EVEN_I:
        tl.store(h_ptrs, q)
    else:
        tl.store(h_ptrs, q, mask=(columns < size)[None, :])


@triton.jit(
    do_not_specialize=[
        "num_pairs",
        "num_m_blocks",
        "stride_bias",
        "stride_weights",
        "top_k",
        "alpha",
        "limit",
        "mul_weight",
        "has_bias",
    ]
)
def scaled_gated_gemm_kernel(
    x_ptr,
    x_scale_ptr,
    w_desc,
    w_scale_ptr,
    h_ptr,
    h_scale_ptr,
    slots_ptr,
    expert_ids_ptr,
    bias_ptr,
    topk_weights_ptr,
    num_pairs,
    num_m_blocks,
    size,
    K,
    stride_x,
    stride_bias,
    stride_weights,
    top_k,
    alpha,
    limit,
    mul_weight,
    has_bias,
    EXTRAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORAGE: tl.constexpr,
    LARGEST: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE_X: tl.constexpr,
):
    """BLOCK_M slots and BLOCK columns of h, in fp8, with a scale for each row.

    EXTRAS: there may be routing weights on the input, or biases.
    """
    pid_m, pid_n = tile_at(tl.program_id(0), num_m_blocks, tl.cdiv(size, BLOCK), GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    expert = tl.load(expert_ids_ptr + pid_m)
    if expert < 0:
        return
    slots = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    pairs = tl.load(slots_ptr + slots)
    real = pairs < num_pairs
    # Padding computes a row that nobody reads: which one does not matter, and its load needs no mask.
    token = tl.where(real, pairs, 0) // top_k
    offsets = ((token.to(tl.int64) if WIDE_X else token) * stride_x)[:, None] + tl.arange(0, BLOCK)[None, :]
    num_steps, num_groups = tl.cdiv(K, BLOCK), tl.cdiv(size, BLOCK)
    # The grid of scales starts anew at the first up row.
    gate_scale_ptr = w_scale_ptr + (expert.to(tl.int64) * (2 * num_groups) + pid_n) * num_steps
    up_scale_ptr = gate_scale_ptr + num_groups * num_steps
    weight_ptrs = routing_weight_ptrs(topk_weights_ptr, stride_weights, pairs, top_k)
    # Registers hold the sums of half a group, and the other half as it is before it is quantised.
    HALF: tl.constexpr = BLOCK // 2  # pyright: ignore[reportAssignmentType]
    column = pid_n * BLOCK
    first = _gated_columns(
        x_ptr,
        offsets,
        x_scale_ptr + token.to(tl.int64) * num_steps,
        w_desc,
        gate_scale_ptr,
        up_scale_ptr,
        bias_ptr,
        weight_ptrs,
        real,
        expert,
        column,
        size,
        K,
        stride_bias,
        alpha,
        limit,
        mul_weight,
        has_bias,
        EXTRAS,
        BLOCK_M,
        HALF,
        BLOCK,
        ACTIVATION,
        STORAGE,
        EVEN_K,
    )
    second = _gated_columns(
        x_ptr,
        offsets,
        x_scale_ptr + token.to(tl.int64) * num_steps,
        w_desc,
        gate_scale_ptr,
        up_scale_ptr,
        bias_ptr,
        weight_ptrs,
        real,
        expert,
        column + HALF,
        size,
        K,
        stride_bias,
        alpha,
        limit,
        mul_weight,
        has_bias,
        EXTRAS,
        BLOCK_M,
        HALF,
        BLOCK,
        ACTIVATION,
        STORAGE,
        EVEN_K,
    )
    # Columns behind the end are sums of zeros, without a bias: they add nothing to a row's largest magnitude.
    largest = tl.max(tl.maximum(tl.abs(first.to(tl.float32)), tl.abs(second.to(tl.float32))), axis=1)
    scale = scale_of(largest, LARGEST)
    tl.store(h_scale_ptr + slots.to(tl.int64) * num_groups + pid_n, scale)
    columns = column + tl.arange(0, HALF)
    _store_quantized(h_ptr, first, scale, slots, columns, size, LARGEST, EVEN_I)
    _store_quantized(h_ptr, second, scale, slots, columns + HALF, size, LARGEST, EVEN_I)


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
def scaled_sorted_gemm_kernel(
    h_desc,
    h_scale_ptr,
    w_desc,
    w_scale_ptr,
    y_ptr,
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
    BLOCK: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """BLOCK_M slots and BLOCK columns of y, at the places of their pairs."""
    pid_m, pid_n = tile_at(tl.program_id(0), num_m_blocks, tl.cdiv(N, BLOCK), GROUP_M)  # pyright: ignore[reportGeneralTypeIssues]
    expert = tl.load(expert_ids_ptr + pid_m)
    if expert < 0:
        return
    slot = pid_m * BLOCK_M
    slots = slot + tl.arange(0, BLOCK_M)
    pairs = tl.load(slots_ptr + slots)
    real = pairs < num_pairs
    num_steps = tl.cdiv(K, BLOCK)
    h_scale_ptrs = h_scale_ptr + slots.to(tl.int64) * num_steps
    w_scale_ptr += (expert.to(tl.int64) * tl.cdiv(N, BLOCK) + pid_n) * num_steps
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for step in range(num_steps):
        h_scale = tl.load(h_scale_ptrs + step)
        w_scale = tl.load(w_scale_ptr + step)
        h = h_desc.load([slot, step * BLOCK])
        w = tl.reshape(w_desc.load([expert, pid_n * BLOCK, step * BLOCK]), (BLOCK, BLOCK))
        acc += tl.dot(h, w.T) * (h_scale * w_scale)[:, None]
    columns = pid_n * BLOCK + tl.arange(0, BLOCK)
    # Run-time values, which take a branch: as constants they would multiply the compiled variants.
    if has_bias != 0:
        bias_at = expert.to(tl.int64) * stride_bias + columns
        acc += bias_of(bias_ptr, has_bias, bias_at, columns < N)[None, :]
    if mul_weight != 0:
        weight_ptrs = routing_weight_ptrs(topk_weights_ptr, stride_weights, pairs, top_k)
        acc *= tl.load(weight_ptrs, mask=real, other=0.0)[:, None]
    y_ptrs = y_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
    mask = real[:, None] if EVEN_N else real[:, None] & (columns < N)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class ScaledTile:
    """One launch of a GEMM on sorted rows with scales of blocks, which give columns and steps their size.

    Attributes:
        block_size_m: slots a block, as the alignment pads them.
        group_size_m: row blocks that share a sweep over the weight rows.
        num_warps: warps a program.
        num_stages: steps in flight.
    """

    block_size_m: int
    group_size_m: int = 8
    num_warps: int = 8
    num_stages: int = 3


def scaled_gated_gemm(
    h: torch.Tensor,
    h_scale: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    bias: torch.Tensor | None,
    function: ActivationFunction,
    *,
    storage: torch.dtype,
    topk_weights: torch.Tensor,
    mul_weight: bool,
    slots: torch.Tensor,
    expert_ids: torch.Tensor,
    block_shape: tuple[int, int],
    tile: ScaledTile,
) -> None:
    """Launch the kernel on checked arguments.

    Args:
        h: [slots, I] fp8, dense.
        h_scale: [slots, ceil(I / b)] float32, dense.
        x: [M, H] fp8, rows contiguous.
        x_scale: [M, ceil(H / b)] float32, dense.
        w13: [E_local, 2I, H] fp8, gate rows first, rows contiguous, on 16 bytes.
        w13_scale: [E_local, 2 ceil(I / b), ceil(H / b)] float32, dense.
        bias: [E_local, 2I] or None.
        function: an activation with a gate.
        storage: dtype through which sums and the activation's result go.
        topk_weights: [M, top_k] float32.
        mul_weight: multiply them into the float32 accumulator.
        slots: the alignment's pairs for `tile.block_size_m`.
        expert_ids: the alignment's experts.
        block_shape: (b, b).
        tile: the tile choice.
    """
    block = block_shape[0]
    size, k = h.shape[1], x.shape[1]
    num_m_blocks = expert_ids.shape[0]
    bias_ptr, has_bias = (h_scale, 0) if bias is None else bias_arguments(bias, bias)
    path.launch(
        scaled_gated_gemm_kernel,
        (num_m_blocks * cdiv(size, block),),
        x,
        x_scale,
        gate_up_tiles(w13, block // 2, block, is_gated=True, interleaved=False, group=GROUP.value),
        w13_scale,
        h,
        h_scale,
        slots,
        expert_ids,
        bias_ptr,
        topk_weights,
        topk_weights.numel(),
        num_m_blocks,
        size,
        k,
        x.stride(0),
        0 if bias is None else bias.stride(0),
        topk_weights.stride(0),
        topk_weights.shape[1],
        function.alpha,
        function.limit,
        int(mul_weight),
        has_bias,
        EXTRAS=mul_weight or bias is not None,
        BLOCK_M=tile.block_size_m,
        BLOCK=block,
        GROUP_M=tile.group_size_m,
        ACTIVATION=str(function.kind),
        STORAGE=_STORAGE[storage],
        LARGEST=LARGEST[h.dtype],
        EVEN_I=size % block == 0,
        EVEN_K=k % block == 0,
        WIDE_X=x.shape[0] * x.stride(0) >= 2**31,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def scaled_sorted_gemm(
    y: torch.Tensor,
    h: torch.Tensor,
    h_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    topk_weights: torch.Tensor,
    mul_weight: bool,
    slots: torch.Tensor,
    expert_ids: torch.Tensor,
    block_shape: tuple[int, int],
    tile: ScaledTile,
) -> None:
    """Launch the kernel on checked arguments.

    Args:
        y: [M * top_k, H] of the storage dtype, dense.
        h: [slots, I] fp8, dense.
        h_scale: [slots, ceil(I / b)] float32, dense.
        w2: [E_local, H, I] fp8, rows contiguous, on 16 bytes.
        w2_scale: [E_local, ceil(H / b), ceil(I / b)] float32, dense.
        bias: [E_local, H] or None.
        topk_weights: [M, top_k] float32.
        mul_weight: multiply them into the float32 accumulator, behind the bias.
        slots: the alignment's pairs for `tile.block_size_m`.
        expert_ids: the alignment's experts.
        block_shape: (b, b).
        tile: the tile choice.
    """
    block = block_shape[0]
    n, k = y.shape[1], h.shape[1]
    num_m_blocks = expert_ids.shape[0]
    bias_ptr, has_bias = bias_arguments(bias, y)
    path.launch(
        scaled_sorted_gemm_kernel,
        (num_m_blocks * cdiv(n, block),),
        row_tiles(h, tile.block_size_m, block),
        h_scale,
        weight_tiles(w2, block, block),
        w2_scale,
        y,
        slots,
        expert_ids,
        bias_ptr,
        topk_weights,
        topk_weights.numel(),
        num_m_blocks,
        n,
        k,
        0 if bias is None else bias.stride(0),
        topk_weights.stride(0),
        topk_weights.shape[1],
        int(mul_weight),
        has_bias,
        BLOCK_M=tile.block_size_m,
        BLOCK=block,
        GROUP_M=tile.group_size_m,
        EVEN_N=n % block == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

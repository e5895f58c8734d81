"""What every grouped GEMM shares: which tile a program computes, and the product of a block of rows with weights.

Both functions are inlined; each kernel says which rows, which expert and where the result goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .. import path
from ..config import QuantScheme
from ..quantization import ActivationScale, ExpertsQuantization, WeightScale
from ..tuning.kernel_config import KernelConfig

# Hopper's tensor cores add fp8 products in about 14 bits (arXiv 2412.19437, section 3.3.2): after this many columns
# partial sums go to a float32 accumulator.
FP8_WINDOW = 128


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
def _across(row_values, SWAP_AB: tl.constexpr):
    """One value for each row of A, shaped to multiply the accumulator."""
    return row_values[None, :] if SWAP_AB else row_values[:, None]


@triton.jit
def _along(column_values, SWAP_AB: tl.constexpr):
    """One value for each row of B, shaped to multiply the accumulator."""
    return column_values[:, None] if SWAP_AB else column_values[None, :]


@triton.jit
def product_of_tile(
    a_ptr,
    a_rows,
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
):
    """Rows of A times BLOCK_N rows of one expert's weight, `[BLOCK_M, BLOCK_N]` float32, all scales applied.

    `a_rows` are 64-bit offsets from `a_ptr`, `a_index` the rows' numbers, and a row that is not `real` is not read.
    Offsets that grow with the experts or the tokens are 64-bit, and computed once.

    A_SCALE and B_SCALE are the values of `ActivationScale` and `WeightScale` (`none`: no scales). Scales of blocks and
    groups multiply the partial product of a step, which lies in one block; all others multiply the sum. B_FORMAT is
    `same` (A's dtype), `int8` (weights alone) or `int4`, whose bytes hold two columns. `part` is how many rows of B
    share one grid of blocks, and each of the grids has `ceil(part / SCALE_N)` rows of `scale_columns` scales.
    """
    lane_k = tl.arange(0, BLOCK_K)
    lane_n = tl.arange(0, BLOCK_N)
    columns = pid_n * BLOCK_N + lane_n
    inside = columns < N
    # Bytes of int4 hold two columns each.
    PACK: tl.constexpr = 2 if B_FORMAT == "int4" else 1  # pyright: ignore[reportAssignmentType]
    lane_b = tl.arange(0, BLOCK_K // PACK)
    # The weight tile starts at a 64-bit address; within it 32 bits reach, unless rows are enormous.
    b_tile_ptr = b_ptr + expert.to(tl.int64) * stride_be + (pid_n * BLOCK_N).to(tl.int64) * stride_bn
    b_rows = (lane_n.to(tl.int64) if WIDE_B else lane_n) * stride_bn

    IS_INTEGER: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    ACC: tl.constexpr = tl.int32 if IS_INTEGER else tl.float32  # pyright: ignore[reportAssignmentType]
    IS_STEPWISE: tl.constexpr = B_SCALE == "block" or B_SCALE == "group"
    # Tensor cores multiply bytes 32 columns at a time. A shorter step, as blocks of 16 columns want, is one of float16,
    # which holds e4m3 and int8 exactly.
    IS_WIDENED: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 8 and BLOCK_K < 32
    # A weight that is read rows first keeps its packed or scaled form until it is unpacked.
    ROWS_FIRST: tl.constexpr = SWAP_AB or B_FORMAT == "int4"
    # The loop advances two base addresses and keeps the offsets: a block of advancing pointers costs registers and a
    # quarter more instructions a step.
    if SWAP_AB:
        a_offsets = a_rows[None, :] + lane_k[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    else:
        a_offsets = a_rows[:, None] + lane_k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    b_offsets = b_rows[:, None] + lane_b[None, :] if ROWS_FIRST else b_rows[None, :] + lane_b[:, None]
    if IS_STEPWISE:
        # Where a tile's rows lie in one block, one scale serves them all.
        row = pid_n * BLOCK_N if ONE_SCALE else columns
        row_of_scale = row
        if SCALE_N > 0:
            grid = row // part
            row_of_scale = grid * tl.cdiv(part, SCALE_N) + (row - grid * part) // SCALE_N
        b_scale_ptrs = b_scale_ptr + (expert.to(tl.int64) * scale_rows + row_of_scale) * scale_columns
        a_scale_ptrs = a_scale_ptr + a_index.to(tl.int64) * scale_columns if A_SCALE == "group" else a_index
        zero_ptrs = columns
        if b_zero_ptr is not None:
            zero_ptrs = b_zero_ptr + (expert.to(tl.int64) * (N // 2) + columns // 2) * scale_columns

    for k in range(0, K, BLOCK_K):
        if SWAP_AB:
            a_mask = real[None, :] if EVEN_K else real[None, :] & (lane_k < K - k)[:, None]
        else:
            a_mask = real[:, None] if EVEN_K else real[:, None] & (lane_k < K - k)[None, :]
        a = tl.load(a_ptr + a_offsets, mask=a_mask, other=0.0)
        if EVEN_N and EVEN_K:
            b = tl.load(b_tile_ptr + b_offsets)
        elif ROWS_FIRST:
            b_mask = inside[:, None] if EVEN_K else inside[:, None] & (lane_b < (K - k) // PACK)[None, :]
            b = tl.load(b_tile_ptr + b_offsets, mask=b_mask, other=0.0)
        else:
            b_mask = inside[None, :] if EVEN_K else inside[None, :] & (lane_b < (K - k) // PACK)[:, None]
            b = tl.load(b_tile_ptr + b_offsets, mask=b_mask, other=0.0)

        if IS_STEPWISE:
            step = k // SCALE_K
            if ONE_SCALE:
                b_scale = tl.load(b_scale_ptrs + step)
            else:
                b_scale = tl.load(b_scale_ptrs + step, mask=inside, other=0.0).to(tl.float32)
        if B_FORMAT == "int4":
            if b_zero_ptr is None:
                zero = tl.full((BLOCK_N,), 8, tl.int8)
            else:
                zeros = tl.load(zero_ptrs + step, mask=inside, other=0)
                zero = ((zeros >> ((columns % 2) * 4).to(tl.uint8)) & 15).to(tl.int8)
            low = (b & 15).to(tl.int8) - zero[:, None]
            high = (b >> 4).to(tl.int8) - zero[:, None]
            b = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K)).to(a.dtype)
            if not SWAP_AB:
                b = tl.trans(b)
        elif B_FORMAT == "int8":
            b = b.to(a.dtype)
        if IS_WIDENED:
            a = a.to(tl.float16)
            b = b.to(tl.float16)

        if IS_STEPWISE:
            if SWAP_AB:
                product = tl.dot(b, a, input_precision=INPUT_PRECISION)
            else:
                product = tl.dot(a, b, input_precision=INPUT_PRECISION)
            if ONE_SCALE:
                a_scale = tl.load(a_scale_ptrs + step, mask=real, other=0.0)
                acc += product * _across(a_scale * b_scale, SWAP_AB)
            else:
                if A_SCALE == "group":
                    a_scale = tl.load(a_scale_ptrs + step, mask=real, other=0.0)
                    product *= _across(a_scale, SWAP_AB)
                acc += product * _along(b_scale, SWAP_AB)
        elif IS_WIDENED:
            acc += (tl.dot(b, a) if SWAP_AB else tl.dot(a, b)).to(ACC)
        elif SWAP_AB:
            acc = tl.dot(b, a, acc, input_precision=INPUT_PRECISION, max_num_imprecise_acc=WINDOW, out_dtype=ACC)
        else:
            acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION, max_num_imprecise_acc=WINDOW, out_dtype=ACC)
        a_ptr += BLOCK_K
        b_tile_ptr += BLOCK_K // PACK

    result = acc.to(tl.float32)
    if A_SCALE == "token":
        result *= _across(tl.load(a_scale_ptr + a_index, mask=real, other=0.0), SWAP_AB)
    elif A_SCALE == "tensor":
        result *= tl.load(a_scale_ptr)
    if B_SCALE == "channel":
        result *= _along(tl.load(b_scale_ptr + expert.to(tl.int64) * N + columns, mask=inside, other=0.0), SWAP_AB)
    elif B_SCALE == "tensor":
        result *= tl.load(b_scale_ptr + expert)
    return tl.trans(result) if SWAP_AB else result


# What lies behind the pointer to a bias: nothing that is read (0), the output's dtype, or float32.
_OF_OUTPUT, _WIDE = 1, 2


@triton.jit
def bias_of(bias_ptr, has_bias, offsets, inside):
    """Elements of a bias in float32; the pointer is of the output's dtype, whatever lies there."""
    if has_bias == 2:  # a number of this module would make a kernel's key depend on who was compiled before
        bias = tl.load(bias_ptr.to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0.0)
    else:
        bias = tl.load(bias_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return bias


def bias_arguments(bias: torch.Tensor | None, c: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`bias_ptr` and `has_bias` of a launch; the pointer is of one type, so that no bias makes another variant."""
    if bias is None:
        return c, 0
    if bias.dtype == c.dtype:
        return bias, _OF_OUTPUT
    return bias.view(c.dtype), _WIDE


@dataclass(frozen=True)
class GemmOperands:
    """The operands of one grouped GEMM, but for the rows' routing.

    Attributes:
        b: [E_local, N, K] (int4: [E_local, N, K / 2]), rows contiguous.
        n, k: of one expert's weight, unpacked.
        b_scale: the weight's scales, contiguous; None where there are none.
        b_zero: int4's zero points, or None.
        bias: [E_local, N], rows contiguous, or None.
        a_scale: of the rows of A, as `quantize_rows` returns them, or None.
        options: the constants that follow from the scheme.
        numbers: `scale_rows`, `scale_columns` and `part` of `product_of_tile`.
    """

    b: torch.Tensor
    n: int
    k: int
    b_scale: torch.Tensor | None
    b_zero: torch.Tensor | None
    bias: torch.Tensor | None
    a_scale: torch.Tensor | None
    options: dict[str, Any]
    numbers: tuple[int, int, int]


_PLAIN = {"A_SCALE": "none", "B_SCALE": "none", "B_FORMAT": "same", "SCALE_N": 0, "SCALE_K": 0, "WINDOW": 0}
_FORMATS = {QuantScheme.INT8_W8A16: "int8", QuantScheme.INT4_W4A16: "int4"}
# One value for the whole tensor is read alike, whoever chose it.
_A_SCALES = {ActivationScale.STATIC: "tensor"}


def gemm_operands(
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    quant: ExpertsQuantization | None = None,
    *,
    is_w13: bool = True,
    parts: int = 1,
    a_scale: torch.Tensor | None = None,
) -> GemmOperands:
    """The operands of the first (`is_w13`) or second GEMM of a layer.

    Args:
        b: the weight.
        bias: its bias.
        quant: how the layer's weights are stored.
        is_w13: which GEMM.
        parts: of b's rows, at each of which the grid of block scales starts anew.
        a_scale: of the activations, where they are quantised.
    """
    _, n, k = b.shape
    if quant is None:
        return GemmOperands(b, n, k, None, None, bias, None, _PLAIN, (0, 0, n))
    b_scale = quant.w13_scale if is_w13 else quant.w2_scale
    b_zero = quant.w13_zero_point if is_w13 else quant.w2_zero_point
    k *= 2 if quant.scheme is QuantScheme.INT4_W4A16 else 1
    stepwise = quant.weight_scale in (WeightScale.BLOCK, WeightScale.GROUP)
    scale_n, scale_k = quant.block_shape if stepwise and quant.block_shape is not None else (0, 0)
    options = {
        "A_SCALE": str(_A_SCALES.get(quant.activation_scale, quant.activation_scale)),
        "B_SCALE": str(quant.weight_scale),
        "B_FORMAT": _FORMATS.get(quant.scheme, "same"),
        "SCALE_N": scale_n,
        "SCALE_K": scale_k,
        "WINDOW": FP8_WINDOW if quant.scheme is QuantScheme.FP8_W8A8 and not stepwise else 0,
    }
    numbers = (b_scale.shape[1], b_scale.shape[2], n // parts) if stepwise else (0, 0, n)
    return GemmOperands(b, n, k, b_scale, b_zero, bias, a_scale, options, numbers)


def tile_options(operands: GemmOperands, config: KernelConfig, allow_tf32: bool) -> dict[str, Any]:
    """The constants and options of a launch; how often it promotes sums of fp8 goes on record.

    Args:
        operands: of the GEMM.
        config: the tile choice.
        allow_tf32: float32 operands may be rounded to TF32.
    """
    scale_n, part = operands.options["SCALE_N"], operands.numbers[2]
    options = {
        "EVEN_N": operands.n % config.block_size_n == 0,
        "EVEN_K": operands.k % config.block_size_k == 0,
        "WIDE_B": operands.b.stride(1) * config.block_size_n >= 2**31,
        "SWAP_AB": config.swap_ab,
        "INPUT_PRECISION": "tf32" if allow_tf32 else "ieee",
        **operands.options,
        "ONE_SCALE": scale_n > 0 and scale_n % config.block_size_n == 0 and part % config.block_size_n == 0,
        # A window is at most a step.
        "WINDOW": min(operands.options["WINDOW"], config.block_size_k),
        "BLOCK_M": config.block_size_m,
        "BLOCK_N": config.block_size_n,
        "BLOCK_K": config.block_size_k,
        "GROUP_M": config.group_size_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    path.note("promoted_every", options["WINDOW"])
    return options

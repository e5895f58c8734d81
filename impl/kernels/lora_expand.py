"""LoRA's second product, inside the GEMM whose result it is added to: `acc[row] += shrunk[row] @ B^T`.

The adapters of a block stand side by side as if they were one of their ranks' sum: more steps along K of the product
that the tile computes anyway, on the same accumulator. A row is zero in the columns of adapters that are not its own,
and the tables hold no number that is not finite, so what one adapter holds reaches no other's rows, and a row without
an adapter keeps its bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from ..tuning.kernel_config import KernelConfig
from .lora_shrink import MOST_RUNS, Shrunk

# Rows of a block that leave registers free: more columns of adapters are multiplied at once, and all runs are read so.
_FEW_ROWS = 32
# Elements of a tile that leave hardly any.
_FULL_TILE = 128 * 256


@triton.jit
def _summed_runs(s_ptrs, mask, num_runs, stride_runs, AT_ONCE: tl.constexpr):
    """The first product's rows, whose runs of columns are added up in their order."""
    shrunk = tl.load(s_ptrs, mask=mask, other=0.0)
    if num_runs > 1:
        if AT_ONCE > 1:
            for run in tl.static_range(1, AT_ONCE):  # pyright: ignore[reportGeneralTypeIssues]
                shrunk += tl.load(s_ptrs + run * stride_runs, mask=mask & (run < num_runs), other=0.0)
        else:
            for run in tl.range(1, num_runs, num_stages=1):
                shrunk += tl.load(s_ptrs + run * stride_runs, mask=mask, other=0.0)
    return shrunk


@triton.jit
def operands_of_adapters(
    first,
    slots,
    rows,
    list_ptr,
    count,
    shrunk_ptr,
    b_ptr,
    expert,
    pid_n,
    N,
    R,
    num_experts,
    num_listed,
    num_runs,
    stride_runs,
    part_rows,
    LISTED: tl.constexpr,
    LORA: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RUNS_AT_ONCE: tl.constexpr,
):
    """BLOCK_R columns of the block's adapters, from `first` on: [BLOCK_M, BLOCK_R] of shrunk, [BLOCK_N, BLOCK_R] of B.

    `slots` [BLOCK_M] are the rows', -1 for none. The block's `count` adapters are LISTED at `list_ptr`; else `list_ptr`
    is the slot of the only one.

    LORA says which part a column belongs to: `one` is one part in a tile, `halves` follow each other (a part has
    `part_rows` rows), `interleaved` alternate.
    """
    TILE_PARTS: tl.constexpr = 1 if LORA == "one" else PARTS  # pyright: ignore[reportAssignmentType]
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    width = TILE_PARTS * R
    lane_r = first + tl.arange(0, BLOCK_R)
    live = lane_r < count * width
    r = lane_r % R
    if LISTED:
        index = lane_r // width
        # Widths are multiples of 16: so many columns beside each other are of one adapter.
        slot = tl.max_constancy(tl.load(list_ptr + index, mask=index < num_listed, other=0), [16])
    else:
        slot = list_ptr + lane_r * 0
    if LORA == "one":
        part = (pid_n * BLOCK_N) // part_rows + lane_r * 0
    else:
        part = lane_r % width // R
    takes = (columns < N)[:, None] & live[None, :]
    if LORA == "halves":
        takes = takes & ((columns // part_rows)[:, None] == part[None, :])
    elif LORA == "interleaved":
        takes = takes & ((columns % 2)[:, None] == part[None, :])
    group = slot.to(tl.int64) * num_experts + expert
    b = tl.load(b_ptr + columns.to(tl.int64)[:, None] * R + (group * N * R + r)[None, :], mask=takes, other=0.0)
    mine = (slots[:, None] == slot[None, :]) & live[None, :]
    s_ptrs = shrunk_ptr + rows[:, None] * (PARTS * R) + (part * R + r)[None, :]
    return _summed_runs(s_ptrs, mine, num_runs, stride_runs, RUNS_AT_ONCE).to(b.dtype), b


@triton.jit
def add_adapters(
    acc,
    early_shrunk,
    early_b,
    slots,
    rows,
    list_ptr,
    count,
    shrunk_ptr,
    b_ptr,
    expert,
    pid_n,
    N,
    R,
    num_experts,
    num_listed,
    num_runs,
    stride_runs,
    part_rows,
    LISTED: tl.constexpr,
    LORA: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    SWAP_AB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RUNS_AT_ONCE: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] with every row's adapter added: the early operands', if any, then those from there on."""
    TILE_PARTS: tl.constexpr = 1 if LORA == "one" else PARTS  # pyright: ignore[reportAssignmentType]
    if SWAP_AB:
        acc = tl.trans(acc)
    start = 0
    if early_b is not None:
        start = BLOCK_R
        if count > 0:
            acc = _product(early_shrunk, early_b, acc, INPUT_PRECISION, SWAP_AB)
    for first in tl.range(start, count * TILE_PARTS * R, BLOCK_R):
        shrunk, b = operands_of_adapters(
            first,
            slots,
            rows,
            list_ptr,
            count,
            shrunk_ptr,
            b_ptr,
            expert,
            pid_n,
            N,
            R,
            num_experts,
            num_listed,
            num_runs,
            stride_runs,
            part_rows,
            LISTED,
            LORA,
            PARTS,
            BLOCK_N,
            BLOCK_R,
            RUNS_AT_ONCE,
        )
        acc = _product(shrunk, b, acc, INPUT_PRECISION, SWAP_AB)
    return tl.trans(acc) if SWAP_AB else acc


@triton.jit
def _product(shrunk, b, acc, INPUT_PRECISION: tl.constexpr, SWAP_AB: tl.constexpr):
    """acc + shrunk @ b^T; where the tile is swapped, acc and the result are transposed."""
    if SWAP_AB:
        acc = tl.dot(b, tl.trans(shrunk), acc, input_precision=INPUT_PRECISION)
    else:
        acc = tl.dot(shrunk, tl.trans(b), acc, input_precision=INPUT_PRECISION)
    return acc


# The launch arguments of a GEMM without adapters: constants, so that nothing of LoRA is compiled into it.
NO_ADAPTERS: tuple[Any, ...] = (None,) * 10
NO_LORA: dict[str, Any] = {"LORA": "none", "LORA_PARTS": 1, "LORA_BLOCK_R": 16, "LORA_RUNS": 1}


def adapter_arguments(shrunk: Shrunk | None, config: KernelConfig) -> tuple[Any, ...]:
    """The adapters' arguments of a GEMM's launch, from `lora_slots_ptr` to `lora_part_rows`.

    Raises:
        ValueError: blocks of another size than those whose adapters are listed.
    """
    if shrunk is None:
        return NO_ADAPTERS
    low_rank, rows = shrunk.low_rank, shrunk.rows
    if rows.lists is not None and rows.block_size != config.block_size_m:
        raise ValueError(f"config: expected block_size_m {rows.block_size}, as listed, got {config.block_size_m}")
    values = shrunk.values
    return (
        rows.lora_ids if rows.slots is None else rows.slots,
        rows.lists,
        values,
        low_rank.b,
        rows.num_slots,
        rows.num_listed,
        low_rank.width,
        values.shape[0],
        values.stride(0),
        low_rank.b.shape[2] // low_rank.num_parts,
    )


def adapter_options(shrunk: Shrunk | None, config: KernelConfig) -> dict[str, Any]:
    """The adapters' constants of a GEMM's launch."""
    if shrunk is None:
        return NO_LORA
    low_rank, block_n = shrunk.low_rank, config.block_size_n
    part_rows = low_rank.b.shape[2] // low_rank.num_parts
    if low_rank.num_parts == 1 or (not low_rank.interleaved and part_rows % block_n == 0):
        lora = "one"
    else:
        lora = "interleaved" if low_rank.interleaved else "halves"
    few, is_full = config.block_size_m <= _FEW_ROWS, config.block_size_m * block_n >= _FULL_TILE
    return {
        "LORA": lora,
        "LORA_PARTS": low_rank.num_parts,
        "LORA_BLOCK_R": 64 if few else 16 if is_full and shrunk.rows.kind == "slabs" else 32,
        "LORA_RUNS": MOST_RUNS if few else 1,
    }


def tile_with_adapters(config: KernelConfig, shrunk: Shrunk | None) -> KernelConfig:
    """The tile of a GEMM, whose float32 products are formed in registers that operands in flight do not leave free.

    A column's sum runs over K in the same order however many steps are in flight, so its bits stay what they are.
    """
    if shrunk is None or shrunk.low_rank.b.dtype.itemsize < 4 or config.num_stages == 1:
        return config
    return replace(config, num_stages=1)

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
from .lora_shrink import Shrunk

# Columns of adapters that are multiplied at once: of a pair alone, of a block's pairs, of lists, and of lists for the
# largest tiles, which have the threads for more.
_OF_PAIR, _OF_PAIRS, _OF_LISTS, _OF_LARGEST = 16, 32, 32, 64
_LARGEST_TILE = 128 * 256


@triton.jit
def add_adapters(
    acc,
    slots,
    listed,
    count,
    rows,
    shrunk_ptr,
    b_ptr,
    expert,
    pid_n,
    R,
    num_experts,
    num_runs,
    stride_runs,
    part_rows,
    first_row,
    b_rows,
    LISTED: tl.constexpr,
    LORA: tl.constexpr,
    PARTS: tl.constexpr,
    RUNS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    SWAP_AB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] with every row's adapter added; `slots` [BLOCK_M] are the rows', -1 for none.

    Where they are LISTED, the block has `count` adapters, whose slots are the first of `listed` [BLOCK_M]. Else each of
    its first `count` rows brings its own, whose RUNS at most are added up, and `listed` are the rows' too.

    LORA says which part a column belongs to: `one` is one part in a tile, `halves` follow each other (a part has
    `part_rows` rows), `interleaved` alternate. Of each expert's B there are the `b_rows` rows from `first_row` on, and
    other columns get nothing.
    """
    TILE_PARTS: tl.constexpr = 1 if LORA == "one" else PARTS  # pyright: ignore[reportAssignmentType]
    lane_m = tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    width = TILE_PARTS * R
    if SWAP_AB:
        acc = tl.trans(acc)
    # What lists name is asked for steps ahead; pairs have one step as a rule, and no shared memory to spare.
    STAGES: tl.constexpr = 3 if LISTED else 1  # pyright: ignore[reportAssignmentType]
    for first in tl.range(0, count * width, BLOCK_R, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        lane_r = first + tl.arange(0, BLOCK_R)
        index, r = lane_r // width, lane_r % R
        live = index < count
        # Widths are multiples of 16: so many columns beside each other are of one adapter.
        slot = tl.max_constancy(tl.gather(listed, tl.where(live, index, 0), 0), [16])
        if LISTED:
            mine = (slots[:, None] == slot[None, :]) & live[None, :]
        else:
            live = live & (slot >= 0)
            mine = (lane_m[:, None] == index[None, :]) & live[None, :]
        if LORA == "one":
            part = (pid_n * BLOCK_N) // part_rows + lane_r * 0
        else:
            part = lane_r % width // R
        takes = ((columns >= first_row) & (columns - first_row < b_rows))[:, None] & live[None, :]
        if LORA == "halves":
            takes = takes & ((columns // part_rows)[:, None] == part[None, :])
        elif LORA == "interleaved":
            takes = takes & ((columns % 2)[:, None] == part[None, :])
        group = slot.to(tl.int64) * num_experts + expert
        b_offsets = (columns - first_row).to(tl.int64)[:, None] * R + (group * b_rows * R + r)[None, :]
        b = tl.load(b_ptr + b_offsets, mask=takes, other=0.0)
        s_ptrs = shrunk_ptr + rows[:, None] * (PARTS * R) + (part * R + r)[None, :]
        shrunk = tl.load(s_ptrs, mask=mine, other=0.0)
        if not LISTED:
            for run in tl.static_range(1, RUNS):  # pyright: ignore[reportGeneralTypeIssues]
                shrunk += tl.load(s_ptrs + run * stride_runs, mask=mine & (run < num_runs), other=0.0)
            shrunk = shrunk.to(b.dtype)
        if SWAP_AB:
            acc = tl.dot(b, tl.trans(shrunk), acc, input_precision=INPUT_PRECISION)
        else:
            acc = tl.dot(shrunk, tl.trans(b), acc, input_precision=INPUT_PRECISION)
    return tl.trans(acc) if SWAP_AB else acc


# The launch arguments of a GEMM without adapters: constants, so that nothing of LoRA is compiled into it.
NO_ADAPTERS: tuple[Any, ...] = (None,) * 12
NO_LORA: dict[str, Any] = {"LORA": "none", "LORA_PARTS": 1, "LORA_BLOCK_R": 16, "LORA_LISTED": False, "LORA_RUNS": 1}


def adapter_arguments(shrunk: Shrunk | None, config: KernelConfig) -> tuple[Any, ...]:
    """The adapters' arguments of a GEMM's launch, from `lora_slots_ptr` to `lora_b_rows`.

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
        low_rank.num_rows // low_rank.num_parts,
        low_rank.first_row,
        low_rank.b.shape[2],
    )


def adapter_options(shrunk: Shrunk | None, config: KernelConfig) -> dict[str, Any]:
    """The adapters' constants of a GEMM's launch."""
    if shrunk is None:
        return NO_LORA
    low_rank, block_n = shrunk.low_rank, config.block_size_n
    part_rows = low_rank.num_rows // low_rank.num_parts
    if low_rank.num_parts == 1 or (not low_rank.interleaved and part_rows % block_n == 0):
        lora = "one"
    else:
        lora = "interleaved" if low_rank.interleaved else "halves"
    if shrunk.rows.lists is None:
        block_r = _OF_PAIR if shrunk.most_runs > 2 else _OF_PAIRS
    else:
        block_r = _OF_LARGEST if config.block_size_m * block_n >= _LARGEST_TILE else _OF_LISTS
    return {
        "LORA": lora,
        "LORA_PARTS": low_rank.num_parts,
        "LORA_BLOCK_R": block_r,
        "LORA_LISTED": shrunk.rows.lists is not None,
        "LORA_RUNS": shrunk.most_runs,
    }


def tile_with_adapters(config: KernelConfig, shrunk: Shrunk | None) -> KernelConfig:
    """The tile of a GEMM, whose float32 products are formed in registers that operands in flight do not leave free.

    A column's sum runs over K in the same order however many steps are in flight, so its bits stay what they are.
    """
    if shrunk is None or shrunk.low_rank.b.dtype.itemsize < 4 or config.num_stages == 1:
        return config
    return replace(config, num_stages=1)

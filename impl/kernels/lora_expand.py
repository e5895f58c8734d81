"""LoRA's second product, inside the GEMM whose result it is added to: `acc[row] += scale * shrunk[row] @ B^T`.

A block of rows walks over the adapters that its own rows have, the smallest slot first. Each is added under a mask of
its rows, so that what one adapter holds reaches no other's rows, and a row without an adapter keeps its bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from ..tuning.kernel_config import KernelConfig
from .lora_rows import NOBODY, next_slot
from .lora_shrink import Shrunk

# Columns of a rank that are multiplied at once.
_MOST_BLOCK_R = 32
# Registers of a thread that hold its part of the accumulator; what is added to it takes as many.
_MOST_ACCUMULATED = 64


@triton.jit
def _delta(
    shrunk_ptr,
    shrunk_rows,
    mine,
    stride_runs,
    num_runs,
    b_ptr,
    rank,
    columns,
    N,
    R,
    INPUT_PRECISION: tl.constexpr,
    SWAP_AB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The `mine` rows of shrunk times BLOCK_N rows of B, float32 [BLOCK_M, BLOCK_N], its operands in B's dtype."""
    if SWAP_AB:
        delta = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, rank, BLOCK_R, num_stages=1):
        lane_r = first + tl.arange(0, BLOCK_R)
        live = lane_r < rank
        s_ptrs = shrunk_ptr + shrunk_rows[:, None] + lane_r[None, :]
        mask = mine[:, None] & live[None, :]
        shrunk = tl.load(s_ptrs, mask=mask, other=0.0)
        for run in tl.range(1, num_runs, num_stages=1):
            shrunk += tl.load(s_ptrs + run * stride_runs, mask=mask, other=0.0)
        # Columns behind the rank hold what an earlier adapter left.
        b_mask = (columns < N)[:, None] & live[None, :]
        b = tl.load(b_ptr + columns.to(tl.int64)[:, None] * R + lane_r[None, :], mask=b_mask, other=0.0)
        if SWAP_AB:
            delta = tl.dot(b, tl.trans(shrunk.to(b.dtype)), delta, input_precision=INPUT_PRECISION)
        else:
            delta = tl.dot(shrunk.to(b.dtype), tl.trans(b), delta, input_precision=INPUT_PRECISION)
    return tl.trans(delta) if SWAP_AB else delta


@triton.jit
def add_adapters(
    acc,
    slots,
    rows,
    shrunk_ptr,
    b_ptr,
    rank_ptr,
    scale_ptr,
    expert,
    pid_n,
    N,
    R,
    num_experts,
    num_runs,
    stride_runs,
    part_rows,
    LORA: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    SWAP_AB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] with every row's adapter added; `slots` [BLOCK_M] as `slot_of_rows` gives them.

    LORA says which part a column belongs to: `one` is one part in a tile, `halves` follow each other (a part has
    `part_rows` rows), `interleaved` alternate.
    """
    TILE_PARTS: tl.constexpr = 1 if LORA == "one" else PARTS  # pyright: ignore[reportAssignmentType]
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = next_slot(slots, -1)
    while slot < NOBODY:
        mine = slots == slot
        group = slot.to(tl.int64) * num_experts + expert
        for j in tl.static_range(TILE_PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            part = (pid_n * BLOCK_N) // part_rows if LORA == "one" else j
            rank = tl.load(rank_ptr + group * PARTS + part)
            scale = tl.load(scale_ptr + group * PARTS + part)
            delta = scale * _delta(
                shrunk_ptr,
                rows * (PARTS * R) + part * R,
                mine,
                stride_runs,
                num_runs,
                b_ptr + group * N * R,
                rank,
                columns,
                N,
                R,
                INPUT_PRECISION,
                SWAP_AB,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
            )
            takes = mine[:, None] & (rank > 0)
            if LORA == "halves":
                takes = takes & (columns // part_rows == part)[None, :]
            elif LORA == "interleaved":
                takes = takes & (columns % 2 == part)[None, :]
            acc = tl.where(takes, acc + delta, acc)
        slot = next_slot(slots, slot)
    return acc


# The launch arguments of a GEMM without adapters: constants, so that nothing of LoRA is compiled into it.
NO_ADAPTERS: tuple[Any, ...] = (None,) * 10
NO_LORA: dict[str, Any] = {"LORA": "none", "LORA_PARTS": 1, "LORA_BLOCK_R": 16}


def adapter_arguments(shrunk: Shrunk | None) -> tuple[Any, ...]:
    """The adapters' arguments of a GEMM's launch, from `lora_ids_ptr` to `lora_part_rows`."""
    if shrunk is None:
        return NO_ADAPTERS
    low_rank, rows = shrunk.low_rank, shrunk.rows
    values = shrunk.values
    return (
        rows.lora_ids,
        values,
        low_rank.b,
        low_rank.ranks,
        low_rank.scales,
        low_rank.a.shape[0],
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
    return {"LORA": lora, "LORA_PARTS": low_rank.num_parts, "LORA_BLOCK_R": min(_MOST_BLOCK_R, low_rank.width)}


def tile_with_adapters(config: KernelConfig, shrunk: Shrunk | None) -> KernelConfig:
    """The tile of a GEMM: with adapters of fewer columns, where two accumulators would not fit into registers.

    A column's sum runs over K in the same order whatever stands beside it and however many steps are in flight, so its
    bits stay what they are.
    """
    if shrunk is None:
        return config
    block_n, num_stages = config.block_size_n, config.num_stages
    while config.block_size_m * block_n > _MOST_ACCUMULATED * 32 * config.num_warps:
        block_n //= 2
    if shrunk.low_rank.b.dtype.itemsize == 4:
        # Products of float32 are formed in registers, which operands in flight do not leave free.
        num_stages = 1
    if (block_n, num_stages) == (config.block_size_n, config.num_stages):
        return config
    return replace(config, block_size_n=block_n, num_stages=num_stages)

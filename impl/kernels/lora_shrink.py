"""LoRA's first product: each row with an adapter times the A of its adapter and expert, in float32.

`shrunk[s, row] = scale * x[row] @ A[slot, expert]^T` over the s-th run of columns. Few rows have runs, which are added
up where they are read; many have one, rounded to the activations' dtype. Rows without an adapter are neither read nor
written; columns behind a rank are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .. import path
from ..lora.sharded import Summed
from ..lora.table import StackedLowRank
from ..platform import Platform, Vendor
from .lora_rows import AdapterRows, known_slot, list_adapters, next_slot
from .pairs import local_expert, map_arguments
from .sizes import cdiv, next_power_of_2
from .slabs import tokens_of_slab


@triton.jit(
    do_not_specialize=[
        "num_slots",
        "num_listed",
        "num_experts",
        "num_local_experts",
        "has_expert_map",
        "stride_topk_ids",
        "num_pairs",
        "max_tokens",
        "x_top_k",
        "top_k",
        "num_sharers",
        "blocks_of_a_run",
    ],
    do_not_specialize_on_alignment=["lora_ids_ptr"],
)
def lora_shrink_kernel(
    x_ptr,
    a_ptr,
    rank_ptr,
    scale_ptr,
    out_ptr,
    lora_ids_ptr,
    slots_ptr,
    lists_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    expert_num_tokens_ptr,
    expert_map_ptr,
    has_expert_map,
    num_pairs,
    K,
    R,
    num_slots,
    num_listed,
    num_experts,
    num_local_experts,
    num_sharers,
    blocks_of_a_run,
    stride_out,
    stride_x_slab,
    stride_xm,
    stride_topk_ids,
    max_tokens,
    x_top_k,
    top_k,
    ROWS: tl.constexpr,
    MAKE_LISTS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of one run for the rows of one block whose adapters are this program's.

    ROWS says what a block is: one of `pairs` alone, where `expert_ids` are the pairs'; of `aligned` blocks and those of
    `slabs` `num_sharers` programs share the adapters by their slots. A program gathers the rows of one slot after the
    other and takes BLOCK_ROWS at a time; without a slot it returns after one load. MAKE_LISTS: the lists are not there
    yet, and this is who makes them.
    """
    pid = tl.program_id(0)
    run = tl.program_id(1)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_ROWS)
    lane_m = tl.arange(0, BLOCK_M)
    if ROWS == "pairs":
        slot = known_slot(tl.load(lora_ids_ptr + pid // top_k), num_slots)
        expert = local_expert(
            expert_ids_ptr,
            stride_topk_ids,
            pid,
            pid < num_pairs,
            expert_map_ptr,
            num_experts,
            num_local_experts,
            top_k,
            has_expert_map,
        )
        if (expert < 0) | (slot < 0):
            return
    else:
        block = pid // num_sharers
        sharer = pid % num_sharers
        # All that needs no other answer is asked for at once.
        if ROWS == "aligned":
            expert = tl.load(expert_ids_ptr + block)
            rows = tl.load(sorted_token_ids_ptr + block.to(tl.int64) * BLOCK_M + lane_m)
        else:
            blocks_of_a_slab = tl.cdiv(max_tokens, BLOCK_M)
            expert = block // blocks_of_a_slab
            rows = block % blocks_of_a_slab * BLOCK_M + lane_m
        if MAKE_LISTS:
            if ROWS == "aligned":
                # Blocks behind the rows in use are padding.
                real = rows < num_pairs
                token = (rows // top_k).to(tl.int64)
            else:
                real = rows < tokens_of_slab(expert_num_tokens_ptr, expert, max_tokens)
                token = expert.to(tl.int64) * max_tokens + rows
            slots = known_slot(tl.load(lora_ids_ptr + token, mask=real, other=-1), num_slots)
            if (sharer == 0) & (run == 0) & (tl.program_id(2) == 0):
                list_adapters(slots, slots_ptr, lists_ptr, block, num_slots, num_listed, BLOCK_M)
        else:
            slots = tl.load(slots_ptr + block.to(tl.int64) * BLOCK_M + lane_m)
        shared = tl.where(slots % num_sharers == sharer, slots, -1)
        slot = next_slot(shared, -1)

    inside_n = n < PARTS * R
    lane_k = tl.arange(0, BLOCK_K)
    first_k = run * blocks_of_a_run * BLOCK_K
    end_k = tl.minimum(first_k + blocks_of_a_run * BLOCK_K, K)
    first = 0
    while slot >= 0:
        if ROWS == "pairs":
            row = tl.where(lane == 0, pid, 0)
            some = lane == 0
            slot_of_next = slot * 0 - 1
        else:
            # The row that stands at each place of this round.
            mine = shared == slot
            count = tl.sum(mine.to(tl.int32), axis=0)
            place = tl.cumsum(mine.to(tl.int32), 0) - 1
            here = mine[None, :] & (place[None, :] == (first + lane)[:, None])
            row = tl.sum(tl.where(here, rows[None, :], 0), axis=1)
            some = first + lane < count
            is_last = first + BLOCK_ROWS >= count
            slot_of_next = tl.where(is_last, next_slot(shared, slot), slot)
            first = tl.where(is_last, 0, first + BLOCK_ROWS)
        if ROWS == "slabs":
            x_rows = expert.to(tl.int64) * stride_x_slab + row.to(tl.int64) * stride_xm
            out_rows = expert.to(tl.int64) * max_tokens + row
        else:
            x_rows = (row // x_top_k).to(tl.int64) * stride_xm
            out_rows = row.to(tl.int64)
        group = slot.to(tl.int64) * num_local_experts + expert
        rank = tl.load(rank_ptr + group * PARTS + n // R, mask=inside_n, other=0)
        scale = tl.load(scale_ptr + group * PARTS + n // R, mask=inside_n, other=0.0)
        a_rows = a_ptr + (group * (PARTS * R) + n)[:, None] * K + lane_k[None, :]
        x_ptrs = x_ptr + x_rows[:, None] + lane_k[None, :]
        acc = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
        for k in range(first_k, end_k, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_ptrs + k, mask=some[:, None], other=0.0)
                a = tl.load(a_rows + k, mask=inside_n[:, None], other=0.0)
            else:
                inside = (lane_k < end_k - k)[None, :]
                x = tl.load(x_ptrs + k, mask=some[:, None] & inside, other=0.0)
                a = tl.load(a_rows + k, mask=inside_n[:, None] & inside, other=0.0)
            acc = tl.dot(x, tl.trans(a), acc, input_precision=INPUT_PRECISION)
        # A part's columns behind its rank are of nobody: the slot may hold an earlier adapter's there.
        acc = tl.where((n % R < rank)[None, :], acc * scale[None, :], 0.0)
        out_ptrs = out_ptr + run.to(tl.int64) * stride_out + out_rows[:, None] * (PARTS * R) + n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=some[:, None] & inside_n[None, :])
        slot = slot_of_next


@dataclass(frozen=True, eq=False)
class Shrunk:
    """What the first product left: `values [runs, num_rows, parts * R]`, to be added up over the runs.

    Float32 where pairs ask for their slot themselves, else one run in the activations' dtype. `most_runs` is at least
    the number of runs, and one of few.
    """

    values: torch.Tensor
    low_rank: StackedLowRank
    rows: AdapterRows
    most_runs: int


# Runs of columns, which are added up where they are read, up to so many pairs: programs that keep a device busy.
_MOST_RUNS = ((32, 8), (264, 2))
# Programs that share blocks: as many as an H200 holds at once, but some for each block. More would wait for others to
# come and go where few rows have adapters.
_MOST_PROGRAMS, _LEAST_SHARERS = 132 * 6, 4
# Columns that one program takes at least: fewer would be launched faster than they are read.
_LEAST_RUN = 256
_ROWS = 16
# Under the interpreter blocks have 16 rows, and should take several rounds.
_ROWS_INTERPRETED = 8
# Programs stream A: four of them on a multiprocessor, which the compiler left alone would not leave room for. Of those
# of large blocks, most of which only come and go where few rows have adapters, there is room for six.
_FEW_REGISTERS: dict[str, Any] = {"maxnreg": 128}
_FEWER_REGISTERS: dict[str, Any] = {"maxnreg": 80}
_LARGE_BLOCK = 128


def lora_shrink(
    x: torch.Tensor,
    low_rank: StackedLowRank,
    rows: AdapterRows,
    platform: Platform,
    *,
    make_lists: bool,
    allow_tf32: bool,
) -> Shrunk:
    """Launch the kernel on checked arguments.

    Args:
        x: [M, K] or [M * top_k, K], or [E_local, max_tokens, K]; rows contiguous, in the adapters' dtype.
        low_rank: the projection.
        rows: of the call.
        platform: where it runs.
        make_lists: this is the call's first product, which lists the adapters of blocks.
        allow_tf32: float32 operands may be rounded to TF32.
    """
    k, parts, width = x.shape[-1], low_rank.num_parts, low_rank.width_of_a
    on_cpu = platform.vendor is Vendor.CPU
    is_large = rows.kind != "pairs" and rows.block_size >= _LARGE_BLOCK
    block_k = 32 if on_cpu or x.dtype.itemsize == 4 else 64 if is_large else 128
    # A matrix instruction takes 16 columns at least.
    block_n = max(16, min(64, next_power_of_2(parts * width)))
    num_n = cdiv(parts * width, block_n)
    strides = (x.stride(0), x.stride(1)) if rows.kind == "slabs" else (0, x.stride(0))
    if rows.topk_ids is not None:
        blocks, sharers, experts_of = rows.num_rows, 1, rows.topk_ids
        most_runs = next((runs for pairs, runs in _MOST_RUNS if rows.num_rows <= pairs), 1)
        runs = max(1, min(most_runs, k // (block_k if on_cpu else _LEAST_RUN)))
        of_a_run = cdiv(cdiv(k, runs), block_k)
        dtype, stride_topk_ids = torch.float32, rows.topk_ids.stride(0)
    else:
        sharers = 2 if on_cpu else max(_LEAST_SHARERS, _MOST_PROGRAMS // max(1, rows.num_blocks))
        sharers = min(rows.num_listed, sharers)
        blocks, experts_of = rows.num_blocks * sharers, rows.expert_ids
        most_runs, of_a_run, dtype, stride_topk_ids = 1, cdiv(k, block_k), x.dtype, 0
        if isinstance(low_rank.between, Summed):
            dtype = torch.float32  # a part of a sum, which is rounded once it is whole
    runs = cdiv(k, of_a_run * block_k)
    few_registers = _FEWER_REGISTERS if is_large else _FEW_REGISTERS
    values = torch.empty((runs, rows.num_rows, parts * width), dtype=dtype, device=x.device)
    path.launch(
        lora_shrink_kernel,
        (blocks, runs, num_n),
        x,
        low_rank.a,
        low_rank.ranks,
        low_rank.scales,
        values,
        rows.lora_ids,
        rows.slots,
        rows.lists,
        rows.sorted_token_ids,
        experts_of,
        rows.expert_num_tokens,
        *map_arguments(rows.lora_ids, rows.expert_map),
        rows.num_rows,
        k,
        width,
        rows.num_slots,
        rows.num_listed,
        rows.num_experts,
        rows.num_local_experts,
        sharers,
        of_a_run,
        values.stride(0),
        *strides,
        stride_topk_ids,
        rows.max_tokens,
        1 if rows.kind == "slabs" else rows.num_rows // max(1, x.shape[0]),
        rows.top_k,
        ROWS=rows.kind,
        MAKE_LISTS=make_lists and rows.lists is not None,
        PARTS=parts,
        EVEN_K=k % block_k == 0,
        INPUT_PRECISION="tf32" if allow_tf32 else "ieee",
        BLOCK_M=16 if rows.kind == "pairs" else rows.block_size,
        BLOCK_ROWS=_ROWS_INTERPRETED if on_cpu else _ROWS,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=6 if is_large else 4,
        **(few_registers if platform.vendor is Vendor.NVIDIA and block_n <= 32 and x.dtype.itemsize == 2 else {}),
    )
    return _between_ranks(Shrunk(values, low_rank, rows, most_runs), x.dtype)


def _between_ranks(shrunk: Shrunk, storage: torch.dtype) -> Shrunk:
    """The product as B takes it, where A lies on several ranks."""
    between, values = shrunk.low_rank.between, shrunk.values
    if between is None:
        return shrunk
    product = between.whole(values[0] if len(values) == 1 else values.sum(dim=0), shrunk.low_rank.num_parts)
    product = product if shrunk.rows.lists is None else product.to(storage)
    return Shrunk(product[None], shrunk.low_rank, shrunk.rows, 1)

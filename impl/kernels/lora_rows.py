"""Which rows have which adapter, for both GEMMs and for LoRA's own kernel.

Where few pairs meet in a group of adapter and expert, every pair is its own: nothing is prepared. Else a block of rows
lists its adapters once a call, so that whoever works on the block reads each adapter once, and knows with one load
whether there are any. The first kernel that asks makes the lists, for itself and for those behind it: a launch of its
own for them would be what a batch without adapters pays most for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ..lora.table import StackedLowRank
from .sizes import cdiv


@triton.jit
def known_slot(lora_id, num_slots):
    """The slot that an id names, int32; -1 for none.

    An id outside [0, num_slots) is no adapter: a stray id costs its own contribution and never an address.
    """
    return tl.where((lora_id >= 0) & (lora_id < num_slots), lora_id, -1)


@triton.jit
def adapters_of_block(lists_ptr, block, num_listed, BLOCK_M: tl.constexpr):
    """How many adapters the rows of a block have, and their slots [BLOCK_M], ascending; behind them stands anything.

    No load waits for the other: there is memory for `num_listed` slots whatever their number.
    """
    first = lists_ptr + block.to(tl.int64) * (1 + num_listed)
    place = tl.arange(0, BLOCK_M)
    return tl.load(first), tl.load(first + 1 + place, mask=place < num_listed, other=0)


@triton.jit
def list_adapters(slots, slots_ptr, lists_ptr, block, num_slots, num_listed, BLOCK_M: tl.constexpr):
    """Store a block's `slots` [BLOCK_M] and their ascending list, for the kernels behind."""
    lane = tl.arange(0, BLOCK_M)
    first = lists_ptr + block.to(tl.int64) * (1 + num_listed)
    count = 0
    # A block without adapters is told by one reduction.
    if tl.max(slots, axis=0) >= 0:
        for start in range(0, num_slots, 16):
            here = start + tl.arange(0, 16)
            present = tl.max((slots[None, :] == here[:, None]).to(tl.int32), axis=1)
            place = count + tl.cumsum(present, 0) - 1
            tl.store(first + 1 + place, here, mask=present > 0)
            count += tl.sum(present, axis=0)
    tl.store(slots_ptr + block.to(tl.int64) * BLOCK_M + lane, slots)
    tl.store(first, count)


@triton.jit
def next_slot(slots, last):
    """The least of a block's `slots` above `last`; -1 for none."""
    NONE: tl.constexpr = 2147483647  # pyright: ignore[reportAssignmentType]
    least = tl.min(tl.where(slots > last, slots, NONE), axis=0)
    return tl.where(least == NONE, -1, least)


@dataclass(frozen=True, eq=False)
class AdapterRows:
    """The rows of one call, and the adapter of each; made once, handed to every LoRA kernel.

    Attributes:
        kind: `pairs` ask for their slot themselves; blocks of the alignment (`aligned`) and of the batched format
            (`slabs`) list theirs.
        num_rows: pairs, or E_local * max_tokens.
        num_local_experts: E_local.
        num_slots: of the table.
        lora_ids: int32, `[M]` or `[E_local * max_tokens]`, contiguous.
        top_k: pairs of a token; 1 for slabs.
        block_size: rows of a block.
        num_blocks: of lists; 0 without.
        topk_ids: `[M, top_k]` of pairs.
        expert_map: of pairs, or None.
        num_experts: ids that pairs may name, E.
        sorted_token_ids, expert_ids: the alignment.
        expert_num_tokens: `[E_local]` int32 of slabs.
        slots: `[num_blocks * block_size]` int32, each row's slot or -1, once the first shrink wrote them; None where
            pairs ask.
        lists: `[num_blocks, 1 + num_listed]` int32: how many adapters a block has, then their slots; likewise.
    """

    kind: str
    num_rows: int
    num_local_experts: int
    num_slots: int
    lora_ids: torch.Tensor
    top_k: int
    block_size: int
    num_blocks: int = 0
    topk_ids: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    num_experts: int = 0
    sorted_token_ids: torch.Tensor | None = None
    expert_ids: torch.Tensor | None = None
    expert_num_tokens: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    lists: torch.Tensor | None = None

    @property
    def max_tokens(self) -> int:
        """Rows of a slab."""
        return self.num_rows // self.num_local_experts

    @property
    def num_listed(self) -> int:
        """The most adapters that a block can have."""
        return min(self.num_slots, self.block_size)


# Up to this many rows a block, and columns a part, pairs may ask for themselves: each reads its adapter anew.
_FEW_ROWS, _FEW_COLUMNS = 32, 32


def adapters_of_pairs(
    lora_ids: torch.Tensor,
    low_rank: StackedLowRank,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    sorted_token_ids: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    block_size: int,
) -> AdapterRows:
    """Of the standard format, whose alignment is None where blocks are naive; `low_rank` is either projection."""
    num_pairs, top_k = topk_ids.numel(), topk_ids.shape[1]
    num_slots, num_local_experts = low_rank.a.shape[:2]
    sizes = (num_pairs, num_local_experts, num_slots, lora_ids, top_k, block_size)
    few = block_size <= _FEW_ROWS and low_rank.width <= _FEW_COLUMNS and num_pairs <= num_slots * num_local_experts
    if sorted_token_ids is None or expert_ids is None or few:
        return AdapterRows("pairs", *sizes, topk_ids=topk_ids, expert_map=expert_map, num_experts=num_experts)
    alignment = {"sorted_token_ids": sorted_token_ids, "expert_ids": expert_ids}
    return _listed(AdapterRows("aligned", *sizes, expert_ids.shape[0], **alignment))


def adapters_of_slabs(
    lora_ids: torch.Tensor,
    low_rank: StackedLowRank,
    expert_num_tokens: torch.Tensor,
    max_tokens: int,
    block_size: int,
) -> AdapterRows:
    """Of the batched format; `low_rank` likewise."""
    num_slots, num_experts = low_rank.a.shape[:2]
    num_blocks = num_experts * cdiv(max_tokens, block_size)
    sizes = (num_experts * max_tokens, num_experts, num_slots, lora_ids, 1, block_size, num_blocks)
    return _listed(AdapterRows("slabs", *sizes, expert_num_tokens=expert_num_tokens))


def _listed(rows: AdapterRows) -> AdapterRows:
    """The rows with room for the slots and lists of their blocks."""
    like = rows.lora_ids
    slots = like.new_empty(rows.num_blocks * rows.block_size)
    return replace(rows, slots=slots, lists=like.new_empty(rows.num_blocks, 1 + rows.num_listed))

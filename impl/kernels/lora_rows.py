"""Which rows have an adapter. Both LoRA kernels ask here, so both agree on what is added where."""

from __future__ import annotations

import triton
import triton.language as tl

# Beyond every slot.
NOBODY = tl.constexpr(1 << 30)


@triton.jit
def slot_of_rows(lora_ids_ptr, index, real, rank_ptr, expert, num_slots, num_experts, PARTS: tl.constexpr):
    """The slot of each row's adapter, int32; -1 where it has none, or one that adds nothing to this expert.

    An id outside [0, num_slots) is no adapter: a stray id costs its own contribution and never an address.
    """
    slot = tl.load(lora_ids_ptr + index, mask=real, other=-1)
    known = (slot >= 0) & (slot < num_slots)
    ranks = rank_ptr + (slot.to(tl.int64) * num_experts + expert) * PARTS
    rank = tl.load(ranks, mask=known, other=0)
    if PARTS == 2:
        rank = tl.maximum(rank, tl.load(ranks + 1, mask=known, other=0))
    return tl.where(rank > 0, slot, -1)


@triton.jit
def next_slot(slots, last):
    """The smallest of the rows' slots after `last`, NOBODY where there is none."""
    return tl.min(tl.where(slots > last, slots, NOBODY), axis=0)

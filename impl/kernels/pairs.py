"""Which expert of this rank a routed pair goes to. Every kernel asks here, so all agree on which pairs exist.

A pair is one (token, choice): pair p is token p // top_k and its choice p % top_k.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def local_expert(
    topk_ids_ptr,
    stride_topk_ids,
    pair,
    mask,
    expert_map_ptr,
    num_experts,
    num_local_experts,
    top_k,
    HAS_EXPERT_MAP: tl.constexpr,
):
    """The local expert of `pair` (a number or a block of them), int32; -1 where it has none on this rank.

    `top_k` is a run-time value: as a constant it would multiply the compiled variants. The map is a constant: a branch
    here would keep the loads around it from being in flight together.

    An id outside [0, num_experts) is no expert, and so is a mapped id outside [0, num_local_experts): a stray id costs
    its own contribution and never an address.
    """
    row = (pair // top_k).to(tl.int64)
    expert = tl.load(topk_ids_ptr + row * stride_topk_ids + pair % top_k, mask=mask, other=-1)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, -1).to(tl.int32)
    if HAS_EXPERT_MAP:
        local = tl.load(expert_map_ptr + expert, mask=expert >= 0, other=-1).to(tl.int32)
        expert = tl.where((local >= 0) & (local < num_local_experts), local, -1)
    return expert

"""Which expert of this rank a routed pair goes to. Every kernel asks here, so all agree on which pairs exist.

A pair is one (token, choice): pair p is token p // top_k and its choice p % top_k. Its routing weight lies there.
"""

from __future__ import annotations

import torch
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
    has_expert_map,
):
    """The local expert of `pair` (a number or a block of them), int32; -1 where it has none on this rank.

    `top_k` and whether there is a map are run-time values: as constants they would multiply the compiled variants. No
    branch on the map, which would keep the loads around it from being in flight together, but a mask: where there is
    none, its pointer is another and nothing is loaded.

    An id outside [0, num_experts) is no expert, and so is a mapped id outside [0, num_local_experts): a stray id costs
    its own contribution and never an address.
    """
    row = (pair // top_k).to(tl.int64)
    expert = tl.load(topk_ids_ptr + row * stride_topk_ids + pair % top_k, mask=mask, other=-1)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, -1).to(tl.int32)
    mapped = (expert >= 0) & (has_expert_map != 0)
    local = tl.load(expert_map_ptr + expert, mask=mapped, other=-1).to(tl.int32)
    local = tl.where((local >= 0) & (local < num_local_experts), local, -1)
    return tl.where(has_expert_map != 0, local, expert)


@triton.jit
def routing_weight_ptrs(topk_weights_ptr, stride_weights, pairs, top_k):
    """Where the routing weights of a block of pairs lie."""
    return topk_weights_ptr + (pairs // top_k).to(tl.int64) * stride_weights + pairs % top_k


def map_arguments(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """`expert_map_ptr` and `has_expert_map` of a launch: without a map any pointer will do, and one of ids is there."""
    return (topk_ids, 0) if expert_map is None else (expert_map, 1)

"""What an alignment of routed pairs to blocks must say, written as the definition and not as an algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import to_local_ids


def pairs_of_each_expert(topk_ids: Tensor, num_local_experts: int, expert_map: Tensor | None = None) -> list[Tensor]:
    """For each local expert, the flat indices (token * top_k + slot) of the pairs routed to it, ascending.

    Args:
        topk_ids: `[M, top_k]`, global ids; -1 means no expert.
        num_local_experts: how many experts' weights are held here.
        expert_map: `[E]`, global to local id, -1 = on another rank.
    """
    local_ids = to_local_ids(topk_ids, expert_map).flatten()
    return [torch.nonzero(local_ids == expert).flatten() for expert in range(num_local_experts)]


def padded_count(pairs: list[Tensor], block_size: int) -> int:
    """Rows after each expert's pairs are padded to whole blocks."""
    return sum(-(-len(p) // block_size) * block_size for p in pairs)

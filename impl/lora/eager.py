"""What adapters add to a product, in plain torch: float32, with the Triton kernels' one rounding between A and B."""

from __future__ import annotations

import torch

from .table import StackedLowRank


def add_adapters_with_torch(
    product: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, low_rank: StackedLowRank, expert: int
) -> None:
    """Add each row's adapter in place.

    Args:
        product: [P, N] float32.
        rows: [P, K] that were multiplied, before they were quantised.
        slots: [P], of each row's adapter, -1 for none.
        low_rank: the projection.
        expert: local.
    """
    for slot in slots.unique().tolist():
        if not 0 <= slot < low_rank.a.shape[0]:
            continue
        mine = (slots == slot).nonzero()[:, 0]
        for part, rank in enumerate(low_rank.ranks[slot, expert].tolist()):
            if not rank:
                continue
            start = part * low_rank.width
            a = low_rank.a[slot, expert, start : start + rank].float()
            b = low_rank.b[slot, expert, low_rank.rows_of(part), :rank].float()
            shrunk = (rows[mine].float() @ a.T).to(rows.dtype).float()
            columns = torch.arange(product.shape[1], device=product.device)[low_rank.rows_of(part)]
            product[mine[:, None], columns] += low_rank.scales[slot, expert, part] * (shrunk @ b.T)

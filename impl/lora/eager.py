"""What adapters add to a product, in plain torch: float32, with the Triton kernels' one rounding between A and B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .table import StackedLowRank

Runs = Sequence[tuple[int, slice]]
"""Local experts, each with its rows, which stand together."""


def _rows_of_slots(slots: torch.Tensor, low_rank: StackedLowRank) -> Iterator[tuple[int, torch.Tensor]]:
    """Every slot that some row has, with the rows."""
    for slot in slots.unique().tolist():
        if 0 <= slot < low_rank.a.shape[0]:
            yield slot, (slots == slot).nonzero()[:, 0]


def shrink_with_torch(rows: torch.Tensor, slots: torch.Tensor, runs: Runs, low_rank: StackedLowRank) -> torch.Tensor:
    """Each row times the A of its adapter and expert, without its scale, rounded to the rows' dtype.

    Args:
        rows: [P, K] that are multiplied, before they are quantised.
        slots: [P], of each row's adapter, -1 for none.
        runs: of the rows.
        low_rank: the projection; where ranks share it, all of them call.

    Returns:
        [P, parts, R] float32; zero for rows without an adapter.
    """
    parts, width = low_rank.num_parts, low_rank.width_of_a
    shrunk = torch.zeros((len(rows), parts, width), dtype=torch.float32, device=rows.device)
    for expert, run in runs:
        for slot, mine in _rows_of_slots(slots[run], low_rank):
            for part, rank in enumerate(low_rank.ranks[slot, expert].tolist()):
                a = low_rank.a[slot, expert, part * width : part * width + rank].float()
                shrunk[run][mine, part, :rank] = rows[run][mine].float() @ a.T
    if low_rank.between is not None:
        shrunk = low_rank.between.whole(shrunk.flatten(1), parts).view(len(rows), parts, low_rank.width)
    return shrunk.to(rows.dtype).float()


def expand_with_torch(
    product: torch.Tensor, shrunk: torch.Tensor, slots: torch.Tensor, low_rank: StackedLowRank, expert: int
) -> None:
    """Add each row's adapter in place.

    Args:
        product: [P, N] float32, of the rows of one expert.
        shrunk: [P, parts, R] of these rows, from `shrink_with_torch`.
        slots: [P], likewise.
        low_rank: the projection.
        expert: local.
    """
    first = low_rank.first_row
    held = product[:, first : first + low_rank.b.shape[2]]
    for slot, mine in _rows_of_slots(slots, low_rank):
        for part, rank in enumerate(low_rank.ranks[slot, expert].tolist()):
            if not rank:
                continue
            b = low_rank.b[slot, expert, low_rank.rows_of(part)].float()
            columns = torch.arange(held.shape[1], device=product.device)[low_rank.rows_of(part)]
            held[mine[:, None], columns] += low_rank.scales[slot, expert, part] * (shrunk[mine, part] @ b.T)

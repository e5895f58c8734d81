"""Which token travels to which rank, in which order, and where its sums come back: plans without any communication."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .placement import PlacementTables


@dataclass(frozen=True, eq=False)
class Travel:
    """The rows that a rank sends, and what comes back for them.

    Attributes:
        tokens: `[S]` int64, the token of each row: by destination, and for each in the order of the tokens.
        local_ids: `[S, top_k]` int32, the experts of that token there, -1 where another rank holds them.
        slots: `[M, most]` int64, the rows of each token in the order of the ranks; -1 behind the last.
    """

    tokens: torch.Tensor
    local_ids: torch.Tensor
    slots: torch.Tensor


def _ranks_of_pairs(physical_ids: torch.Tensor, tables: PlacementTables) -> torch.Tensor:
    """`[M, top_k]` int32: the rank of each pair's expert, -1 without one."""
    ids = physical_ids.long()
    return torch.where(ids >= 0, tables.rank_of[ids.clamp(min=0)], -1)


def ranks_of_tokens(physical_ids: torch.Tensor, tables: PlacementTables, num_ranks: int) -> torch.Tensor:
    """`[M, num_ranks]` bool: whether a rank holds one of a token's experts."""
    ranks = _ranks_of_pairs(physical_ids, tables)
    present = torch.zeros((len(ranks), num_ranks + 1), dtype=torch.bool, device=ranks.device)
    # Pairs without an expert mark the column behind the last rank.
    present.scatter_(1, torch.where(ranks >= 0, ranks, num_ranks).long(), True)
    return present[:, :num_ranks]


def plan_travel(physical_ids: torch.Tensor, present: torch.Tensor, tables: PlacementTables, num_rows: int) -> Travel:
    """The plan of a rank's tokens; nothing waits for the device.

    Args:
        physical_ids: `[M, top_k]` int32, -1: no expert.
        present: from `ranks_of_tokens`.
        tables: of the placement.
        num_rows: S, how many of `present` are set.
    """
    num_tokens, num_ranks = present.shape
    top_k = physical_ids.shape[1]
    by_rank = present.t().reshape(-1)
    rows = torch.nonzero_static(by_rank, size=num_rows)[:, 0]
    to_rank, tokens = rows // max(1, num_tokens), rows % max(1, num_tokens)
    ids = physical_ids[tokens].long()
    there = _ranks_of_pairs(ids, tables) == to_rank[:, None]
    local_ids = torch.where(there, tables.local_of[ids.clamp(min=0)], -1).to(torch.int32)

    most = min(top_k, num_ranks)
    # The row of each token and rank, and which of the token's ranks it is.
    row_of = (torch.cumsum(by_rank, dim=0) - 1).view(num_ranks, num_tokens).t()
    turn = torch.cumsum(present, dim=1) - 1
    slots = torch.full((num_tokens, most + 1), -1, dtype=torch.int64, device=present.device)
    slots.scatter_(1, torch.where(present, turn, most), row_of)
    return Travel(tokens, local_ids, slots[:, :most])


def sum_over_ranks(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`[M, H]`: the rows of each token added in the order of its slots, in float32, and rounded once.

    Args:
        rows: `[S, H]`.
        slots: `[M, most]` int64, -1: none.
    """
    total = torch.zeros((len(slots), rows.shape[1]), dtype=torch.float32, device=rows.device)
    if not len(rows):
        return total.to(rows.dtype)
    for of_turn in slots.unbind(1):
        added = rows[of_turn.clamp(min=0)].float()
        total += torch.where(of_turn[:, None] >= 0, added, 0.0)
    return total.to(rows.dtype)

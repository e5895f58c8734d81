"""Which token travels to which rank, in which order, and the sum of what comes back: without any communication."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..kernels import travel as kernels
from ..platform import Platform
from ..replay import replayable
from .expected_rows import Room


@dataclass(frozen=True, eq=False)
class Homes:
    """Where the expert of each id lives, int32 `[ids]` on the device: its rank, and its number there."""

    rank_of: torch.Tensor
    local_of: torch.Tensor


@dataclass(frozen=True, eq=False)
class Travel:
    """The rows that a rank sends: by destination, and for each in the order of the tokens.

    Attributes:
        places: `[num_ranks, M]` int32, the number of each token among the rows for a rank, -1 where it does not go.
        counts: `[num_ranks]` int32, the rows for each rank.
        homes: by which it was planned.
        stays: the rank that gets nothing, since it has these tokens; None where all travel.
        room: rows set aside for each rank; None: as many as there are. What finds none does not travel.
    """

    places: torch.Tensor
    counts: torch.Tensor
    homes: Homes
    stays: int | None = None
    room: Room | None = None

    @property
    def set_aside(self) -> torch.Tensor:
        """`[num_ranks]` int32: rows between the first for one rank and the first for the next."""
        return self.counts if self.room is None else self.room.on_device

    @cached_property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank and the token of each row, `[S]` int64; the host waits for the device."""
        rank, token = (self.places >= 0).nonzero(as_tuple=True)
        return rank, token

    def rows_in_room(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rank, the token and the place among all rows of each one that has room, `[S]` int64; the host waits."""
        (rank, token), set_aside = self.rows, self.set_aside
        place = self.places[rank, token]
        has_room = place < set_aside[rank]
        at = (set_aside.cumsum(0) - set_aside)[rank] + place
        return rank[has_room], token[has_room], at[has_room].long()


def ranks_of_pairs(topk_ids: torch.Tensor, homes: Homes) -> torch.Tensor:
    """`[M, top_k]` int64: the rank of each pair's expert, -1 without one; a stray id is no expert."""
    ids, num_ids = topk_ids.long(), len(homes.rank_of)
    known = (ids >= 0) & (ids < num_ids)
    return torch.where(known, homes.rank_of[ids.clamp(0, num_ids - 1)].long(), -1)


def plan_travel(
    topk_ids: torch.Tensor, homes: Homes, numbers: torch.Tensor, padded_tokens: int, stays: int | None = None
) -> Travel:
    """The plan of a rank's tokens; nothing waits for the device.

    Args:
        topk_ids: `[M, top_k]` int32, ids of `homes`; -1: no expert.
        homes: of the placement.
        numbers: `[num_ranks + 1]` int32, which are written: the rows for each rank, and `padded_tokens`.
        padded_tokens: rows that the rank says that it has with its padding.
        stays: the rank whose tokens these are, where they do not travel to it; None: they do.
    """
    counts = numbers[:-1]
    if Platform.of(topk_ids.device).runs_triton:
        return Travel(_places_of_travel(numbers, topk_ids, homes.rank_of, padded_tokens, stays), counts, homes, stays)
    num_ranks, num_tokens = len(counts), len(topk_ids)
    places = torch.empty((num_ranks, num_tokens), dtype=torch.int32, device=topk_ids.device)
    ranks = ranks_of_pairs(topk_ids, homes)
    goes = torch.zeros((num_tokens, num_ranks + 1), dtype=torch.int32, device=topk_ids.device)
    # Pairs without an expert mark the column behind the last rank.
    goes.scatter_(1, torch.where(ranks >= 0, ranks, num_ranks), 1)
    goes = goes[:, :num_ranks].t()
    if stays is not None:
        goes[stays] = 0
    places.copy_(goes.cumsum(dim=1)).sub_(1).masked_fill_(goes == 0, -1)
    counts.copy_(goes.sum(dim=1))
    numbers[-1] = padded_tokens
    return Travel(places, counts, homes, stays)


@replayable(tuple)
def _places_of_travel(
    numbers: torch.Tensor, topk_ids: torch.Tensor, rank_of: torch.Tensor, padded_tokens: int, stays: int | None
) -> torch.Tensor:
    places = torch.empty((len(numbers) - 1, len(topk_ids)), dtype=torch.int32, device=topk_ids.device)
    kernels.plan_travel(places, numbers, topk_ids, rank_of, padded_tokens, stays)
    return places


def sum_over_ranks(back: torch.Tensor, travel: Travel, own: torch.Tensor | None = None) -> torch.Tensor:
    """`[M, H]`: the rows of each token added in the order of the ranks, in float32, and rounded once.

    Args:
        back: `[S, H]`, dense, in the order of the plan, which has room for every row; others are not looked at.
        travel: the plan.
        own: `[M, H]`, dense, the rows of the rank that stays, of every token; beside such a plan alone.
    """
    num_tokens = travel.places.shape[1]
    if num_tokens and Platform.of(back.device).runs_triton:
        return _summed_over_ranks(back, travel.places, travel.set_aside, own, travel.stays)
    out = back.new_empty((num_tokens, back.shape[1]))
    total = torch.zeros(out.shape, dtype=torch.float32, device=back.device)
    counts, set_aside = travel.counts.tolist(), travel.set_aside.tolist()
    planned = back[: sum(set_aside)].split(set_aside)
    for rank, (tokens, rows) in enumerate(zip(travel.rows[1].split(counts), planned, strict=True)):
        if own is not None and rank == travel.stays:
            total += own.float()
        total[tokens] += rows[: len(tokens)].float()
    return out.copy_(total)


@replayable(tuple)
def _summed_over_ranks(
    back: torch.Tensor, places: torch.Tensor, set_aside: torch.Tensor, own: torch.Tensor | None, stays: int | None
) -> torch.Tensor:
    out = back.new_empty((places.shape[1], back.shape[1]))
    kernels.sum_ranks(out, back, places, set_aside, own, stays)
    return out

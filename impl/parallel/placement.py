"""Where each expert lives: logical experts, as the router numbers them, and their physical copies on the ranks.

Physical ids count the slots of all ranks, rank by rank. A logical expert has one copy or several (redundant experts,
DeepSeek-V3, arXiv 2412.19437, section 3.4); a routed pair goes to exactly one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import torch

from ..align import IDS
from ..checks import MOST_LISTED, expect_device, expect_instance, expect_int, expect_tensor, shown
from .rows import turns

# A greedy choice looks at every rank for every expert.
MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of every rank.

    Attributes:
        num_experts: E, logical experts.
        experts_of_rank: for each rank of the expert parallelism the logical ids that it holds, in the order of its
            weights; it may be empty, and an id may stand on several ranks.

    Raises:
        TypeError, ValueError: an id outside [0, E), one that stands twice on a rank, or an expert that is nowhere.
    """

    num_experts: int
    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        expect_int("num_experts", self.num_experts, low=1)
        if not expect_instance("experts_of_rank", self.experts_of_rank, Sequence):
            raise ValueError("experts_of_rank: expected at least one rank, got none")
        for rank, experts in enumerate(self.experts_of_rank):
            for expert in expect_instance(f"experts_of_rank[{rank}]", experts, Sequence):
                expect_int(f"experts_of_rank[{rank}]", expert, low=0, high=self.num_experts - 1)
            if len(set(experts)) != len(experts):
                raise ValueError(f"experts_of_rank[{rank}]: expected each expert once, got {list(experts)}")
        held = set().union(*self.experts_of_rank)
        if len(held) != self.num_experts:
            missing = list(islice((expert for expert in range(self.num_experts) if expert not in held), 8))
            raise ValueError(
                f"experts_of_rank: of num_experts {self.num_experts} expected every expert on some rank, "
                f"got none with {missing}"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks of the expert parallelism."""
        return len(self.experts_of_rank)

    @cached_property
    def physical_to_logical(self) -> tuple[int, ...]:
        """The logical id of each physical one."""
        return tuple(expert for experts in self.experts_of_rank for expert in experts)

    @cached_property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """The physical ids of each logical expert, ascending."""
        copies: list[list[int]] = [[] for _ in range(self.num_experts)]
        for physical, logical in enumerate(self.physical_to_logical):
            copies[logical].append(physical)
        return tuple(map(tuple, copies))

    @property
    def has_copies(self) -> bool:
        """Whether some expert lives on several ranks."""
        return self.num_physical > self.num_experts

    @property
    def num_physical(self) -> int:
        """Slots of all ranks."""
        return len(self.physical_to_logical)

    def first_physical(self, rank: int) -> int:
        """The physical id of a rank's first slot.

        Raises:
            TypeError, ValueError: no rank of the placement.
        """
        expect_int("rank", rank, low=0, high=self.num_ranks - 1)
        return [0, *accumulate(map(len, self.experts_of_rank))][rank]

    def expert_map(self, rank: int) -> torch.Tensor:
        """`[P]` int32 on the CPU: physical to local id on `rank`, -1 elsewhere; errors as `first_physical`."""
        first, size = self.first_physical(rank), len(self.experts_of_rank[rank])
        local = torch.full((self.num_physical,), -1, dtype=torch.int32)
        local[first : first + size] = torch.arange(size, dtype=torch.int32)
        return local

    def local_experts(self, rank: int) -> torch.Tensor:
        """`[E]` int32 on the CPU: logical to local id, -1 elsewhere, for `AdapterTable`; errors as `first_physical`."""
        expect_int("rank", rank, low=0, high=self.num_ranks - 1)
        local = torch.full((self.num_experts,), -1, dtype=torch.int32)
        held = self.experts_of_rank[rank]
        local[list(held)] = torch.arange(len(held), dtype=torch.int32)
        return local

    def tables(self, device: torch.device | str) -> PlacementTables:
        """The same as tensors on a device.

        Raises:
            TypeError, ValueError: no device.
        """
        device = expect_device("device", device)
        most = max(map(len, self.copies))
        padded = [(*copies, *(-1,) * (most - len(copies))) for copies in self.copies]
        ranks = [rank for rank, experts in enumerate(self.experts_of_rank) for _ in experts]
        local = [slot for experts in self.experts_of_rank for slot in range(len(experts))]

        def tensor(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return PlacementTables(tensor(padded), tensor([len(c) for c in self.copies]), tensor(ranks), tensor(local))


@dataclass(frozen=True, eq=False)
class PlacementTables:
    """A placement as tensors, int32.

    Attributes:
        copies: `[E, most copies]`, physical ids, -1 behind the last.
        num_copies: `[E]`.
        rank_of: `[P]`, the rank of each physical expert.
        local_of: `[P]`, its local id there.
    """

    copies: torch.Tensor
    num_copies: torch.Tensor
    rank_of: torch.Tensor
    local_of: torch.Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.copies.shape[0]


def _expect_ranks(num_experts: int, num_ranks: int) -> None:
    expect_int("num_experts", num_experts, low=1, high=MOST_LISTED)
    expect_int("num_ranks", num_ranks, low=1)
    if num_ranks > num_experts:
        raise ValueError(
            f"num_ranks: expected at most num_experts {num_experts} where no explicit placement says which rank stays "
            f"empty, got {num_ranks}"
        )


def linear_placement(num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Rank r holds the r-th run of experts; the first ranks take the remainder, one each.

    Raises:
        TypeError, ValueError: more ranks than experts, or a number under 1.
    """
    _expect_ranks(num_experts, num_ranks)
    share, remainder = divmod(num_experts, num_ranks)
    ends = list(accumulate(share + (rank < remainder) for rank in range(num_ranks)))
    return ExpertPlacement(
        num_experts, tuple(tuple(range(start, end)) for start, end in zip([0, *ends], ends, strict=False))
    )


def round_robin_placement(num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Expert e on rank e mod `num_ranks`.

    Raises:
        TypeError, ValueError: more ranks than experts, or a number under 1.
    """
    _expect_ranks(num_experts, num_ranks)
    return ExpertPlacement(num_experts, tuple(tuple(range(r, num_experts, num_ranks)) for r in range(num_ranks)))


def balanced_placement(load: Sequence[float], num_ranks: int, slots_per_rank: int) -> ExpertPlacement:
    """Redundant experts by load: the most loaded get copies, and ranks loads as equal as a greedy choice makes them.

    A spare slot goes to the expert whose copies have most to do. Then experts, the most loaded copies first, go to the
    ranks with the fewest experts, and of those to the least loaded; so a rank without a copy of it is always left
    (after DeepSeek's EPLB, https://github.com/deepseek-ai/EPLB).

    Args:
        load: of each logical expert, its pairs in some past, say.
        num_ranks: of the expert parallelism, at most 65,536.
        slots_per_rank: experts that each rank holds.

    Raises:
        TypeError, ValueError: loads that are no numbers of at least 0, or fewer slots than experts.
    """
    num_experts = len(expect_instance("load", load, Sequence))
    if not num_experts:
        raise ValueError("load: expected one of each expert, got none")
    for each in load:
        if not isinstance(each, (int, float)) or not 0 <= each < math.inf:
            raise ValueError(f"load: expected numbers of at least 0, got {shown(each)}")
    expect_int("num_ranks", num_ranks, low=1, high=MOST_RANKS)
    expect_int("slots_per_rank", slots_per_rank, low=1, high=num_experts)
    spare = num_ranks * slots_per_rank - num_experts
    if spare < 0:
        raise ValueError(
            f"slots_per_rank: expected {num_ranks} ranks to hold {num_experts} experts, got {slots_per_rank} slots each"
        )
    copies = [1] * num_experts
    for _ in range(spare):
        fewer = [expert for expert in range(num_experts) if copies[expert] < num_ranks]
        copies[max(fewer, key=lambda expert: (load[expert] / copies[expert], -expert))] += 1
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    total = [0.0] * num_ranks
    for expert in sorted(range(num_experts), key=lambda expert: (-load[expert] / copies[expert], expert)):
        ranks = sorted(range(num_ranks), key=lambda rank: (len(held[rank]), total[rank], rank))
        for rank in ranks[: copies[expert]]:
            held[rank].append(expert)
            total[rank] += load[expert] / copies[expert]
    return ExpertPlacement(num_experts, tuple(tuple(sorted(experts)) for experts in held))


def choose_copies(topk_ids: torch.Tensor, tables: PlacementTables, offset: int = 0) -> torch.Tensor:
    """Which copy each routed pair goes to: an expert's pairs take its copies in turn, in the order of the tokens.

    So on each rank the copies of an expert get numbers of pairs that differ by one at most, whatever the routing, and
    the same call chooses the same again. Nothing waits for the device.

    Args:
        topk_ids: `[M, top_k]` int32 or int64, logical ids; -1 stays -1.
        tables: of the placement.
        offset: the copy of each expert's first pair; ranks take their own number, so that not all begin with the first.

    Returns:
        `[M, top_k]` int32, physical ids.

    Raises:
        TypeError, ValueError: by name.
    """
    expect_instance("tables", tables, PlacementTables)
    expect_tensor("topk_ids", topk_ids, shape=("M", "top_k"), dtypes=IDS, like=tables.copies)
    expect_int("offset", offset, low=0)
    ids = topk_ids.reshape(-1).long()
    known = ids.clamp(min=0)
    if tables.copies.shape[1] == 1:
        physical = tables.copies[:, 0][known]
    else:
        physical = tables.copies[known, (turns(ids) + offset) % tables.num_copies[known]]
    return torch.where(ids >= 0, physical, -1).to(torch.int32).view(topk_ids.shape)

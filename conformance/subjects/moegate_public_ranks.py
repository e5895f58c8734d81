"""What moegate's meshes and placements of experts must answer.

Each rule stands here a second time, as it is documented.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from ...impl.config import ParallelConfig
from ...impl.parallel import placement
from ...impl.parallel.mesh import Mesh
from ..properties.bad_input import Bad, mapped, put
from ..properties.public import Answer, PublicCall
from .moegate_public import equals, has, lists


def _mesh_calls() -> list[PublicCall]:
    """A rank's place from the order of ranks: shares of experts one behind the other, and runs of equal tokens."""
    answers: dict[str, list[Answer]] = {}
    for tp, dp, ep in ((1, 1, 1), (2, 2, 2), (3, 2, 2), (1, 2, 4), (2, 1, 3), (1, 3, 3)):
        mesh, ranks, run = Mesh(tp, dp, ep), range(tp * ep), tp * ep // dp
        for rank in ranks:
            same_tokens = tuple(other for other in ranks if other // run == rank // run)
            wanted = {
                "ep_rank": rank // tp,
                "dp_rank": rank // run,
                "replicas": same_tokens,
                "shards": tuple(other for other in ranks if other // tp == rank // tp),
                "data_peers": tuple(other for other in ranks if other % run == rank % run),
            }
            for method, expected in wanted.items():
                answers.setdefault(method, []).append(
                    Answer(f"rank {rank} of {mesh}", equals(expected), put(self=mesh, rank=rank))
                )
            place = ParallelConfig(tp, rank % tp, dp, rank // run, ep, rank // tp)
            answers.setdefault("place", []).append(
                Answer(f"rank {rank} of {mesh}", equals(place), put(self=mesh, rank=rank))
            )
    return [
        PublicCall(
            f"parallel.mesh.Mesh.{method}",
            lambda self, rank, method=method: getattr(self, method)(rank),
            lambda: {"self": Mesh(), "rank": 0},
            {},
            answers=own,
        )
        for method, own in answers.items()
    ]


def balanced(load: Sequence[float], ranks: int, slots: int) -> tuple[tuple[int, ...], ...]:
    """`balanced_placement`'s rule a second time."""
    copies = [1] * len(load)
    while sum(copies) < ranks * slots:
        # To whose copies have most to do; of equals the lowest id.
        most, chosen = -1.0, 0
        for expert, pairs in enumerate(load):
            if copies[expert] < ranks and pairs / copies[expert] > most:
                most, chosen = pairs / copies[expert], expert
        copies[chosen] += 1
    held: list[list[int]] = [[] for _ in range(ranks)]
    work = [0.0] * ranks
    order = sorted(range(len(load)), key=lambda expert: load[expert] / copies[expert], reverse=True)
    for expert in order:
        free = list(range(ranks))
        for _ in range(copies[expert]):
            chosen = min(free, key=lambda rank: (len(held[rank]), work[rank]))
            free.remove(chosen)
        for rank in set(range(ranks)) - set(free):
            held[rank].append(expert)
            work[rank] += load[expert] / copies[expert]
    return tuple(tuple(sorted(experts)) for experts in held)


def _placement_calls() -> list[PublicCall]:
    sizes = [(8, 2), (7, 3), (5, 5), (1, 1), (6, 4), (9, 2)]
    runs, turns = [], []
    for experts, ranks in sizes:
        shares = [len(range(rank, experts, ranks)) for rank in range(ranks)]  # the first take the remainder
        ends = list(accumulate(shares))
        linear = tuple(tuple(range(end - share, end)) for end, share in zip(ends, shares, strict=True))
        by_turns = tuple(tuple(e for e in range(experts) if e % ranks == rank) for rank in range(ranks))
        asked = put(num_experts=experts, num_ranks=ranks)
        runs.append(Answer(f"{experts} on {ranks}", has(experts_of_rank=linear), asked))
        turns.append(Answer(f"{experts} on {ranks}", has(experts_of_rank=by_turns), asked))
    loads = (
        ([4.0, 1.0, 1.0, 1.0], 2, 3), ([1.0, 2.0, 3.0, 4.0], 2, 2), ([0.0, 0.0, 0.0], 3, 2), ([9, 1, 5, 5, 2, 7], 3, 4),
        ([9.0, 3.0, 5.0, 3.0, 2.0], 4, 3),
        ([1.0], 2, 1), ([8.0, 1.0, 1.0, 1.0, 1.0, 1.0], 4, 2), ([3.0, 3.0, 3.0], 3, 3), ([5.0, 4.0, 3.0, 2.0], 1, 4),
    )  # fmt: skip
    shared = placement.ExpertPlacement(4, ((0, 2), (1, 2), (), (3, 0)))
    # Physical ids: rank 0 has 0 and 1, rank 1 has 2 and 3, rank 3 has 4 and 5.
    ids = torch.tensor([[0, 2], [2, -1], [0, 2], [3, 0], [1, 2]], dtype=torch.int32)
    by_turn = [[0, 1], [3, -1], [5, 1], [4, 0], [2, 3]]
    from_second = [[5, 3], [1, -1], [0, 3], [4, 5], [2, 1]]
    whole = placement.linear_placement(4, 2)
    of_rank = {
        "first_physical": [equals(first) for first in (0, 2, 4, 4)],
        "expert_map": [
            lists(m) for m in ([0, 1, -1, -1, -1, -1], [-1, -1, 0, 1, -1, -1], [-1] * 6, [-1, -1, -1, -1, 0, 1])
        ],
        "local_experts": [lists(m) for m in ([0, -1, 1, -1], [-1, 0, 1, -1], [-1] * 4, [1, -1, -1, 0])],
    }

    def tables_wrong(found: Any) -> str:
        own = {name: getattr(found, name).tolist() for name in ("copies", "num_copies", "rank_of", "local_of")}
        wanted = {
            "copies": [[0, 5], [2, -1], [1, 3], [4, -1]],
            "num_copies": [2, 1, 2, 1],
            "rank_of": [0, 0, 1, 1, 3, 3],
            "local_of": [0, 1, 0, 1, 0, 1],
        }
        return "" if own == wanted and found.num_experts == 4 else f"expected {wanted}, got {own}"

    return [
        PublicCall(
            "parallel.placement.linear_placement",
            placement.linear_placement,
            lambda: {"num_experts": 8, "num_ranks": 2},
            {},
            edges=[("as many ranks as experts", put(num_ranks=8)), ("one rank", put(num_ranks=1))],
            answers=runs,
        ),
        PublicCall(
            "parallel.placement.round_robin_placement",
            placement.round_robin_placement,
            lambda: {"num_experts": 8, "num_ranks": 2},
            {},
            answers=turns,
        ),
        PublicCall(
            "parallel.placement.balanced_placement",
            placement.balanced_placement,
            lambda: {"load": [1.0, 2.0], "num_ranks": 2, "slots_per_rank": 1},
            {},
            edges=[("loads of zero", put(load=[0, 0])), ("every expert everywhere", put(slots_per_rank=2))],
            answers=[
                Answer(
                    f"{load} on {ranks} of {slots}",
                    has(experts_of_rank=balanced(load, ranks, slots)),
                    put(load=load, num_ranks=ranks, slots_per_rank=slots),
                )
                for load, ranks, slots in loads
            ],
        ),
        PublicCall(
            "parallel.placement.ExpertPlacement",
            placement.ExpertPlacement,
            lambda: {"num_experts": 4, "experts_of_rank": shared.experts_of_rank},
            {},
            edges=[("a rank without experts", dict), ("one expert", put(num_experts=1, experts_of_rank=((0,),)))],
            answers=[
                Answer(
                    "copies",
                    has(
                        num_ranks=4,
                        num_physical=6,
                        has_copies=True,
                        physical_to_logical=(0, 2, 1, 2, 3, 0),
                        copies=((0, 5), (2,), (1, 3), (4,)),
                    ),
                ),
                Answer("no copies", has(has_copies=False), put(experts_of_rank=((0, 2), (1, 3)))),
            ],
        ),
        *(
            PublicCall(
                f"parallel.placement.ExpertPlacement.{method}",
                lambda self, rank, method=method: getattr(self, method)(rank),
                lambda: {"self": shared, "rank": 0},
                {},
                answers=[Answer(f"rank {rank}", wrong, put(rank=rank)) for rank, wrong in enumerate(wanted)],
            )
            for method, wanted in of_rank.items()
        ),
        PublicCall(
            "parallel.placement.ExpertPlacement.tables",
            lambda self, device: self.tables(device),
            lambda: {"self": shared, "device": "cpu"},
            {},
            answers=[Answer("of copies", tables_wrong)],
        ),
        PublicCall(
            "parallel.placement.choose_copies",
            placement.choose_copies,
            lambda: {"topk_ids": ids, "tables": shared.tables("cpu")},
            {},
            (Bad("topk_ids", "is on another device", mapped("topk_ids", lambda t: t.to("meta"))),),
            edges=[("no tokens", put(topk_ids=ids[:0]))],
            answers=[
                Answer("an expert's copies in turn", lists(by_turn)),
                Answer("from the second copy on", lists(from_second), put(offset=1)),
                Answer("once around", lists(by_turn), put(offset=2)),
                Answer("ids of int64", lists(by_turn), put(topk_ids=ids.long())),
                Answer(
                    "one copy each",
                    lists([[3, -1]]),
                    put(
                        topk_ids=ids[3:4] * 0 + torch.tensor([3, -1], dtype=torch.int32),
                        tables=whole.tables("cpu"),
                        offset=5,
                    ),
                ),
            ],
        ),
    ]


RANK_CALLS: tuple[PublicCall, ...] = (*_mesh_calls(), *_placement_calls())

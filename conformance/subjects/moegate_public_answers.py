"""What moegate's public calls must answer, from their documentation: values, placements, adapters, weights in few bits.

Each rule stands here a second time, as it is documented; `moegate_public_*` have what the arguments may not be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, product
from typing import Any
from unittest import mock

import torch

from ...impl.config import MoEConfig, ParallelConfig, QuantScheme
from ...impl.experts_module import RoutedExperts
from ...impl.fused_moe import fused_experts
from ...impl.layer import Gate, MoELayer, RoutingMethod
from ...impl.lora.adapter import Adapter, LowRank, lora_scaling
from ...impl.lora.table import AdapterTable
from ...impl.parallel import placement
from ...impl.parallel.experts import ParallelExperts
from ...impl.parallel.mesh import Mesh
from ...impl.platform import Platform, Vendor
from ...impl.quantize import quantize_activations, quantize_experts, quantize_weights
from ...impl.tuning import kernel_config, lookup, names
from ...impl.tuning.kernel_config import KernelConfig
from ...reference.quantization import nearest
from ..configs import DEVICES
from ..oracle import CUDA, ROCM
from ..properties.bad_input import Arguments, Bad, Change, mapped, put
from ..properties.public import Answer, PublicCall
from .moegate_public import E, H, I, K, M, adapter, full, layer, low_rank, routed, table, weights
from .moegate_public_files import H200, KEY, SIZES
from .moegate_public_values import Alone, alone


def _is(expected: Any) -> Callable[[Any], str]:
    """The answer is this."""
    return lambda found: "" if found == expected else f"expected {expected}, got {found}"


def _has(**expected: Any) -> Callable[[Any], str]:
    """The answer has these fields."""

    def wrong(found: Any) -> str:
        own = {name: getattr(found, name) for name in expected}
        return "" if own == expected else f"expected {expected}, got {own}"

    return wrong


def _listed(expected: Any) -> Callable[[torch.Tensor], str]:
    """The answer is an int32 tensor of these numbers."""

    def wrong(found: torch.Tensor) -> str:
        right = found.dtype == torch.int32 and found.tolist() == expected
        return "" if right else f"expected {expected} in int32, got {found}"

    return wrong


def _same_rows(expected: torch.Tensor) -> Callable[[torch.Tensor], str]:
    def wrong(found: torch.Tensor) -> str:
        same = found.shape == expected.shape and torch.equal(found, expected)
        return "" if same else f"expected {list(expected.shape)} {expected.flatten()[:4]}, got {list(found.shape)}"

    return wrong


# --- configurations and platforms ---------------------------------------------------------------------------------


def _config_call() -> PublicCall:
    groups = {"scheme": "int8_w8a16", "block_shape": (0, 16)}
    blocks = {"scheme": "fp8_w8a8", "block_shape": (32, 16)}
    thirds = [ParallelConfig(ep_size=3, ep_rank=rank) for rank in range(3)]
    halves = ParallelConfig(tp_size=2)
    return PublicCall(
        "config.MoEConfig",
        MoEConfig,
        lambda: {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32},
        {},
        (
            Bad("dtype", "is float32 with a scheme", put(scheme="int8_w8a16", dtype=torch.float32)),
            Bad("block_shape", "has groups that do not divide H", put(**groups, hidden_size=72)),
            Bad("block_shape", "has groups that do not divide I", put(**groups, intermediate_size=40)),
            Bad("tp_size", "cuts a group", put(**groups, intermediate_size=48, parallel=halves)),
            Bad("tp_size", "cuts a block's rows alone", put(**blocks, parallel=halves)),
            Bad(
                "tp_size",
                "cuts a block's columns alone",
                put(**(blocks | {"block_shape": (16, 32)}), parallel=halves),
            ),
            Bad("expert_map", "skips a local id", put(expert_map=(0, 2, -1, -1, -1, -1, -1, -1))),
            Bad("expert_map", "has a local id of -2", put(expert_map=(0, -2, 1, 2, 3, 4, 5, 6))),
        ),
        edges=(
            ("groups that divide H and I", put(**groups)),
            ("whole groups on each rank", put(**groups, parallel=halves)),
            ("whole blocks on each rank", put(**(blocks | {"block_shape": (16, 16)}), parallel=halves)),
            ("blocks with a tail on one rank", put(**blocks, intermediate_size=40, hidden_size=72)),
            ("every expert chosen", put(top_k=8)),
            ("one expert on each rank", put(parallel=ParallelConfig(ep_size=8))),
            ("a map with more ranks than experts", put(expert_map=(-1,) * 8, parallel=ParallelConfig(ep_size=9))),
            ("weights on the input", put(top_k=1, apply_router_weight_on_input=True)),
            ("float32", put(dtype=torch.float32)),
        ),
        answers=(
            Answer("the columns of one rank", _has(intermediate_size_per_partition=16), put(parallel=halves)),
            *(
                Answer(f"experts of rank {place.ep_rank} of 3", _has(num_local_experts=held), put(parallel=place))
                for place, held in zip(thirds, (3, 3, 2), strict=True)
            ),
            Answer("experts of a map", _has(num_local_experts=2), put(expert_map=(-1, 1, -1, 0, -1, -1, -1, -1))),
        ),
    )


def _platform_calls() -> list[PublicCall]:
    """Memory by the programming guides, as `DEVICES` has it; families by what each architecture is."""
    memory = {platform: limit for platform, limit, _ in DEVICES.values()} | {
        "cuda:7.0": 98_304, "cuda:7.2": 98_304, "cuda:8.6": 101_376, "cuda:8.7": 166_912, "cuda:10.1": 232_448,
        "cuda:10.3": 232_448, "cuda:11.0": 232_448, "cuda:12.1": 101_376, "rocm:gfx90a": 65_536,
        "rocm:gfx950": 163_840, "tpu": 0, "out_of_tree": 0,
    }  # fmt: skip
    answers = []
    for text, limit in memory.items():
        nvidia = text in CUDA
        major, minor = map(int, text.removeprefix("cuda:").split(".")) if nvidia else (0, 0)
        gpu = nvidia or text in ROCM
        wanted = {
            "shared_memory": limit,
            "is_hopper": text == "cuda:9.0",
            "is_cuda_alike": gpu,
            "runs_triton": gpu or text == "xpu",
            "has_fp8_e4m3": (major, minor) >= (8, 9) if nvidia else text in ("cpu", "rocm:gfx942", "rocm:gfx950"),
            "family": 10 * major if nvidia else 90 if text in ROCM else None,
        }
        answers.append(Answer(f"what {text} is", _has(**wanted), put(text=text)))
        answers.append(Answer(f"{text} again", lambda found, text=text: _is(text)(str(found)), put(text=text)))
    rows = [Bad("platform", "has text behind a colon", put(text="cpu:9.0"))]
    return [
        PublicCall("platform.Platform.parse", Platform.parse, lambda: {"text": "cpu"}, {}, rows, answers=answers),
        PublicCall(
            "platform.Platform",
            Platform,
            lambda: {"vendor": Vendor.CPU},
            {},
            (
                Bad("capability", "is of a CPU", put(capability=(9, 0))),
                Bad("capability", "is none of NVIDIA's", put(vendor=Vendor.NVIDIA, capability=(9, 1))),
                Bad("capability", "is missing", put(vendor=Vendor.NVIDIA)),
                Bad("capability", "is none of AMD's", put(vendor=Vendor.AMD, capability=(9, 1))),
            ),
            edges=(
                ("an interpreter", put(interpreted=True)),
                ("a Hopper", put(vendor=Vendor.NVIDIA, capability=(9, 0))),
            ),
            answers=(Answer("an interpreter", _has(runs_triton=True), put(interpreted=True)),),
        ),
        PublicCall(
            "platform.Platform.of",
            Platform.of,
            lambda: {"device": "cpu"},
            {},
            answers=(Answer("the CPU", _has(vendor=Vendor.CPU, name="cpu", capability=None, shared_memory=0)),),
        ),
    ]


# --- ranks and placements -----------------------------------------------------------------------------------------


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
                    Answer(f"rank {rank} of {mesh}", _is(expected), put(self=mesh, rank=rank))
                )
            place = ParallelConfig(tp, rank % tp, dp, rank // run, ep, rank // tp)
            answers.setdefault("place", []).append(
                Answer(f"rank {rank} of {mesh}", _is(place), put(self=mesh, rank=rank))
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
        runs.append(Answer(f"{experts} on {ranks}", _has(experts_of_rank=linear), asked))
        turns.append(Answer(f"{experts} on {ranks}", _has(experts_of_rank=by_turns), asked))
    loads = (
        ([4.0, 1.0, 1.0, 1.0], 2, 3), ([1.0, 2.0, 3.0, 4.0], 2, 2), ([0.0, 0.0, 0.0], 3, 2), ([9, 1, 5, 5, 2, 7], 3, 4),
        ([1.0], 2, 1), ([8.0, 1.0, 1.0, 1.0, 1.0, 1.0], 4, 2), ([3.0, 3.0, 3.0], 3, 3), ([5.0, 4.0, 3.0, 2.0], 1, 4),
    )  # fmt: skip
    shared = placement.ExpertPlacement(4, ((0, 2), (1, 2), (), (3, 0)))
    # Physical ids: rank 0 has 0 and 1, rank 1 has 2 and 3, rank 3 has 4 and 5.
    ids = torch.tensor([[0, 2], [2, -1], [0, 2], [3, 0], [1, 2]], dtype=torch.int32)
    by_turn = [[0, 1], [3, -1], [5, 1], [4, 0], [2, 3]]
    from_second = [[5, 3], [1, -1], [0, 3], [4, 5], [2, 1]]
    whole = placement.linear_placement(4, 2)
    of_rank = {
        "first_physical": [_is(first) for first in (0, 2, 4, 4)],
        "expert_map": [
            _listed(m) for m in ([0, 1, -1, -1, -1, -1], [-1, -1, 0, 1, -1, -1], [-1] * 6, [-1, -1, -1, -1, 0, 1])
        ],
        "local_experts": [_listed(m) for m in ([0, -1, 1, -1], [-1, 0, 1, -1], [-1] * 4, [1, -1, -1, 0])],
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
                    _has(experts_of_rank=balanced(load, ranks, slots)),
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
                    _has(
                        num_ranks=4,
                        num_physical=6,
                        has_copies=True,
                        physical_to_logical=(0, 2, 1, 2, 3, 0),
                        copies=((0, 5), (2,), (1, 3), (4,)),
                    ),
                ),
                Answer("no copies", _has(has_copies=False), put(experts_of_rank=((0, 2), (1, 3)))),
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
                Answer("an expert's copies in turn", _listed(by_turn)),
                Answer("from the second copy on", _listed(from_second), put(offset=1)),
                Answer("once around", _listed(by_turn), put(offset=2)),
                Answer("ids of int64", _listed(by_turn), put(topk_ids=ids.long())),
                Answer(
                    "one copy each",
                    _listed([[3, -1]]),
                    put(
                        topk_ids=ids[3:4] * 0 + torch.tensor([3, -1], dtype=torch.int32),
                        tables=whole.tables("cpu"),
                        offset=5,
                    ),
                ),
            ],
        ),
    ]


# --- adapters -----------------------------------------------------------------------------------------------------


class Two(Alone):
    """The first of two ranks, as far as what is said of them goes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2


def _sizes(**changes: Any) -> Arguments:
    sizes = {"num_experts": E, "hidden_size": H, "intermediate_size": I, "device": "cpu"}
    return {"num_slots": 2, "max_rank": 4} | sizes | changes


def _entries(found: Any) -> list[tuple[str, int, list[int], list[int]]]:
    return [(name, expert, list(a.shape), list(b.shape)) for name, expert, a, b in found]


def _width(rank: int) -> Answer:
    """Memory for the next of a few widths."""
    width = min(width for width in (16, 32, 64, 128, 256) if width >= rank)

    def wrong(found: AdapterTable) -> str:
        shapes = [list(t.shape) for t in (found.w13.a, found.w13.b, found.w2.a, found.w2.b)]
        wanted = [[2, E, 2 * width, H], [2, E, 2 * I, width], [2, E, width, I], [2, E, H, width]]
        return "" if shapes == wanted else f"expected {wanted}, got {shapes}"

    return Answer(f"memory of rank {rank}", wrong, put(max_rank=rank))


def _adapter_calls() -> list[PublicCall]:
    ranks = {"alpha": 16.0, "rank": 4}
    stable = put(rank_stabilized=True)
    two = _sizes(fully_sharded_over=Two(), max_rank=8)
    other_tables = {
        "another E": _sizes(num_experts=E + 1),
        "another H": _sizes(hidden_size=H + 1),
        "another I": _sizes(intermediate_size=I + 1),
        "another dtype": _sizes(dtype=torch.float16),
        "no gate rows": _sizes(is_gated=False),
        "alternating rows": _sizes(interleaved=True),
    }
    call = {
        "hidden_states": full(M, H),
        "topk_weights": full(M, K, dtype=torch.float32),
        "topk_ids": torch.zeros(M, K, dtype=torch.int32),
    }
    ids = torch.zeros(M, dtype=torch.int32)
    return [
        PublicCall(
            "lora.adapter.lora_scaling",
            lora_scaling,
            lambda: dict(ranks),
            {},
            edges=[("an alpha of zero", put(alpha=0)), ("a negative alpha", put(alpha=-1.5)), ("rank 1", put(rank=1))],
            answers=[
                Answer("alpha / r", _is(4.0)),
                Answer("alpha / sqrt(r)", _is(8.0), stable),
                Answer("rank 1", _is(16.0), put(rank=1)),
            ],
        ),
        PublicCall(
            "lora.adapter.LowRank",
            LowRank,
            lambda: {"a": full(3, H), "b": full(I, 3)},
            {},
            edges=[("a scale of zero", put(scale=0.0)), ("rank 1", put(a=full(1, H), b=full(I, 1)))],
            answers=[Answer("its rank", _has(rank=3, scale=1.0))],
        ),
        PublicCall(
            "lora.adapter.Adapter",
            Adapter,
            lambda: {"gate": {0: low_rank()}, "down": {1: low_rank(H, I, 3)}, "num_experts": E},
            {},
            edges=[("nothing adapted", put(gate={}, down={})), ("one expert", put(num_experts=1))],
            answers=[
                Answer("its largest rank", _has(largest_rank=3)),
                Answer("of nothing", _has(largest_rank=0), put(gate={}, down={})),
                Answer(
                    "its pairs",
                    lambda found: _is([("gate", 0, 2), ("down", 1, 3)])(
                        [(n, e, p.rank) for n, e, p in found.entries()]
                    ),
                ),
            ],
        ),
        PublicCall(
            "lora.table.AdapterTable",
            AdapterTable,
            _sizes,
            {},
            (
                Bad("hidden_size", "is not cut by the ranks", put(fully_sharded_over=Two(), hidden_size=H + 1)),
                Bad("num_local_experts", "is below the map's", put(expert_map=[0, 1, 2, -1], num_local_experts=2)),
                Bad("expert_map", "skips a local id", put(expert_map=[0, 2, -1, -1])),
                Bad("expert_map", "is a tensor of floats", put(expert_map=torch.zeros(E))),
            ),
            edges=[
                ("one slot", put(num_slots=1)),
                ("the most slots", put(num_slots=1024, num_experts=1)),
                ("more experts than the map names", put(expert_map=[0, -1, -1, -1], num_local_experts=3)),
                ("a map of nothing", put(expert_map=torch.full((E,), -1))),
                ("sizes of one", put(hidden_size=1, intermediate_size=1, num_experts=1)),
            ],
            answers=[
                *map(_width, (1, 16, 17, 32, 33, 64, 65, 128, 129, 256)),
                Answer("no adapter", _has(loaded=(), experts=(0, 1, 2, 3), num_local_experts=E)),
                Answer(
                    "experts of a map",
                    _has(experts=(2, 0), num_local_experts=2),
                    put(expert_map=torch.tensor([1, -1, 0, -1])),
                ),
            ],
        ),
        PublicCall(
            "lora.table.AdapterTable.load",
            lambda self, adapter, slot=None: (self.load(adapter, slot), self),
            lambda: {"self": table(), "adapter": adapter()},
            {},
            (
                Bad("adapter", "finds no empty slot", put(self=AdapterTable(**_sizes(num_slots=1)), adapter=3)),
                Bad(
                    "adapter.up[0]",
                    "has up rows where nothing is gated",
                    put(self=AdapterTable(**_sizes(is_gated=False)), adapter=Adapter(up={0: low_rank()})),
                ),
                Bad(
                    "adapter.gate[0]",
                    "has a rank that the ranks do not cut",
                    put(self=AdapterTable(**two), adapter=Adapter(gate={0: low_rank(2 * I, rank=3)})),
                ),
                Bad(
                    "adapter.gate[0].a",
                    "is of another dtype",
                    put(
                        adapter=Adapter(
                            gate={0: LowRank(full(2, H, dtype=torch.float16), full(I, 2, dtype=torch.float16))}
                        )
                    ),
                ),
                Bad(
                    "adapter.down[0].b",
                    "holds an infinity",
                    put(adapter=Adapter(down={0: LowRank(full(2, I), full(H, 2) / 0)})),
                ),
            ),
            edges=[
                ("the largest rank", put(adapter=Adapter(gate={0: low_rank(rank=4)}))),
                ("nothing adapted", put(adapter=Adapter())),
                ("gate_up of both", put(adapter=Adapter(gate_up={3: low_rank(2 * I)}))),
                (
                    "a rank that the ranks cut",
                    put(self=AdapterTable(**two), adapter=Adapter(gate={0: low_rank(2 * I, rank=4)})),
                ),
                (
                    "any rank of w2 where the ranks cut w13's",
                    put(self=AdapterTable(**two), adapter=Adapter(down={0: low_rank(H, 2 * I, rank=3)})),
                ),
            ],
            answers=[
                Answer("the first empty slot", lambda found: _is((0, (0,)))((found[0], found[1].loaded))),
                Answer(
                    "behind what is loaded",
                    lambda found: _is((0, (0, 1)))((found[0], found[1].loaded)),
                    lambda good: {"self": table(loaded=True), "adapter": adapter()},
                ),
                Answer("a slot that is named", lambda found: _is((1, (1,)))((found[0], found[1].loaded)), put(slot=1)),
            ],
        ),
        PublicCall(
            "lora.table.AdapterTable.slices_of",
            lambda self, slot: _entries(self.slices_of(slot)),
            lambda: {"self": table(loaded=True), "slot": 1},
            {},
            answers=[
                Answer("of whole matrices", _is([("gate", 0, [2, H], [I, 2]), ("down", 1, [2, I], [H, 2])])),
                Answer("of an empty slot", _is([]), put(slot=0)),
            ],
        ),
        PublicCall(
            "experts_module.RoutedExperts.forward",
            lambda self, **a: self(**a),
            lambda: {"self": routed(), **call, "adapters": table(loaded=True), "lora_ids": ids + 1},
            {},
            (
                *(
                    Bad("adapters", f"have {what}", put(adapters=AdapterTable(**sizes)))
                    for what, sizes in other_tables.items()
                ),
                Bad("lora_ids", "are int64", put(lora_ids=ids.long())),
                Bad("lora_ids", "are of another M", put(lora_ids=ids[1:])),
                Bad("lora_ids", "stand without adapters", put(adapters=None)),
            ),
            edges=[("no ids", put(lora_ids=None)), ("neither", put(lora_ids=None, adapters=None))],
        ),
    ]


# --- layers -------------------------------------------------------------------------------------------------------


def _uneven(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Numbers of which no two rows are equal."""
    count = torch.Size(shape).numel()
    return (torch.arange(count).view(shape) * 37 % 101 / 101 - 0.5).to(dtype)


def _uneven_layer(**options: Any) -> MoELayer:
    experts = RoutedExperts(_uneven(E, 2 * I, H), _uneven(E, H, I), backend="cpu")
    return MoELayer(Gate(_uneven(E, H)), experts, RoutingMethod(K), **options)


def _uneven_adapter() -> Adapter:
    return Adapter(gate={e: LowRank(_uneven(2, H), _uneven(I, 2)) for e in range(E)})


def _calls_of(layer: MoELayer, num_tokens: Sequence[int]) -> list[tuple[int, bool]]:
    """What a layer is called with while it is prepared: tokens, and whether with adapters' ids."""
    seen = []
    hook = layer.register_forward_pre_hook(
        lambda module, given: seen.append((len(given[0]), len(given) > 1 and given[1] is not None))
    )
    try:
        found = layer.prepare(num_tokens)
    finally:
        hook.remove()
    return [*seen, *([] if found is layer else [(-1, False)])]


def _layer_calls() -> list[PublicCall]:
    x = _uneven(M, H)
    loaded = AdapterTable(**_sizes())
    loaded.load(_uneven_adapter(), 1)
    ids = torch.tensor([1, -1, 1, -1], dtype=torch.int32)
    plain, adapted = _uneven_layer(), _uneven_layer(adapters=loaded)
    beside = {"parallel": ParallelExperts(alone(), placement.linear_placement(E, 1), max_tokens=8)}
    one = put(topk_weights=full(M, 1, dtype=torch.float32), topk_ids=torch.zeros(M, 1, dtype=torch.int32))

    def with_environment(value: str, **arguments: Any) -> torch.Tensor:
        with mock.patch.dict(os.environ, {"MOEGATE_BACKEND": value}):
            return fused_experts(**arguments)

    call = {"hidden_states": full(M, H), **weights(), "topk_weights": full(M, K, dtype=torch.float32)}
    call["topk_ids"] = torch.zeros(M, K, dtype=torch.int32)
    return [
        PublicCall(
            "layer.MoELayer",
            MoELayer,
            lambda: {"gate": Gate(full(E, H)), "experts": routed(), "routing": RoutingMethod(K)},
            {},
            (
                Bad("reduce", "stands beside parallel", put(**beside, reduce=lambda t: t)),
                Bad(
                    "expert_map", "stands beside parallel", put(**beside, expert_map=torch.arange(E, dtype=torch.int32))
                ),
                Bad("num_fused_shared_experts", "stands beside parallel", put(**beside, num_fused_shared_experts=1)),
                Bad(
                    "num_fused_shared_experts",
                    "stands beside a map",
                    put(expert_map=torch.arange(E, dtype=torch.int32), num_fused_shared_experts=1),
                ),
                Bad("setting", "lets nobody dispatch shared experts", _dispatching),
                Bad(
                    "experts",
                    "are fewer than the placement's",
                    put(**beside, experts=RoutedExperts(full(E - 1, 2 * I, H), full(E - 1, H, I))),
                ),
                Bad("placement", "is of fewer experts than the gate", put(**beside, gate=Gate(full(E + 1, H)))),
                Bad(
                    "adapters",
                    "are fully sharded without ranks",
                    put(adapters=AdapterTable(**_sizes(fully_sharded_over=Alone()))),
                ),
                Bad("adapters", "are of alternating rows", put(adapters=AdapterTable(**_sizes(interleaved=True)))),
            ),
            edges=[
                ("one captured token", put(max_captured_tokens=1)),
                ("a map of all", put(expert_map=torch.arange(E, dtype=torch.int32))),
            ],
        ),
        PublicCall(
            "layer.MoELayer.forward",
            lambda self, **a: self(**a),
            lambda: {"self": plain, "hidden_states": x},
            {},
            edges=[("no tokens", put(hidden_states=x[:0]))],
            answers=[
                Answer("a row alone", _same_rows(plain(x[:1])[0]), put(hidden_states=x[0])),
                Answer(
                    "two leading dimensions", _same_rows(plain(x).view(2, 2, H)), put(hidden_states=x.view(2, 2, H))
                ),
                Answer(
                    "ids with leading dimensions",
                    _same_rows(adapted(x, ids).view(2, 2, H)),
                    put(self=adapted, hidden_states=x.view(2, 2, H), lora_ids=ids.view(2, 2)),
                ),
                Answer(
                    "ids that say something",
                    lambda found: "" if not torch.equal(found, plain(x)) else "the adapter adds nothing",
                    put(self=adapted, lora_ids=ids),
                ),
                Answer("no ids", _same_rows(plain(x)), put(self=adapted)),
            ],
        ),
        PublicCall(
            "layer.MoELayer.prepare",
            lambda self, num_tokens: sorted(_calls_of(self, num_tokens)),
            lambda: {"self": layer(), "num_tokens": (1, 3)},
            {},
            edges=[("no tokens", put(num_tokens=(0,)))],
            answers=[
                Answer("a call for each", _is([(1, False), (3, False)])),
                Answer(
                    "with adapters and without",
                    _is([(1, False), (1, True), (3, False), (3, True)]),
                    put(self=layer(adapters=table())),
                ),
            ],
        ),
        PublicCall(
            "fused_moe.fused_experts",
            lambda environment="cpu", **a: with_environment(environment, **a),
            lambda: dict(call),
            {},
            (
                Bad("MOEGATE_BACKEND", "is unknown where the backend is auto", put(environment="fastest")),
                Bad("input_scale", "stands without a scheme", put(input_scale=torch.ones(M, 1))),
            ),
            edges=[
                ("a backend that is named", put(environment="fastest", backend="cpu")),
                ("one choice on the input", lambda good: one(good) | {"apply_router_weight_on_input": True}),
            ],
        ),
    ]


def _dispatching(good: Arguments) -> Arguments:
    from ...impl.shared_experts import SharedExpertsSetting

    shared = torch.nn.Identity()
    return good | {"shared_experts": shared, "setting": SharedExpertsSetting(dispatch_runs_shared_experts=True)}


# --- weights in few bits ------------------------------------------------------------------------------------------

_LARGEST = {"fp8_w8a8": 448.0, "int8_w8a8": 127.0, "int8_w8a16": 127.0}
_VALUES = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8, "int8_w8a16": torch.int8}


def _quantized_wrong(w: torch.Tensor, scheme: str, rows: int, columns: int, parts: int) -> Callable[[Any], str]:
    """Scales of runs of `rows` (0: of all) times `columns`, and the nearest values to what is divided by them."""

    def wrong(found: Any) -> str:
        values, scale, zeros = found
        number, n, k = w.shape
        exact, part = w.double(), n // parts
        high = rows or n
        own_scale = torch.empty(number, n, k, dtype=torch.float64)
        amax = torch.empty(number, n, k, dtype=torch.float64)
        flat = scale.double().reshape(number, -1)
        index = 0
        for first in range(0, n, part if rows else n):
            last = first + (part if rows else n)
            for top in range(first, last, high):
                for left in range(0, k, columns):
                    block = (slice(None), slice(top, min(top + high, last)), slice(left, left + columns))
                    amax[block] = exact[block].abs().amax(dim=(1, 2), keepdim=True)
                    own_scale[block] = flat[:, index, None, None]
                    index += 1
        if values.dtype != _VALUES[scheme] or values.shape != w.shape or zeros is not None:
            return f"values {values.dtype} {list(values.shape)}, zero points {zeros}"
        if index != flat.shape[1] or scale.dtype != torch.float32:
            return f"expected {index} scales an expert in float32, got {scale.dtype} {list(scale.shape)}"
        right = torch.where(amax == 0, torch.ones_like(amax), amax / _LARGEST[scheme])
        if not ((own_scale - right).abs() <= 2**-22 * right).all():
            return f"scales are {own_scale.flatten()[:4]}, expected {right.flatten()[:4]}"
        scaled, dtype = exact / own_scale, _VALUES[scheme]
        reach = 2**-22 * scaled.abs()
        low, mid, top_ = (nearest(s, dtype) for s in (scaled - reach, scaled, scaled + reach))
        own = values.double()
        good = (own == low) | (own == mid) | (own == top_)
        return "" if good.all() else f"{int((~good).sum())} of {good.numel()} values are not the nearest"

    return wrong


def _int4_wrong(w: torch.Tensor, group: int, *, zero_points: bool) -> Callable[[Any], str]:
    """Two numbers of 4 bits in a byte, the even one low; 8 is zero where there are no zero points."""

    def unpacked(packed: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.stack((packed & 15, packed >> 4), dim=dim + 1).flatten(dim, dim + 1).double()

    def wrong(found: Any) -> str:
        values, scale, zeros = found
        number, n, k = w.shape
        if values.dtype != torch.uint8 or list(values.shape) != [number, n, k // 2]:
            return f"values {values.dtype} {list(values.shape)}"
        if list(scale.shape) != [number, n, k // group] or (zeros is not None) != zero_points:
            return f"scales {list(scale.shape)}, zero points {zeros}"
        groups = w.double().view(number, n, k // group, group)
        if zeros is None:
            width, zero = groups.abs().amax(dim=3) / 7, torch.full(scale.shape, 8.0, dtype=torch.float64)
        else:
            if zeros.dtype != torch.uint8 or list(zeros.shape) != [number, n // 2, k // group]:
                return f"zero points {zeros.dtype} {list(zeros.shape)}"
            low, high = groups.amin(dim=3).clamp(max=0), groups.amax(dim=3).clamp(min=0)
            width, zero = (high - low) / 15, unpacked(zeros, 1)
            aimed = torch.where(width == 0, 0.0, -low / scale.double())
            if not ((zero - aimed).abs() <= 0.5 + 1e-5).all():
                return f"zero points are {zero.flatten()[:4]}, expected {aimed.flatten()[:4]}"
        right = torch.where(width == 0, torch.ones_like(width), width)
        if not ((scale.double() - right).abs() <= 2**-21 * right).all():
            return f"scales are {scale.flatten()[:4]}, expected {right.flatten()[:4]}"
        steps = groups / scale.double()[..., None] + zero[..., None]
        off = (unpacked(values, 2).view(groups.shape) - steps.clamp(0, 15)).abs()
        return "" if (off <= 0.5 + 1e-4).all() else f"a value is {float(off.max())} steps off"

    return wrong


def _weights_calls() -> list[PublicCall]:
    w = _uneven(2, 12, 48, dtype=torch.float32) * torch.logspace(-2, 2, 12)[:, None]
    w[1, 3] = 0.0  # a row of zeros has scale 1
    w[0, 6:9, :16] = 0.0

    def asked(scheme: str, scale: str, shape: tuple[int, int] | None = None, **more: Any) -> Change:
        return put(w=w, scheme=scheme, weight_scale=scale, block_shape=shape, **more)

    cases = [
        Answer("fp8, one scale an expert", _quantized_wrong(w, "fp8_w8a8", 0, 48, 1), asked("fp8_w8a8", "tensor")),
        Answer("fp8, one a channel", _quantized_wrong(w, "fp8_w8a8", 1, 48, 1), asked("fp8_w8a8", "channel")),
        Answer("int8, one a channel", _quantized_wrong(w, "int8_w8a8", 1, 48, 1), asked("int8_w8a8", "channel")),
        Answer("int8, one a group", _quantized_wrong(w, "int8_w8a16", 1, 16, 1), asked("int8_w8a16", "group", (0, 16))),
        *(
            Answer(
                f"fp8 in blocks of {shape}, {parts} parts",
                _quantized_wrong(w, "fp8_w8a8", shape[0], shape[1], parts),
                asked("fp8_w8a8", "block", shape, parts=parts),
            )
            for shape, parts in product(((4, 16), (16, 16), (3, 32)), (1, 2, 3))
        ),
        *(
            Answer(
                f"int4{' with zero points' if zeros else ''}",
                _int4_wrong(w, 16, zero_points=zeros),
                asked("int4_w4a16", "group", (0, 16), zero_points=zeros),
            )
            for zeros in (False, True)
        ),
        Answer(
            "in bfloat16",
            _quantized_wrong(w.bfloat16(), "int8_w8a8", 1, 48, 1),
            put(w=w.bfloat16(), scheme="int8_w8a8", weight_scale="channel", block_shape=None),
        ),
    ]
    good = {"w": w, "scheme": "fp8_w8a8", "weight_scale": "channel", "block_shape": None}

    def experts_wrong(found: Any) -> str:
        w13, w2, quant = found
        first = quantize_weights(
            _uneven(E, 2 * I, H), QuantScheme.FP8_W8A8, weight_scale=quant.weight_scale, block_shape=(24, 16), parts=2
        )
        second = quantize_weights(
            _uneven(E, H, I), QuantScheme.FP8_W8A8, weight_scale=quant.weight_scale, block_shape=(24, 16)
        )
        same = all(
            torch.equal(own.float(), other.float())
            for own, other in (
                (w13, first[0]),
                (w2, second[0]),
                (quant.w13_scale, first[1]),
                (quant.w2_scale, second[1]),
            )
        )
        return "" if same and quant.block_shape == (24, 16) else "not the weights that quantize_weights gives"

    blocks = {"scheme": "fp8_w8a8", "weight_scale": "block", "block_shape": (24, 16)}
    row = _uneven(3, 40, dtype=torch.float32)
    return [
        PublicCall(
            "quantize.quantize_weights",
            quantize_weights,
            lambda: dict(good),
            {},
            (
                Bad("zero_points", "are of fp8", put(zero_points=True)),
                Bad(
                    "w",
                    "has an odd N with zero points",
                    lambda good: asked("int4_w4a16", "group", (0, 16), zero_points=True)(good) | {"w": w[:, :11]},
                ),
                Bad(
                    "w",
                    "has an odd K of int4",
                    lambda good: asked("int4_w4a16", "group", (0, 16))(good) | {"w": w[..., :47].contiguous()},
                ),
                Bad("block_shape", "has a group that does not divide K", asked("int8_w8a16", "group", (0, 32))),
                Bad("block_shape", "stands beside a channel", asked("fp8_w8a8", "channel", (16, 16))),
                Bad("weight_scale", "is of another scheme", asked("int8_w8a8", "tensor")),
            ),
            edges=[
                ("no experts", put(w=w[:0])),
                ("one row", put(w=w[:, :1])),
                ("an odd K", put(w=w[..., :47].contiguous())),
            ],
            answers=cases,
        ),
        PublicCall(
            "quantize.quantize_experts",
            quantize_experts,
            lambda: {"w13": _uneven(E, 2 * I, H), "w2": _uneven(E, H, I)} | blocks,
            {},
            edges=[("nothing gated", put(w13=_uneven(E, I, H), is_gated=False))],
            answers=[Answer("each of both", experts_wrong)],
        ),
        PublicCall(
            "quantize.quantize_activations",
            quantize_activations,
            lambda: {
                "x": row,
                "dtype": torch.int8,
                "scale": "static",
                "static_scale": torch.ones(1),
                "backend": "torch",
            },
            {},
            (
                Bad("static_scale", "has two elements", put(static_scale=torch.ones(2))),
                Bad("static_scale", "is bfloat16", put(static_scale=torch.ones(1).bfloat16())),
                Bad("static_scale", "is on another device", put(static_scale=torch.ones(1, device="meta"))),
                Bad("static_scale", "is a number", put(static_scale=1.0)),
            ),
            edges=[("a scale without dimensions", put(static_scale=torch.tensor(1.0))), ("no rows", put(x=row[:0]))],
        ),
    ]


# --- tiles --------------------------------------------------------------------------------------------------------


def _tile_calls() -> list[PublicCall]:
    smallest, largest = (16, 16, 16, 1, 1, 1), (256, 512, 512, 256, 16, 8)
    fields = ("block_size_m", "block_size_n", "block_size_k", "group_size_m", "num_warps", "num_stages")
    tile = KernelConfig(32, 64, 16, 4, 8, 3)

    def tile_is(sizes: Sequence[int]) -> Change:
        return lambda good: dict(zip(fields, sizes, strict=True))

    def memory(dtype: torch.dtype, tile: KernelConfig = tile) -> int:
        return tile.shared_memory(dtype)

    keys = [
        KEY,
        KEY.public,
        replace(KEY, group=32),
        replace(KEY, dtype="float32"),
        replace(KEY, num_experts=1, intermediate_size=1, hidden_size=1, top_k=1, group=1),
        replace(KEY, dtype="fp8_w8a8", block_shape=(1, 1)),
        replace(KEY.public, dtype="fp8_w8a8", block_shape=(128, 64)),
    ]
    spelled = [
        "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200.json",
        "E=8,N=32,device_name=NVIDIA_H200.json",
        "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200,group=32.json",
        "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200,dtype=float32.json",
        "E=1,N=1,H=1,top_k=1,device_name=NVIDIA_H200,group=1.json",
        "E=8,N=32,H=64,top_k=2,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[1,1].json",
        "E=8,N=32,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,64].json",
    ]
    layer_of = {
        "num_local_experts": 8, "intermediate_size": 32, "hidden_size": 64, "top_k": 2, "dtype": torch.bfloat16,
        "scheme": "none", "block_shape": None, "platform": H200,
    }  # fmt: skip
    by_layer = [
        ({}, KEY),
        ({"dtype": torch.float16}, KEY),
        ({"dtype": torch.float32}, replace(KEY, dtype="float32")),
        ({"scheme": "fp8_w8a8", "block_shape": (128, 64)}, replace(KEY, dtype="fp8_w8a8", block_shape=(128, 64))),
        ({"scheme": "int4_w4a16", "block_shape": (0, 32)}, replace(KEY, dtype="int4_w4a16", group=32)),
        ({"scheme": "fp8_w8a8"}, replace(KEY, dtype="fp8_w8a8")),
        ({"platform": replace(H200, name="NVIDIA H200 NVL")}, KEY),
        ({"platform": replace(H200, name="")}, None),
        ({"num_local_experts": 0}, None),
        ({"num_local_experts": 1}, replace(KEY, num_experts=1)),
    ]
    devices = {
        "NVIDIA H200": "NVIDIA_H200", "NVIDIA H200 NVL": "NVIDIA_H200", " NVIDIA L40S ": "NVIDIA_L40S",
        "Intel(R) Arc(TM) B60": "Intel(R)_Arc(TM)_B60", "a/b,c=d": "a_b_c_d",
        "NVIDIA GH200 480GB": "NVIDIA_GH200_480GB", "x" * 300: "x" * 100,
    }  # fmt: skip
    looked = SIZES | {"dtype": torch.bfloat16, "platform": H200}
    pair = (KernelConfig(16, 32, 16), KernelConfig(16, 64, 16))

    def found_in(**arguments: Any) -> Any:
        with kernel_config.use_kernel_configs(*pair):
            return lookup.find_kernel_configs(**arguments)

    return [
        PublicCall(
            "tuning.kernel_config.KernelConfig",
            KernelConfig,
            lambda: dict(zip(fields, smallest, strict=True)),
            {},
            (
                *(Bad(name, "is no power of two", put(**{name: 17})) for name in ("block_size_k",)),
                Bad("num_warps", "is no power of two", put(num_warps=6)),
            ),
            edges=[("the largest", tile_is(largest)), ("stages of any number", put(num_stages=3, group_size_m=5))],
            answers=[
                Answer(
                    "plain data",
                    lambda found: _is(dict(zip((*fields, "swap_ab"), (*largest, True), strict=True)))(found.as_dict()),
                    lambda good: tile_is(largest)(good) | {"swap_ab": True},
                ),
                # Its operands in flight, or the tile on its way out in float32.
                Answer(
                    "memory of operands",
                    lambda found: _is((32 + 64) * 16 * 2 * 3)(memory(torch.bfloat16, found)),
                    tile_is((32, 64, 16, 4, 8, 3)),
                ),
                Answer(
                    "memory of a tile",
                    lambda found: _is(32 * 64 * 4)(memory(torch.int8, found)),
                    tile_is((32, 64, 16, 4, 8, 1)),
                ),
                Answer(
                    "memory of float32",
                    lambda found: _is((32 + 64) * 16 * 4 * 3)(memory(torch.float32, found)),
                    tile_is((32, 64, 16, 4, 8, 3)),
                ),
            ],
        ),
        PublicCall(
            "tuning.kernel_config.use_kernel_configs",
            found_in,
            lambda: dict(looked),
            {},
            answers=[Answer("these tiles", _has(w13=pair[0], w2=pair[1], source="override"))],
        ),
        PublicCall(
            "tuning.lookup.find_kernel_configs",
            lookup.find_kernel_configs,
            lambda: lookup.forget() or dict(looked),
            {},
            (
                Bad("num_local_experts", "is negative", put(num_local_experts=-1)),
                Bad("is_gated", "is an int", put(is_gated=1)),
            ),
            edges=[
                ("one of each", put(num_tokens=1, top_k=1, num_experts=1)),
                ("a rank without experts", put(num_local_experts=0)),
                ("sizes of one", put(hidden_size=1, intermediate_size=1)),
            ],
            answers=[
                Answer(
                    "of this rank's experts",
                    lambda found: (
                        "" if "E=3,N=32" in " ".join(found.reasons) else f"looked for another layer: {found.reasons}"
                    ),
                    put(num_local_experts=3),
                ),
                Answer(
                    "of all experts",
                    lambda found: (
                        "" if "E=8,N=32" in " ".join(found.reasons) else f"looked for another layer: {found.reasons}"
                    ),
                ),
                Answer(
                    "of no expert",
                    lambda found: (
                        "" if "no tuned file is looked for" in " ".join(found.reasons) else f"got {found.reasons}"
                    ),
                    put(num_local_experts=0),
                ),
            ],
        ),
        PublicCall(
            "tuning.names.ConfigKey",
            names.ConfigKey,
            lambda: {"num_experts": 8, "intermediate_size": 32, "device_name": "NVIDIA_H200"},
            {},
            (
                Bad("hidden_size", "stands alone", put(hidden_size=64)),
                Bad("hidden_size", "lacks beside top_k", put(top_k=2)),
                Bad("hidden_size", "lacks beside a group", put(group=32)),
                Bad("device_name", "is empty", put(device_name="")),
                Bad("device_name", "has a space", put(device_name="NVIDIA H200")),
                Bad("dtype", "has capitals", put(dtype="FP8")),
                *(
                    Bad("block_shape", f"is {shape}", put(block_shape=shape))
                    for shape in ((0, 16), (16, 0), (16,), (16.0, 16), [16, 16])
                ),
            ),
            edges=[
                ("sizes of one", put(num_experts=1, intermediate_size=1, hidden_size=1, top_k=1, group=1)),
                ("blocks of one", put(block_shape=(1, 1))),
            ],
            answers=[
                Answer("public", _has(is_native=False)),
                Answer("native", _has(is_native=True), put(hidden_size=64, top_k=2)),
                *(
                    Answer(f"the name of {name}", _has(file_name=name), lambda good, key=key: vars(key))
                    for key, name in zip(keys, spelled, strict=True)
                ),
                *(
                    Answer(
                        f"what {name} leaves in public",
                        lambda found, key=key: _is((None, None, None, key.dtype, key.block_shape))(
                            (
                                found.public.hidden_size,
                                found.public.top_k,
                                found.public.group,
                                found.public.dtype,
                                found.public.block_shape,
                            )
                        ),
                        lambda good, key=key: vars(key),
                    )
                    for key, name in zip(keys, spelled, strict=True)
                ),
                Answer(
                    "its command",
                    lambda found: _is(
                        "moegate tune --shape E=8,N=32,H=64,top_k=2 --dtype int4_w4a16 --block-shape 0,32"
                    )(found.tune_command()),
                    lambda good: vars(replace(KEY, dtype="int4_w4a16", group=32)),
                ),
                Answer(
                    "its command of blocks",
                    lambda found: _is("moegate tune --shape E=8,N=32 --dtype fp8_w8a8 --block-shape 128,64")(
                        found.tune_command()
                    ),
                    lambda good: vars(keys[-1]),
                ),
                Answer(
                    "its command in float32",
                    lambda found: _is("moegate tune --shape E=8,N=32,H=64,top_k=2 --dtype fp32")(found.tune_command()),
                    lambda good: vars(keys[3]),
                ),
            ],
        ),
        PublicCall(
            "tuning.names.ConfigKey.parse",
            names.ConfigKey.parse,
            lambda: {"file_name": KEY.file_name},
            {},
            (
                Bad("file name", "has a padded number", put(file_name="E=08,N=32,device_name=NVIDIA_H200.json")),
                Bad("device_name", "has another H200", put(file_name="E=8,N=32,device_name=NVIDIA_H200_NVL.json")),
                Bad("num_experts", "is 0", put(file_name="E=0,N=32,device_name=NVIDIA_H200.json")),
                Bad("file name", "lacks top_k", put(file_name="E=8,N=32,H=64,device_name=NVIDIA_H200.json")),
            ),
            answers=[Answer(name, _is(key), put(file_name=name)) for key, name in zip(keys, spelled, strict=True)],
        ),
        PublicCall(
            "tuning.names.ConfigKey.of_layer",
            names.ConfigKey.of_layer,
            lambda: dict(layer_of),
            {},
            answers=[Answer(f"with {change}", _is(key), put(**change)) for change, key in by_layer],
        ),
        PublicCall(
            "tuning.names.normalise_device_name",
            names.normalise_device_name,
            lambda: {"name": "cpu"},
            {},
            answers=[Answer(name[:30], _is(spelled), put(name=name)) for name, spelled in devices.items()],
        ),
    ]


ANSWER_CALLS: tuple[PublicCall, ...] = (
    _config_call(),
    *_platform_calls(),
    *_mesh_calls(),
    *_placement_calls(),
    *_adapter_calls(),
    *_layer_calls(),
    *_weights_calls(),
    *_tile_calls(),
)

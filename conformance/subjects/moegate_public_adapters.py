"""What moegate's adapters and layers must answer.

Each rule stands here a second time, as it is documented.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from ...impl import platform
from ...impl.experts_module import RoutedExperts
from ...impl.fused_moe import fused_experts
from ...impl.layer import Gate, MoELayer, RoutingMethod
from ...impl.lora.adapter import Adapter, LowRank, lora_scaling
from ...impl.lora.table import AdapterTable
from ...impl.parallel import placement
from ...impl.parallel.experts import ParallelExperts
from ...impl.parallel.mesh import Mesh
from ...impl.parallel.ranks import Ranks
from ...impl.path import record_path
from ...impl.quantization import ExpertsQuantization
from ...impl.routing import select_experts
from ...impl.shared_experts import SharedExpertsSetting
from ..properties.api import good_arguments
from ..properties.bad_input import Arguments, Bad, Change, put
from ..properties.public import Answer, PublicCall
from .moegate_public import (
    E,
    H,
    I,
    K,
    M,
    adapter,
    equals,
    full,
    has,
    layer,
    low_rank,
    routed,
    same_rows,
    table,
    uneven,
    weights,
)
from .moegate_public_values import Alone, Done, alone


class Two(Alone):
    """The first of two ranks, as far as what is said of them goes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Any:
        out.view(2, -1).copy_(x.reshape(1, -1))  # the other has the same
        return Done()


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
                Answer("alpha / r", equals(4.0)),
                Answer("alpha / sqrt(r)", equals(8.0), stable),
                Answer("rank 1", equals(16.0), put(rank=1)),
            ],
        ),
        PublicCall(
            "lora.adapter.LowRank",
            LowRank,
            lambda: {"a": full(3, H), "b": full(I, 3)},
            {},
            edges=[("a scale of zero", put(scale=0.0)), ("rank 1", put(a=full(1, H), b=full(I, 1)))],
            answers=[Answer("its rank", has(rank=3, scale=1.0))],
        ),
        PublicCall(
            "lora.adapter.Adapter",
            Adapter,
            lambda: {"gate": {0: low_rank()}, "down": {1: low_rank(H, I, 3)}, "num_experts": E},
            {},
            edges=[("nothing adapted", put(gate={}, down={})), ("one expert", put(num_experts=1))],
            answers=[
                Answer("its largest rank", has(largest_rank=3)),
                Answer("of nothing", has(largest_rank=0), put(gate={}, down={})),
                Answer(
                    "its pairs",
                    lambda found: equals([("gate", 0, 2), ("down", 1, 3)])(
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
                Answer("no adapter", has(loaded=(), experts=(0, 1, 2, 3), num_local_experts=E)),
                Answer(
                    "experts of a map",
                    has(experts=(2, 0), num_local_experts=2),
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
                Answer("the first empty slot", lambda found: equals((0, (0,)))((found[0], found[1].loaded))),
                Answer(
                    "behind what is loaded",
                    lambda found: equals((0, (0, 1)))((found[0], found[1].loaded)),
                    lambda good: {"self": table(loaded=True), "adapter": adapter()},
                ),
                Answer(
                    "a slot that is named", lambda found: equals((1, (1,)))((found[0], found[1].loaded)), put(slot=1)
                ),
            ],
        ),
        PublicCall(
            "lora.table.AdapterTable.slices_of",
            lambda self, slot: _entries(self.slices_of(slot)),
            lambda: {"self": table(loaded=True), "slot": 1},
            {},
            answers=[
                Answer("of whole matrices", equals([("gate", 0, [2, H], [I, 2]), ("down", 1, [2, I], [H, 2])])),
                Answer("of an empty slot", equals([]), put(slot=0)),
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


def _uneven_layer(**options: Any) -> MoELayer:
    experts = RoutedExperts(uneven(E, 2 * I, H), uneven(E, H, I), backend="cpu")
    return MoELayer(Gate(uneven(E, H)), experts, RoutingMethod(K), **options)


def _uneven_adapter() -> Adapter:
    return Adapter(gate={e: LowRank(uneven(2, H), uneven(I, 2)) for e in range(E)})


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


def _overlapping() -> MoELayer:
    """A layer of one rank that asks for its shared experts beside the dispatch."""
    parallel = ParallelExperts(alone(), placement.linear_placement(E, 1), max_tokens=8, overlap=True)
    return _uneven_layer(shared_experts=torch.nn.Identity(), parallel=parallel)


def _order_of(self: MoELayer, hidden_states: torch.Tensor) -> str:
    with record_path() as record:
        self(hidden_states)
    return record.last("shared_experts_order")


# The shape of the scales of hidden states that come in few bits, by what shares one.
_SCALES_OF_INPUT = {"fp8_static": (1,), "fp8_channel": (M, 1), "fp8_block": (M, 2)}


def _in_few_bits(base: str, shape: tuple[int, ...] | None = None) -> Change:
    """A call with hidden states that are quantised already, and scales of a shape (None: the right one)."""

    def change(good: Arguments) -> Arguments:
        given = good_arguments("fused_experts", "cpu", base)
        x = given["hidden_states"]
        dtype = torch.int8 if base.startswith("int8") else torch.float8_e4m3fn
        scale = torch.ones(_SCALES_OF_INPUT[base] if shape is None else shape)
        quant = {"quant": ExpertsQuantization(**given["quant"])}
        return good | given | quant | {"hidden_states": x.to(dtype), "input_scale": scale, "out": x.clone()}

    return change


def _fully_sharded(good: Arguments) -> Arguments:
    """A layer whose adapters are cut over a group of one rank."""
    group = Alone()
    ranks = Ranks(Mesh(), group, None, None, group)
    parallel = ParallelExperts(ranks, placement.linear_placement(E, 1), max_tokens=8)
    return good | {"parallel": parallel, "adapters": AdapterTable(**_sizes(fully_sharded_over=group))}


def _on_a_cpu(interpreted: bool | None, function: Callable[..., Any], **arguments: Any) -> Any:
    """A call on a CPU that does or does not run Triton's kernels; None: as this one does."""
    here = platform._cpu()
    there = here if interpreted is None else replace(here, interpreted=interpreted)
    with mock.patch.object(platform, "_cpu", return_value=there):
        return function(**arguments)


def _without_out(good: Arguments) -> Arguments:
    return _in_few_bits("fp8_static")(good) | {"out": None}


def _layer_calls() -> list[PublicCall]:
    x = uneven(M, H)
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
                *(
                    Bad(
                        "adapters",
                        f"beside parallel have {what}",
                        put(**beside, adapters=AdapterTable(**_sizes(**own))),
                    )
                    for what, own in (
                        ("more experts", {"num_experts": E + 1}),
                        ("experts in another order", {"expert_map": [3, 2, 1, 0]}),
                        ("other ranks", {"fully_sharded_over": Alone()}),
                        ("another I", {"intermediate_size": 2 * I}),
                    )
                ),
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
            answers=[
                Answer(
                    "fully sharded adapters are part of its setting",
                    lambda found: equals(True)(found.setting.fully_sharded_lora),
                    _fully_sharded,
                ),
                Answer("others are not", lambda found: equals(False)(found.setting.fully_sharded_lora)),
            ],
        ),
        PublicCall(
            "layer.MoELayer.forward",
            _order_of,
            lambda: {"self": _overlapping(), "hidden_states": x},
            {},
            answers=[
                Answer("shared experts beside the dispatch", equals("mk_internal_overlapped")),
                Answer("no shared experts", equals("none"), put(self=plain)),
            ],
        ),
        PublicCall(
            "layer.MoELayer.forward",
            lambda self, **a: self(**a),
            lambda: {"self": plain, "hidden_states": x},
            {},
            edges=[("no tokens", put(hidden_states=x[:0]))],
            answers=[
                Answer("a row alone", same_rows(lambda: plain(x[:1])[0]), put(hidden_states=x[0])),
                Answer(
                    "two leading dimensions",
                    same_rows(lambda: plain(x).view(2, 2, H)),
                    put(hidden_states=x.view(2, 2, H)),
                ),
                Answer(
                    "ids with leading dimensions",
                    same_rows(lambda: adapted(x, ids).view(2, 2, H)),
                    put(self=adapted, hidden_states=x.view(2, 2, H), lora_ids=ids.view(2, 2)),
                ),
                Answer(
                    "ids that say something",
                    lambda found: "" if not torch.equal(found, plain(x)) else "the adapter adds nothing",
                    put(self=adapted, lora_ids=ids),
                ),
                Answer("no ids", same_rows(lambda: plain(x)), put(self=adapted)),
            ],
        ),
        PublicCall(
            "layer.MoELayer.prepare",
            lambda self, num_tokens: sorted(_calls_of(self, num_tokens)),
            lambda: {"self": layer(), "num_tokens": (1, 3)},
            {},
            edges=[("no tokens", put(num_tokens=(0,)))],
            answers=[
                Answer("a call for each", equals([(1, False), (3, False)])),
                Answer(
                    "with adapters and without",
                    equals([(1, False), (1, True), (3, False), (3, True)]),
                    put(self=layer(adapters=table())),
                ),
            ],
        ),
        PublicCall(
            "parallel.experts.ParallelExperts",
            ParallelExperts,
            lambda: {"ranks": alone(), "placement": placement.linear_placement(E, 1), "max_tokens": 8},
            {},
            (
                Bad(
                    "exchange",
                    "takes tokens to whole experts where ranks have parts of them",
                    put(ranks=Ranks(Mesh(2, 2, 1), Two(), None, None, None), exchange="all_to_all"),
                ),
            ),
            edges=[("the other exchange", put(exchange="all_to_all")), ("one token", put(max_tokens=1))],
        ),
        PublicCall(
            "routing.select_experts",
            lambda interpreted=None, **a: _on_a_cpu(interpreted, select_experts, **a),
            lambda: {"router_logits": full(M, E, dtype=torch.float32), "top_k": K},
            {},
            (Bad("backend", "is one that does not run here", put(backend="triton", interpreted=False)),),
            edges=[("no backend, where Triton does not run", put(interpreted=False))],
        ),
        PublicCall(
            "fused_moe.fused_experts",
            lambda environment="cpu", **a: with_environment(environment, **a),
            lambda: dict(call),
            {},
            (
                Bad("MOEGATE_BACKEND", "is unknown where the backend is auto", put(environment="fastest")),
                Bad("input_scale", "stands without a scheme", put(input_scale=torch.ones(M, 1))),
                Bad("input_scale", "stands beside weights alone in few bits", _in_few_bits("int8_channel", (M, 1))),
                *(
                    Bad("input_scale", f"is {list(shape)} for {base}", _in_few_bits(base, shape))
                    for base, own in _SCALES_OF_INPUT.items()
                    for shape in ((1,), (2,), (M, 1), (M, 2), (M, 3), (M + 1, 1))
                    if shape != own
                ),
                Bad("out", "is missing beside input_scale", _without_out),
            ),
            edges=[
                *((f"hidden states in few bits, {base}", _in_few_bits(base)) for base in _SCALES_OF_INPUT),
                ("a backend that is named", put(environment="fastest", backend="cpu")),
                ("one choice on the input", lambda good: one(good) | {"apply_router_weight_on_input": True}),
            ],
        ),
    ]


def _dispatching(good: Arguments) -> Arguments:
    shared = torch.nn.Identity()
    return good | {"shared_experts": shared, "setting": SharedExpertsSetting(dispatch_runs_shared_experts=True)}


ADAPTER_CALLS: tuple[PublicCall, ...] = (*_adapter_calls(), *_layer_calls())

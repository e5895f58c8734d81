"""Every pair of features of an experts call that is declared is really run: covering arrays of pinned specs.

Two arrays, one for each activation format, since a routing, a map and a path are features of the standard format alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from .pairwise import Row, covering_array, pairs_of
from .spec import SCHEMES, TILE, VALUES, BatchedSpec, ExpertsSpec
from .strategies import Pools, may_go_together, pools_of, scaled_dtypes
from .subject import Capabilities

Features = dict[str, tuple[Any, ...]]
AnySpec = TypeVar("AnySpec", ExpertsSpec, BatchedSpec)


def _layer_features(capabilities: Capabilities) -> Features:
    return {
        "scheme": capabilities.schemes,
        "activation": capabilities.activations,
        "dtype": capabilities.dtypes,
        "bias": capabilities.biases,
        "values": VALUES,
        "padded_rows": (False, True) if capabilities.padded_rows else (False,),
    }


def experts_features(capabilities: Capabilities) -> Features:
    """The features of an experts spec and their declared values."""
    return _layer_features(capabilities) | {
        "format": ("standard",),
        "path": ("aligned", "naive"),
        "routing": capabilities.routings,
        "expert_map": capabilities.maps,
        "weights": capabilities.weights,
        "weight_on_input": (False, True) if capabilities.weight_on_input else (False,),
    }


def batched_features(capabilities: Capabilities) -> Features:
    """The features of a batched spec and their declared values."""
    return _layer_features(capabilities.of_slabs()) | {
        "format": ("batched",),
        "counts": tuple(counts for counts in capabilities.counts if capabilities.empty or counts != "zero"),
    }


# Which features go together, each rule by the features that it speaks of.
_RULES: tuple[tuple[tuple[str, ...], Callable[..., bool]], ...] = (
    (("scheme", "dtype"), lambda scheme, dtype: may_go_together(scheme, "silu", dtype)),
    (("scheme", "activation"), lambda scheme, activation: may_go_together(scheme, activation, "bfloat16")),
    # Few pairs are neither a tile nor under a map, and weights grouped along K are always aligned.
    (("path", "expert_map"), lambda path, expert_map: path == "aligned" or expert_map == "none"),
    (("path", "routing"), lambda path, routing: path == "aligned" or not routing.startswith("tile")),
    (("path", "scheme"), lambda path, scheme: path == "aligned" or SCHEMES[scheme].weight_scale != "group"),
)


def is_possible(row: Row) -> bool:
    """Whether the features of a row go together; a rule about one that is not there yet says nothing."""
    return all(holds(*(row[name] for name in names)) for names, holds in _RULES if all(name in row for name in names))


@cache
def _rows(features: tuple[tuple[str, tuple[Any, ...]], ...], dtypes: tuple[str, ...]) -> tuple[Row, ...]:
    def is_run(row: Row) -> bool:
        return is_possible(row) and (row["scheme"] == "none" or row["dtype"] in dtypes)

    return tuple(covering_array(dict(features), is_run))


def rows(device: str, capabilities: Capabilities, *, batched: bool = False) -> tuple[Row, ...]:
    """The covering array of one format on a device.

    Beside weights of few bits a device takes the dtypes of its pools: on a GPU each more is as many kernels to compile,
    and the CPU runs them all.
    """
    features = batched_features(capabilities) if batched else experts_features(capabilities)
    return _rows(tuple(features.items()), scaled_dtypes(device, capabilities))


def declared_pairs(device: str, capabilities: Capabilities, *, batched: bool = False) -> set[str]:
    """Every pair of features that the capabilities declare and that go together, as `Ledger.pairs` names them."""
    array = rows(device, capabilities, batched=batched)
    return {f"{a}={x} & {b}={y}" for row in array for (a, x), (b, y) in pairs_of(row)}


def pinned_experts(device: str, capabilities: Capabilities) -> tuple[ExpertsSpec, ...]:
    """Experts specs that between them hold every declared pair of features.

    And for each scheme one on which an expert has several blocks: several pairs on the naive path, or, where a scheme
    has none, all of them. A row in which no token has an expert here says nothing of the layer: it is run again with
    some.
    """
    pools = pools_of(device, capabilities)
    sizes, specs = _Sizes(pools), []
    with_several_blocks: set[str] = set()
    for number, row in enumerate(rows(device, capabilities)):
        features = {name: value for name, value in row.items() if name not in ("format", "path")}
        base = ExpertsSpec(**sizes.of(row), M=1, E=1, top_k=1, seed=number % 256, **features)
        sized = _with_blocks(base, pools, number) if row["path"] == "aligned" else _with_few_pairs(base, pools)
        specs.append(sized)
        judged = _with_experts_here(sized, capabilities)
        if judged != sized:
            specs.append(judged)
        has_groups = SCHEMES[base.scheme].weight_scale == "group"
        if row["path"] == "aligned" and not has_groups:
            continue
        crowded = replace(specs[-1], routing="one_expert")
        if has_groups:
            crowded = replace(crowded, M=max(crowded.M, TILE + 1), expert_map=capabilities.maps[0])
        scheme_is_new = base.scheme not in with_several_blocks
        if scheme_is_new and "one_expert" in capabilities.routings:
            specs.append(crowded)
            with_several_blocks.add(base.scheme)
    if device == "cpu":  # on a GPU each is a kernel more to compile
        specs.extend(_plain_activations(pools, capabilities))
    return _repeated(specs, pools)


def _plain_activations(pools: Pools, capabilities: Capabilities) -> list[ExpertsSpec]:
    """Each activation where it shows best: on values of order 1, with every token routed, in float32 where that is.

    Two that are alike (GELU and its form by tanh) differ by less than a rounding to 16 bits.
    """
    if "uniform" not in capabilities.routings:
        return []
    hidden, intermediate, _, _ = max(pools.shapes_of(), key=lambda shape: shape[1])
    base = ExpertsSpec(
        M=TILE + 5,
        H=hidden,
        I=intermediate,
        E=4,
        top_k=2,
        dtype="float32" if "float32" in capabilities.dtypes else capabilities.dtypes[0],
        weights=capabilities.weights[0],
        expert_map=capabilities.maps[0],
        bias=capabilities.biases[0],
    )
    return [replace(base, activation=activation) for activation in capabilities.activations]


def pinned_slabs(device: str, capabilities: Capabilities) -> tuple[BatchedSpec, ...]:
    """Batched specs that between them hold every declared pair of features; those without a token, again with some."""
    pools = pools_of(device, capabilities)
    sizes = _Sizes(pools)
    rows_of_slab = [rows for rows in pools.slabs if rows > TILE][:3]
    specs = []
    for number, row in enumerate(rows(device, capabilities, batched=True)):
        spec = BatchedSpec(
            **sizes.of(row),
            max_tokens=rows_of_slab[number % len(rows_of_slab)],
            E=(3, 2, 5)[number % 3],
            seed=number % 256,
            **{name: value for name, value in row.items() if name != "format"},
        )
        specs.append(spec)
        if spec.counts == "zero" and "uneven" in capabilities.counts:
            specs.append(replace(spec, counts="uneven"))
    return _repeated(specs, pools)


def _with_experts_here(spec: ExpertsSpec, capabilities: Capabilities) -> ExpertsSpec:
    """The spec with tokens that have an expert on this rank; itself where they have, or where none is declared."""
    if spec.routing == "all_invalid" and "uniform" in capabilities.routings:
        spec = replace(spec, routing="uniform")
    if spec.expert_map == "owns_nothing" and "owns_all" in capabilities.maps:
        spec = replace(spec, expert_map="owns_all")
    return spec


def _repeated(specs: Sequence[AnySpec], pools: Pools) -> tuple[AnySpec, ...]:
    """The specs again and again, each time with other values."""
    return tuple(replace(spec, seed=(spec.seed + 31 * again) % 256) for again in range(pools.repeats) for spec in specs)


def once(specs: Iterable[AnySpec]) -> list[AnySpec]:
    """Pinned specs without their repetitions, which differ in the seed alone."""
    return list({replace(spec, seed=0): spec for spec in specs}.values())


class _Sizes:
    """Sizes for one row after the other: of each scheme on each path in turn, those with most tails first."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._taken: Counter[tuple[Any, ...]] = Counter()

    def of(self, row: Row) -> dict[str, int]:
        """H, I and the blocks of a row's spec."""
        shapes = sorted(self._pools.shapes_of(row["scheme"], row["dtype"]), key=_whole_steps)
        kind = (row["scheme"], row.get("path"), len(shapes))
        hidden, intermediate, block_n, block_k = shapes[self._taken[kind] % len(shapes)]
        self._taken[kind] += 1
        return {"H": hidden, "I": intermediate, "block_n": block_n, "block_k": block_k}


def _whole_steps(shape: tuple[int, ...]) -> int:
    """How many of H and I fill their last step of 32, or have one step alone."""
    return sum(size <= 32 or size % 32 == 0 for size in shape[:2])


def _with_few_pairs(spec: ExpertsSpec, pools: Pools) -> ExpertsSpec:
    """Two tokens or more, so that an expert may have two blocks, under the threshold of naive blocks."""
    experts = pools.many_experts[0]
    top_k = 1 if spec.weight_on_input else 2
    return replace(spec, E=experts, top_k=top_k, M=experts // (4 * top_k))


def _with_blocks(spec: ExpertsSpec, pools: Pools, number: int) -> ExpertsSpec:
    """Several experts, and so many tokens that one of them has two blocks of 16 rows."""
    top_k = 1 if spec.weight_on_input else 2
    tokens = 2 * TILE if spec.routing in ("uniform", "some_invalid", "repeated") else TILE + 5
    experts = 8 if pools.scaled_rows else (4, 3, 5)[number % 3]  # eight have a mean of 8 rows, and blocks of 16
    return replace(spec, E=experts, top_k=top_k, M=min(tokens + (experts < 8), pools.max_tokens))

"""Strategies: how specs are drawn. They draw what the subject declares, so that nothing drawn has to be thrown away.

Compile-relevant values (H, I, dtype) come from small named pools; nasty shapes and routings have names (`spec.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from hypothesis import strategies as st

from .pairwise import covering_array
from .spec import (
    ACTIVATIONS,
    DTYPES,
    GROUP_RANKINGS,
    ROWS,
    SCHEMES,
    SCORINGS,
    TILE,
    VALUES,
    AlignSpec,
    BatchedSpec,
    ExpertsSpec,
    QuantizeSpec,
    RoutingSpec,
)
from .subject import Capabilities

Shape = tuple[int, int, int, int]
"""H, I, and (block_n, block_k) of a scheme that has blocks or groups, else zeros."""


# Columns of a row that takes kernels more than one step: their blocks end at 1024.
WIDE = 1040
# More experts than a scan with one of them a thread covers.
EXPERTS_BEYOND_A_BLOCK = 1025


@dataclass(frozen=True)
class Pools:
    """Sizes that cases are drawn from.

    Attributes:
        shapes: (H, I) pairs; each is a set of compiled kernels, and nothing else that is drawn is.
        scaled_shapes: of schemes with one scale for an expert or a channel.
        block_shapes: of schemes with blocks.
        group_shapes: of schemes with groups along K, which divide H and I.
        scaled_dtypes: of activations beside weights of few bits.
        scaled_rows: ranges of the mean rows of an expert with such weights; empty for any. Each is a tile, and so a
            compiled kernel.
        drawn_activations: activations that chance draws; the pinned specs have them all. None means any.
        drawn_biases: likewise.
        repeats: how often each pinned spec is run, with other values.
        experts: E of most cases.
        many_experts: E of the cases that reach the low-latency path.
        max_tokens: of most cases.
        routing_experts: E of routing cases where softmax is all.
        scored_experts: E of other routings without groups.
        grouped_experts: E of routings with groups.
        block_sizes: of alignment cases.
        widths, groups: columns of rows that are quantised by themselves, and of their groups.
        slabs: max_tokens of the batched format.
        routing_top_k: the largest of routing cases.
        top_k: the largest of other cases.
        cases: how many cases are drawn where the gate draws one on the CPU: a GPU has the time for more.
        value_cases: the same of the cases whose numbers are judged.
        is_compiled: each kind of kernel is one to compile, so that cases whose point is another one share kernels.
    """

    shapes: tuple[tuple[int, int], ...]
    experts: tuple[int, ...]
    many_experts: tuple[int, ...]
    max_tokens: int
    routing_experts: tuple[int, ...]
    scored_experts: tuple[int, ...]
    grouped_experts: tuple[int, ...]
    block_sizes: tuple[int, ...] = (16, 32, 64, 128)
    scaled_shapes: tuple[tuple[int, int], ...] = ()
    block_shapes: tuple[Shape, ...] = ()
    group_shapes: tuple[Shape, ...] = ()
    scaled_dtypes: tuple[str, ...] = ("bfloat16", "float16")
    scaled_rows: tuple[tuple[int, int], ...] = ()
    drawn_activations: tuple[str, ...] | None = None
    drawn_biases: tuple[str, ...] | None = None
    repeats: int = 1
    # Around a group's and a tile's edge: enough to meet every kind of tail.
    widths: tuple[int, ...] = (72, 1, 15, 16, 33, 128, 200, WIDE)
    groups: tuple[int, ...] = (32, 48, 16, 128)  # a group need not be a power of two, as a kernel's block is
    slabs: tuple[int, ...] = (1, 15, 16, 18, 33)
    routing_top_k: int = 10
    top_k: int = 8
    cases: float = 1.0
    value_cases: float = 1.0
    is_compiled: bool = False

    def shapes_of(self, scheme: str = "none", dtype: str | None = None) -> tuple[Shape, ...]:
        """The sizes that are drawn with a scheme; where kernels are compiled, other dtypes have one alone."""
        if self.is_compiled and dtype is not None and dtype not in self.scaled_dtypes:
            return tuple((*shape, 0, 0) for shape in self.shapes[:1])
        if SCHEMES[scheme].weight_scale == "block":
            return self.block_shapes
        if SCHEMES[scheme].weight_scale == "group":
            return self.group_shapes
        return tuple((*shape, 0, 0) for shape in (self.shapes if scheme == "none" else self.scaled_shapes))


POOLS = {
    # Small shapes that still take every turn of small tiles: several K steps with a tail, two N tiles with a tail.
    "cpu": Pools(
        shapes=((64, 32), (40, 24), (96, 16), (72, 56), (16, 8), (33, 17)),
        experts=(1, 2, 3, 5, 8),
        many_experts=(32, 64),
        scaled_shapes=((72, 56), (96, 80), (40, 24), (33, 17)),
        # Several blocks along each axis of both weights, the last ones cut off, and more rows of blocks than columns.
        block_shapes=(
            (72, 56, 32, 32),
            (72, 56, 16, 32),
            (96, 80, 32, 32),
            (56, 72, 32, 16),
            (160, 144, 128, 128),
            (104, 80, 32, 48),
        ),
        group_shapes=((80, 48, 0, 16), (80, 48, 0, 16), (96, 64, 0, 32), (112, 80, 0, 16), (128, 64, 0, 64)),
        max_tokens=33,
        routing_experts=(1, 2, 5, 8, 60, 64, 128, 257),
        scored_experts=(1, 2, 5, 8, 60, 64, 128, 257),
        grouped_experts=(8, 60, 128),
    ),
    "cuda": Pools(
        # One of whole tiles, and one that neither tiles nor the 16 elements that compilers know sizes by divide.
        shapes=((256, 128), (200, 76)),
        scaled_shapes=((320, 464),),
        block_shapes=((320, 464, 128, 128),),
        group_shapes=((288, 160, 0, 32), (256, 128, 0, 128)),
        scaled_dtypes=("bfloat16",),
        widths=(200, WIDE),
        groups=(128, 48),
        scaled_rows=((1, 8), (17, 32)),
        drawn_activations=("silu", "swigluoai_interleaved"),
        drawn_biases=("none",),
        repeats=8,
        experts=(1, 2, 5, 8, 16),
        many_experts=(64, 128),
        max_tokens=300,
        routing_experts=(1, 60, 1024),
        scored_experts=(128, 1024),
        grouped_experts=(8, 128),
        slabs=(16, 200),  # one block, and several with a part of one
        routing_top_k=8,
        cases=1.8,
        value_cases=3.9,
        is_compiled=True,
        block_sizes=(16, 64, 128),
    ),
}


@cache
def pools_of(device: str, capabilities: Capabilities) -> Pools:
    """The pools of a device within the sizes that a subject declares: H and I rounded up, larger E left out."""
    can, pools = capabilities, POOLS[device]

    def up(size: int, multiple: int) -> int:
        return -(-size // multiple) * multiple

    def shapes(pool: tuple[tuple[int, ...], ...]) -> Any:
        rounded = ((up(h, can.hidden_multiple), up(i, can.intermediate_multiple), *rest) for h, i, *rest in pool)
        return tuple(dict.fromkeys(rounded))

    def few(experts: tuple[int, ...]) -> tuple[int, ...]:
        most = can.max_experts or max(experts)
        return tuple(e for e in experts if can.min_experts <= e <= most) or (most,)

    experts = ("experts", "many_experts", "routing_experts", "scored_experts", "grouped_experts")
    shaped = ("shapes", "scaled_shapes", "block_shapes", "group_shapes")
    most = can.max_top_k or pools.routing_top_k
    return replace(
        pools,
        **{name: few(getattr(pools, name)) for name in experts},
        **{name: shapes(getattr(pools, name)) for name in shaped},
        routing_top_k=min(most, pools.routing_top_k),
        top_k=min(most, pools.top_k),
    )


SEEDS = st.integers(0, 255)
# Up to so many mean rows of an expert implementations have one size of blocks, their smallest.
MEAN_ROWS = 8
# Around here implementations change from one launch to several.
MANY_PAIRS = 4096


def _experts_of(pools: Pools, spec: RoutingSpec) -> list[int]:
    """E of the pools that a routing method goes with: each E, or E and groups, is a compiled kernel on a GPU."""
    sizes = pools.grouped_experts if spec.groups != "none" else pools.scored_experts
    return [e for e in (pools.routing_experts if spec.is_plain() else sizes) if replace(spec, E=e).most_choices()]


def _layouts(pools: Pools, spec: RoutingSpec, capabilities: Capabilities) -> list[RoutingSpec]:
    """The spec with each of the declared groups and rankings that some E of the pools goes with."""
    plain = replace(spec, groups="none", group_ranking="max")
    if spec.scoring == "custom":
        return [plain]
    grouped = [
        replace(spec, groups=groups, group_ranking=ranking)
        for groups in capabilities.groups
        for ranking in capabilities.group_rankings
        if groups != "none"
    ]
    return [layout for layout in (plain, *grouped) if _experts_of(pools, layout)]


def routing_specs(device: str, capabilities: Capabilities) -> st.SearchStrategy[RoutingSpec]:
    """Calls of the routing, every kind of logits and every method that the subject declares.

    A third are softmax alone, which most models have.
    """
    pools = pools_of(device, capabilities)
    # Where all tokens are padding there is little to judge.
    with_tokens = tuple(padding for padding in capabilities.paddings if padding != "all_tokens")

    @st.composite
    def specs(draw: st.DrawFn) -> RoutingSpec:
        method = RoutingSpec(M=1, E=1, top_k=1)
        if "softmax" not in capabilities.scorings or draw(st.integers(0, 2)):
            scoring = draw(st.sampled_from(capabilities.scorings))
            biases = capabilities.correction_biases if scoring != "custom" else ("none",)
            method = replace(method, scoring=scoring, correction_bias=draw(st.sampled_from(biases)))
            method = draw(st.sampled_from(_layouts(pools, method, capabilities)))
        method = replace(method, E=draw(st.sampled_from(_experts_of(pools, method))))
        return replace(
            method,
            M=draw(st.integers(0 if capabilities.empty else 1, 9)),
            top_k=draw(st.integers(1, min(method.most_choices(), pools.routing_top_k))),
            dtype=draw(st.sampled_from(routing_dtypes(device, capabilities, method.E))),
            logits=draw(st.sampled_from(capabilities.logits)),
            renormalize=draw(st.booleans()),
            padded_rows=draw(st.booleans()) if capabilities.padded_rows else False,
            scaling=draw(st.sampled_from(capabilities.scalings)),
            padding=draw(st.sampled_from((*capabilities.paddings, *with_tokens))),
            seed=draw(SEEDS),
        )

    return specs()


def routing_dtypes(device: str, capabilities: Capabilities, num_experts: int) -> tuple[str, ...]:
    """Dtypes of routings that are drawn of E experts.

    Where kernels are compiled, an E that the pinned routings do not have, with every dtype, has one alone.
    """
    pools = pools_of(device, capabilities)
    if not pools.is_compiled or num_experts in pools.grouped_experts:
        return capabilities.dtypes
    sizes = sorted({*pools.routing_experts, *pools.scored_experts})
    return (capabilities.dtypes[sizes.index(num_experts) % len(capabilities.dtypes)],)


def routing_features(device: str, capabilities: Capabilities) -> dict[str, tuple[Any, ...]]:
    """The features of a routing whose every pair is run, with the values that the subject declares."""
    pools = pools_of(device, capabilities)
    return {
        "scoring": capabilities.scorings,
        "groups": capabilities.groups,
        "group_ranking": capabilities.group_rankings,
        "correction_bias": capabilities.correction_biases,
        "renormalize": (True, False),
        "scaling": capabilities.scalings,
        "padding": capabilities.paddings,
        "dtype": capabilities.dtypes,
        "logits": capabilities.logits,
        "padded_rows": (False, True) if capabilities.padded_rows else (False,),
        "E": pools.grouped_experts,
        "top_k": tuple(k for k in (1, 2, 8) if k <= pools.routing_top_k),
    }


def is_routing(row: Mapping[str, Any]) -> bool:
    """Whether features of `routing_features` go together, of a row that may be incomplete."""
    method = {name: row[name] for name in ("E", "scoring", "groups", "group_ranking", "correction_bias")}
    return row["top_k"] <= RoutingSpec(M=1, top_k=1, **method).most_choices()


def _nasty_routings(num_experts: int) -> Iterator[RoutingSpec]:
    """Routings that take three features or more to be what they are."""
    scorings = [scoring for scoring in SCORINGS if scoring != "custom"]
    for seed, scoring in enumerate(scorings):
        base = RoutingSpec(M=9, E=num_experts, top_k=3, scoring=scoring, seed=seed)
        # Score plus bias ties at the k-th, and so do whole groups, of which the lower are kept.
        yield replace(base, logits="ties", correction_bias="ties")
        yield replace(base, logits="ties", correction_bias="ties", dtype="bfloat16", seed=seed + 3)
        for ranking, bias in product(GROUP_RANKINGS, ("none", "equal")):
            yield replace(
                base, logits="equal_groups", groups="some", group_ranking=ranking, correction_bias=bias, top_k=2
            )
        # Experts of several kept groups tie at the k-th, and the best group is not the first.
        for own in range(4):
            yield replace(base, logits="ties", groups="some", top_k=4, seed=own)
        # A mask of 0 ranks above every expert of the kept groups.
        yield replace(base, groups="some", group_ranking="top2_sum", correction_bias="negative", top_k=2)
        # A renormalising sum of 0, and of infinity.
        yield replace(base, logits="infinite_rows", renormalize=True)
        yield replace(base, logits="infinite_rows", renormalize=True, seed=seed + 3)
        yield replace(base, logits="nan_rows", renormalize=True)
    # So many choices that sorting a row is cheaper than one maximum after the other, and half as many.
    yield RoutingSpec(M=9, E=128, top_k=40)
    yield RoutingSpec(M=9, E=128, top_k=22)
    yield RoutingSpec(M=9, E=128, top_k=22, scoring="sigmoid", correction_bias="unit", scaling="above_one", seed=1)


def _declares_routing(capabilities: Capabilities, spec: RoutingSpec) -> bool:
    declared = routing_features("cpu", capabilities)
    return all(value in declared[name] for name, value in spec.features().items())


@cache
def pinned_routings(device: str, capabilities: Capabilities) -> tuple[RoutingSpec, ...]:
    """Routings that are always run: between them every pair of declared features, and those that take more than two."""
    rows = covering_array(routing_features(device, capabilities), is_routing)
    pairs = [RoutingSpec(M=7, seed=seed, **row) for seed, row in enumerate(rows)]
    pools = pools_of(device, capabilities)
    nasty = [spec for spec in _nasty_routings(pools.grouped_experts[0]) if _declares_routing(capabilities, spec)]
    most, experts = capabilities.max_top_k, capabilities.max_experts
    nasty = [spec for spec in nasty if spec.top_k <= (most or spec.top_k) and (experts or spec.E) >= spec.E]
    return (*pairs, *nasty)


def _needs(routing: str, tile: int, capabilities: Capabilities) -> tuple[int, int]:
    """The fewest tokens that a routing needs to be what its name says, and the experts that no token may need."""
    if routing.startswith("tile"):
        return tile + 1, 1
    return (0 if capabilities.empty else 1), 0


def may_go_together(scheme: str, activation: str, dtype: str) -> bool:
    """Whether a scheme takes activations of a dtype, and an activation's order of rows.

    Weights of few bits stand beside 16-bit activations, and blocks of interleaved rows would mix gate and up.
    """
    if scheme == "none":
        return True
    interleaved = ACTIVATIONS[activation][1].get("interleaved", False)
    return dtype != "float32" and not (interleaved and SCHEMES[scheme].weight_scale == "block")


@st.composite
def _layers(draw: st.DrawFn, pools: Pools, capabilities: Capabilities, dtype: str) -> dict[str, Any]:
    """What the layer is: half of all are plain, so that no feature crowds the others out."""

    def plain_or(values: tuple[str, ...], plain: str) -> str:
        others = [value for value in values if value != plain]
        if plain not in values or (others and draw(st.booleans())):
            return draw(st.sampled_from(others))
        return plain

    schemes = capabilities.schemes if dtype in pools.scaled_dtypes else ("none",)
    scheme = plain_or(schemes, "none")
    dynamic = [name for name in schemes if SCHEMES[name].activation_scale in ("token", "group")]
    fitting = [a for a in capabilities.activations if may_go_together(scheme, a, dtype)]
    fitting = [a for a in fitting if a in (pools.drawn_activations or fitting)] or fitting
    biases = tuple(b for b in capabilities.biases if b in (pools.drawn_biases or capabilities.biases))
    hidden, intermediate, block_n, block_k = draw(st.sampled_from(pools.shapes_of(scheme, dtype)))
    return {
        "H": hidden,
        "I": intermediate,
        "block_n": block_n,
        "block_k": block_k,
        "dtype": dtype,
        "scheme": scheme,
        "activation": plain_or(tuple(fitting), "silu"),
        "bias": plain_or(biases or capabilities.biases, "none"),
        # What shares a dynamic scale may be all zero, which a quantiser must not divide by.
        "values": draw(st.sampled_from(VALUES + (9 if scheme in dynamic else 0) * ("zero_rows",))),
        "padded_rows": draw(st.booleans()) if capabilities.padded_rows else False,
    }


def is_declared(spec: ExpertsSpec, capabilities: Capabilities) -> bool:
    """Whether a subject's capabilities cover a spec that was not drawn from them."""
    return (
        spec.dtype in capabilities.dtypes
        and spec.routing in capabilities.routings
        and spec.weights in capabilities.weights
        and spec.expert_map in capabilities.maps
        and spec.scheme in capabilities.schemes
        and spec.activation in capabilities.activations
        and spec.bias in capabilities.biases
        and (capabilities.weight_on_input or not spec.weight_on_input)
        and (capabilities.padded_rows or not spec.padded_rows)
        and (capabilities.empty or spec.M > 0)
        and spec.H % capabilities.hidden_multiple == 0
        and spec.I % capabilities.intermediate_multiple == 0
        and _is_within(capabilities, spec)
    )


def pinned_aligns(device: str, capabilities: Capabilities) -> tuple[AlignSpec, ...]:
    """Alignments that are always run: chance alone may leave a routing out of a gate's few draws."""
    block_size = POOLS[device].block_sizes[0]
    few = tuple(
        AlignSpec(M=3 * block_size, E=8, top_k=2, block_size=block_size, routing=routing, seed=seed)
        for routing in capabilities.routings
        for seed in range(3)
    )
    # As many pairs as one launch sorts, and more: some of them go to the last expert.
    tokens = (MANY_PAIRS // 8, MANY_PAIRS // 8 + 1)
    many = tuple(
        AlignSpec(M=M, E=EXPERTS_BEYOND_A_BLOCK, top_k=8, block_size=block_size, routing="uniform") for M in tokens
    )
    pinned = few + (many if "uniform" in capabilities.routings else ())
    return tuple(spec for spec in pinned if _is_within(capabilities, spec))


def _is_within(capabilities: Capabilities, spec: AlignSpec | ExpertsSpec) -> bool:
    """Whether a spec has as many experts, and as many a token, as a subject takes."""
    most, most_top_k = capabilities.max_experts, capabilities.max_top_k
    return capabilities.min_experts <= spec.E <= (most or spec.E) and spec.top_k <= (most_top_k or spec.top_k)


def align_specs(device: str, capabilities: Capabilities) -> st.SearchStrategy[AlignSpec]:
    """Alignments, from no token to several blocks an expert; now and then more pairs than one launch sorts."""
    pools, most_top_k = pools_of(device, capabilities), min(8, capabilities.max_top_k or 8)

    @st.composite
    def specs(draw: st.DrawFn) -> AlignSpec:
        num_experts = draw(st.sampled_from((*pools.experts, *pools.many_experts)))
        # The edges of a block are what an alignment gets wrong: they are drawn twice as often as the rest.
        edges = tuple(routing for routing in capabilities.routings if routing.startswith("tile"))
        routing = draw(st.sampled_from((*capabilities.routings, *edges)))
        block_size = draw(st.sampled_from(pools.block_sizes))
        least, spare = _needs(routing, block_size, capabilities)
        top_k = draw(st.integers(1, max(1, min(num_experts - spare, most_top_k))))
        if draw(st.sampled_from((False, False, False, False, True))):
            least = MANY_PAIRS // top_k
        return AlignSpec(
            M=draw(st.integers(least, least + 70)),
            E=num_experts,
            top_k=top_k,
            block_size=block_size,
            routing=routing,
            expert_map=draw(st.sampled_from(capabilities.maps)),
            seed=draw(SEEDS),
        )

    return specs()


def experts_specs(
    device: str,
    capabilities: Capabilities,
    *,
    dtypes: tuple[str, ...] | None = None,
    low_latency: bool | None = None,
) -> st.SearchStrategy[ExpertsSpec]:
    """Calls of the routed experts.

    Args:
        device: which pools.
        capabilities: of the subject.
        dtypes: restricts the dtypes.
        low_latency: True draws M * top_k * 4 <= E without a map (the naive-block condition), False its opposite or
            anything with a map, None both.
    """
    pools = pools_of(device, capabilities)

    @st.composite
    def specs(draw: st.DrawFn) -> ExpertsSpec:
        few_pairs = draw(st.booleans()) if low_latency is None else low_latency
        layer = draw(_layers(pools, capabilities, draw(st.sampled_from(dtypes or capabilities.dtypes))))
        routing = draw(st.sampled_from(capabilities.routings))
        if few_pairs:
            num_experts = draw(st.sampled_from((*pools.many_experts, 8)))
            top_k = draw(st.integers(1, min(pools.top_k, num_experts // 4)))
            tokens = draw(st.integers(1, num_experts // (4 * top_k)))
            expert_map = "none"
        else:
            num_experts = draw(st.sampled_from(pools.experts))
            least, spare = _needs(routing, TILE, capabilities)
            top_k = draw(st.integers(1, max(1, min(num_experts - spare, 6, pools.top_k))))
            tokens = draw(st.integers(least, pools.max_tokens))
            if layer["scheme"] != "none" and pools.scaled_rows:
                fewest, most = (rows * num_experts // top_k for rows in draw(st.sampled_from(pools.scaled_rows)))
                tokens = draw(st.integers(max(least, fewest), max(least, most)))
            expert_map = draw(st.sampled_from(capabilities.maps))
        on_input = capabilities.weight_on_input and top_k == 1 and draw(st.booleans())
        return ExpertsSpec(
            M=tokens,
            E=num_experts,
            top_k=top_k,
            routing=routing,
            weights=draw(st.sampled_from(capabilities.weights)),
            expert_map=expert_map,
            weight_on_input=on_input,
            seed=draw(SEEDS),
            **layer,
        )

    return specs()


def batched_specs(device: str, capabilities: Capabilities) -> st.SearchStrategy[BatchedSpec]:
    """Calls of the experts in the batched format: slabs of every size of the pools, now and then without a row."""
    pools, capabilities = pools_of(device, capabilities), capabilities.of_slabs()
    dtypes = compiled_dtypes(device, capabilities)

    @st.composite
    def specs(draw: st.DrawFn) -> BatchedSpec:
        layer = draw(_layers(pools, capabilities, draw(st.sampled_from(dtypes))))
        names = [name for name in capabilities.counts if name != "zero" or capabilities.empty]
        # There are two ways to have no token: as often as any other count each.
        counts = draw(st.sampled_from([*names, *(name for name in names if name == "zero")]))
        slabs = tuple(rows for rows in pools.slabs if rows > TILE or not counts.startswith("tile"))
        return BatchedSpec(
            max_tokens=0 if counts == "zero" and draw(st.booleans()) else draw(st.sampled_from(slabs)),
            E=draw(st.sampled_from(pools.experts)),
            counts=counts,
            seed=draw(SEEDS),
            **layer,
        )

    return specs()


def quantize_specs(device: str, capabilities: Capabilities) -> st.SearchStrategy[QuantizeSpec]:
    """Quantisations of activations by every quantiser that the declared schemes have."""
    pools = POOLS[device]

    @st.composite
    def specs(draw: st.DrawFn) -> QuantizeSpec:
        quantizer = draw(st.sampled_from(capabilities.quantizers))
        return QuantizeSpec(
            rows=draw(st.integers(0 if capabilities.empty else 1, 9)),
            columns=draw(st.sampled_from(pools.widths)),
            quantizer=quantizer,
            group=draw(st.sampled_from(pools.groups)) if quantizer.endswith("group") else 0,
            dtype=draw(st.sampled_from(scaled_dtypes(device, capabilities))),
            values=draw(st.sampled_from(ROWS)),
            padded_rows=draw(st.booleans()) if capabilities.padded_rows else False,
            seed=draw(SEEDS),
        )

    return specs()


def pinned_quantizers(device: str, capabilities: Capabilities) -> tuple[QuantizeSpec, ...]:
    """Every quantiser on every kind of rows, with a tail of columns, in every size of group; and on wide rows."""
    pools = POOLS[device]
    return tuple(
        QuantizeSpec(
            rows=5,
            columns=columns,
            quantizer=quantizer,
            group=group,
            dtype=dtype,
            values=values,
        )
        for quantizer in capabilities.quantizers
        for columns in (pools.widths[0], WIDE)
        for group in (pools.groups[:2] if quantizer.endswith("group") else (0,))
        for values in ROWS
        for dtype in scaled_dtypes(device, capabilities)
    )


def compiled_dtypes(device: str, capabilities: Capabilities) -> tuple[str, ...]:
    """Dtypes of cases whose point is another one: where kernels are compiled, one of them; the others are pinned."""
    pools, dtypes = POOLS[device], capabilities.dtypes
    few = tuple(dtype for dtype in dtypes if dtype in pools.scaled_dtypes) or dtypes[:1]
    return few if pools.is_compiled else dtypes


def scaled_dtypes(device: str, capabilities: Capabilities) -> tuple[str, ...]:
    """The declared dtypes of activations beside weights of few bits: those of the device's pools, where it has one."""
    halves = tuple(dtype for dtype in capabilities.dtypes if dtype in DTYPES[:2])
    return tuple(dtype for dtype in halves if dtype in POOLS[device].scaled_dtypes) or halves or DTYPES[:1]

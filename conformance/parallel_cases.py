"""Cases of a layer that ranks share: how experts, columns of I and tokens are spread, and what each rank should hold.

Nothing here is taken from an implementation: who holds what is said anew, from the rules in words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..reference.lora import Adapter, LowRank, TokenAdapters
from .cases import ExpertsCase, build_experts
from .lora_cases import ADAPTED, LoraCase, LoraSpec, ranks_of, with_adapters
from .lora_cases import TOKENS as ADAPTER_TOKENS
from .operands import ExpertsOperands
from .spec import SCHEMES, ExpertsSpec, Spec
from .strategies import MEAN_ROWS, POOLS, SEEDS, compiled_dtypes
from .subject import Capabilities
from .values import integers

EXCHANGES = ("all_gather", "all_to_all")
PLACEMENTS = (
    "linear",
    "round_robin",
    "shuffled",  # a hashed permutation, cut in runs of hashed lengths, of which some may be empty
    "one_rank",  # one rank holds everything, and the others nothing
    "copies",  # a hashed half of the experts has a second copy on the next rank
    "everywhere",  # every rank holds every expert
)
SPLITS = (
    "even",
    "uneven",  # hashed counts
    "one_empty",  # a rank has no token
    "all_on_one",  # one rank has them all
)
SHARED_PARTS = ("none", "whole", "shard")
EARLIER = (
    "none",
    "alike",  # two calls with the same routing, which suggest what the next one has
    "fewer",  # two calls in which a hashed half of the tokens has no expert, which suggest too little
)
# (tp, dp, ep) of up to four ranks, every way to share tokens among them.
MESHES = (
    (1, 2, 2),
    (1, 3, 3),
    (1, 4, 4),
    (1, 1, 2),
    (2, 1, 1),
    (2, 2, 1),
    (2, 2, 2),
    (2, 4, 2),
    (2, 1, 2),
    (1, 2, 4),
    (4, 2, 1),
)
# Scales that a token has for itself: what others a rank has must not matter. int8 and int4 weights travel as they are.
PARALLEL_SCHEMES = ("none", "fp8_channel_token", "fp8_tensor_static", "fp8_block", "int8_channel_token", "int4_group")


@dataclass(frozen=True)
class ParallelSpec(Spec):
    """One call of a layer that ranks share.

    Attributes:
        M: tokens of all ranks, replicas counted once.
        I: of an expert, before tensor parallelism cuts it.
        tp, dp, ep: sizes; `ep * tp` ranks, tp innermost.
        slack: rows of padding that even the rank with most tokens has.
        shared: what of the shared experts each rank holds.
        overlap: shared experts run while tokens travel.
        own_first: a rank's experts work on its own tokens meanwhile, which then do not travel to it.
        earlier: what the layer was called with before.
        batched: the experts get the batched activation format.
        adapters: the ranks of LoRA adapters of the routed experts, by a name of `lora_cases.RANKS`; `none` without.
        adapted: what they adapt, of `lora_cases.ADAPTED`.
        tokens: which tokens have one, of `lora_cases.TOKENS`.
        fully_sharded: both matrices of every adapter are cut over the `tp` ranks that share their experts' columns.
    """

    facet: ClassVar[str] = "parallel"
    is_covered: ClassVar[bool] = False

    M: int
    H: int
    I: int
    E: int
    top_k: int
    tp: int = 1
    dp: int = 2
    ep: int = 2
    exchange: str = "all_gather"
    placement: str = "linear"
    split: str = "even"
    slack: int = 0
    dtype: str = "bfloat16"
    routing: str = "uniform"
    weights: str = "softmax"
    scheme: str = "none"
    block_n: int = 0
    block_k: int = 0
    bias: str = "none"
    shared: str = "none"
    overlap: bool = False
    own_first: bool = False
    earlier: str = "none"
    batched: bool = False
    weight_on_input: bool = False
    adapters: str = "none"
    adapted: str = "everything"
    tokens: str = "mixed"
    fully_sharded: bool = False
    seed: int = 0

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.ep

    @property
    def replicas(self) -> int:
        """Ranks with the same tokens."""
        return self.world_size // self.dp

    def replicas_of(self, rank: int) -> tuple[int, ...]:
        """The ranks with the tokens of one."""
        first = rank // self.replicas * self.replicas
        return tuple(range(first, first + self.replicas))

    def peers(self, rank: int) -> tuple[int, ...]:
        """The ranks with one rank's place in each run."""
        return tuple(range(rank % self.replicas, self.world_size, self.replicas))

    def routed(self) -> ExpertsSpec:
        """The layer as one rank would run it."""
        names = ("M", "H", "I", "E", "top_k", "dtype", "routing", "weights", "scheme", "block_n", "block_k", "bias")
        own = {name: getattr(self, name) for name in names}
        return ExpertsSpec(**own, weight_on_input=self.weight_on_input, seed=self.seed)

    def lora(self) -> LoraSpec:
        """The adapters of the layer as one rank would run it."""
        names = ("M", "H", "I", "E", "top_k", "dtype", "routing", "scheme", "block_n", "block_k", "bias")
        own = {name: getattr(self, name) for name in (*names, "adapted", "tokens", "weight_on_input", "seed")}
        return LoraSpec(ranks=self.adapters, multiple=self.tp if self.fully_sharded else 1, **own)

    def counts(self) -> tuple[int, ...]:
        """Tokens of each of the `dp` runs of ranks."""
        one = self.seed % self.dp
        others = [rank for rank in range(self.dp) if rank != one]
        counts = [0] * self.dp
        if self.split == "all_on_one" or self.dp == 1:
            counts[one] = self.M
            return tuple(counts)
        if self.split == "uneven":
            cuts = integers(self.seed, "cuts", (self.dp - 1,), 0, self.M + 1).sort().values.tolist()
            return tuple(b - a for a, b in zip([0, *cuts], [*cuts, self.M], strict=True))
        takers = others if self.split == "one_empty" else range(self.dp)
        for number, rank in enumerate(takers):
            counts[rank] = self.M // len(takers) + (number < self.M % len(takers))
        return tuple(counts)

    def tokens_of(self, rank: int) -> range:
        """The tokens of a rank, by their numbers among all."""
        counts, run = self.counts(), rank // self.replicas
        start = [0, *accumulate(counts)][run]
        return range(start, start + counts[run])

    @property
    def max_tokens(self) -> int:
        """Rows of each rank with its padding."""
        return max(1, max(self.counts()) + self.slack)

    def experts_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """The experts of each of the `ep` shares, by the rules in words."""
        e, ranks = self.E, range(self.ep)
        if self.placement == "linear":
            # The first E mod ep ranks hold one more than the others.
            share, more = divmod(e, self.ep)
            return tuple(tuple(range(share * r + min(r, more), share * (r + 1) + min(r + 1, more))) for r in ranks)
        if self.placement == "round_robin":
            return tuple(tuple(x for x in range(e) if x % self.ep == r) for r in ranks)
        if self.placement == "one_rank":
            return tuple(tuple(range(e)) if r == self.seed % self.ep else () for r in ranks)
        if self.placement == "everywhere":
            order = integers(self.seed, "order", (self.ep, e), 0, 1 << 40).argsort(dim=1)
            return tuple(map(tuple, order.tolist()))
        order = integers(self.seed, "order", (e,), 0, 1 << 40).argsort().tolist()
        cuts = integers(self.seed, "experts", (self.ep - 1,), 0, e + 1).sort().values.tolist()
        held = [order[a:b] for a, b in zip([0, *cuts], [*cuts, e], strict=True)]
        if self.placement == "copies" and self.ep > 1:
            first = [list(experts) for experts in held]
            for r in ranks:
                held[(r + 1) % self.ep] = held[(r + 1) % self.ep] + first[r][::2]
        return tuple(map(tuple, held))


@dataclass(frozen=True)
class ParallelCase:
    """The operands of all ranks.

    Attributes:
        spec: who has what.
        routed: the layer as one rank would run it, all tokens in their order.
        shared: the shared experts as one expert of every token, whole; or None.
        lora: the routed layer with its adapters, whole; or None.
    """

    spec: ParallelSpec
    routed: ExpertsCase
    shared: ExpertsCase | None
    lora: LoraCase | None = None

    @cached_property
    def experts_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """As the spec says."""
        return self.spec.experts_of_rank()

    def hidden_states(self, rank: int) -> Tensor:
        """`[M_r, H]` of one rank."""
        tokens = self.spec.tokens_of(rank)
        return self.routed.hidden_states[tokens.start : tokens.stop]

    def routing(self, rank: int) -> tuple[Tensor, Tensor]:
        """Weights and logical ids of a rank's tokens, `[M_r, top_k]`."""
        tokens = self.spec.tokens_of(rank)
        rows = slice(tokens.start, tokens.stop)
        return self.routed.topk_weights[rows], self.routed.topk_ids[rows]

    def earlier_routing(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        """The same of each call that came before."""
        weights, ids = self.routing(rank)
        if self.spec.earlier == "fewer":
            idle = integers(self.spec.seed, "earlier", (self.spec.M,), 0, 2).to(ids.device)[self.token_ids(rank).long()]
            ids = torch.where(idle[:, None] > 0, -1, ids)
        return [] if self.spec.earlier == "none" else [(weights, ids)] * 2

    def lora_ids(self, rank: int) -> Tensor | None:
        """`[M_r]` int32: the adapter of each of a rank's tokens, -1 for none; None without adapters."""
        tokens = self.spec.tokens_of(rank)
        return None if self.lora is None else self.lora.lora_ids[tokens.start : tokens.stop]

    def token_ids(self, rank: int) -> Tensor:
        """`[M_r]` int32: the number of each token among all, as something that must stay with its token."""
        tokens = self.spec.tokens_of(rank)
        return torch.arange(tokens.start, tokens.stop, dtype=torch.int32, device=self.routed.hidden_states.device)

    def changed(self) -> list[str]:
        """The operands that no longer hold what they were given."""
        shared = [] if self.shared is None else [f"shared {name}" for name in self.shared.arena.changed()]
        lora = [] if self.lora is None else self.lora.arena.changed()
        return [*self.routed.arena.changed(), *shared, *lora]

    def shard(self, rank: int, local_ids: Tensor, *, is_quantized: bool = False) -> ExpertsOperands | None:
        """What the reference says of one rank's part; None where it holds no expert.

        Args:
            rank: of the mesh.
            local_ids: `[M, top_k]`, which pairs it computes, by its own numbers of the experts, -1 elsewhere.
            is_quantized: tokens come to it in few bits, and its adapters see no others.
        """
        spec, case = self.spec, self.routed
        columns = _sharded_columns if spec.fully_sharded else _columns
        experts = self.experts_of_rank[rank // spec.tp]
        if not experts:
            return None
        which = torch.tensor(experts, device=local_ids.device)
        part = replace(case, **case.layer_of_experts(which), topk_ids=local_ids.to(torch.int32))
        call = part.operands()
        if self.lora is not None:
            local = {expert: place for place, expert in enumerate(experts)}
            call = replace(call, adapters=self.lora.of_experts(local, sees_quantized=is_quantized))
        return columns(call, rank % spec.tp, spec.tp)

    def shared_operands(self) -> ExpertsOperands | None:
        """The shared experts, whole."""
        return None if self.shared is None else self.shared.operands()


def _columns(call: ExpertsOperands, rank: int, size: int) -> ExpertsOperands:
    """One shard of I of plain weights: gate and up rows alike, and the second bias in the first shard alone."""
    if size == 1:
        return call
    if not isinstance(call.w13, Tensor) or not isinstance(call.w2, Tensor):
        raise TypeError("w13: expected plain weights for shards of I")
    gated = call.activation.is_gated
    rows = torch.arange(call.w13.shape[1]).view(2 if gated else 1, size, -1)[:, rank].reshape(-1)
    columns = torch.arange(call.w2.shape[2]).view(size, -1)[rank]
    return replace(
        call,
        w13=call.w13[:, rows],
        w2=call.w2[:, :, columns],
        w13_bias=None if call.w13_bias is None else call.w13_bias[:, rows],
        w2_bias=call.w2_bias if rank == 0 else None,
        adapters=None if call.adapters is None else _adapter_columns(call.adapters, rows, columns),
    )


def _adapter_columns(adapters: TokenAdapters, rows: Tensor, columns: Tensor) -> TokenAdapters:
    """Of w13's B the rows that w13 has, of w2's A the columns that w2 has."""

    def of_shard(adapter: Adapter) -> Adapter:
        gate_up = {e: tuple(LowRank(m.a, m.b[rows], m.scale) for m in ms) for e, ms in adapter.gate_up.items()}
        down = {e: tuple(LowRank(m.a[:, columns], m.b, m.scale) for m in ms) for e, ms in adapter.down.items()}
        return Adapter(gate_up, down)

    return replace(adapters, adapters={index: of_shard(adapter) for index, adapter in adapters.adapters.items()})


def _sharded_columns(call: ExpertsOperands, rank: int, size: int) -> ExpertsOperands:
    """What a rank's part is where adapters are cut in both matrices, as a layer of whole experts.

    Of w2 there are the rank's columns alone, and of B the rank's rows of H, which take A's product with all columns of
    I, whoever has them.
    """
    if not isinstance(call.w2, Tensor) or call.adapters is None:
        raise TypeError("w2: expected plain weights with adapters where those are fully sharded")
    hidden_size, columns = call.w2.shape[1:]
    mine = torch.arange(columns) // (columns // size) == rank
    held = (torch.arange(hidden_size) // (hidden_size // size) == rank)[:, None]

    def of_shard(adapter: Adapter) -> Adapter:
        down = {e: tuple(LowRank(m.a, m.b * held, m.scale) for m in ms) for e, ms in adapter.down.items()}
        return replace(adapter, down=down)

    adapters = {index: of_shard(adapter) for index, adapter in call.adapters.adapters.items()}
    return replace(
        call,
        w2=torch.where(mine, call.w2, torch.zeros_like(call.w2)),
        w2_bias=call.w2_bias if rank == 0 else None,
        adapters=replace(call.adapters, adapters=adapters),
    )


def build_parallel(spec: ParallelSpec, device: torch.device | str = "cpu") -> ParallelCase:
    """The operands of a spec."""
    routed = build_experts(spec.routed(), device)
    shared = None
    if spec.shared != "none":
        # Of a rank's part of the routed experts' size, so that both have the same kernels.
        size = spec.I // spec.tp * (spec.replicas if spec.shared == "shard" else 1)
        plain = ExpertsSpec(M=spec.M, H=spec.H, I=size, E=1, top_k=1, dtype=spec.dtype, seed=spec.seed + 256)
        ones = torch.ones((spec.M, 1), dtype=torch.float32, device=device)
        shared = replace(build_experts(plain, device), hidden_states=routed.hidden_states, topk_weights=ones)
    lora = None if spec.adapters == "none" else with_adapters(spec.lora(), routed, device)
    return ParallelCase(spec, routed, shared, lora)


def is_possible(spec: ParallelSpec) -> bool:
    """Whether what a spec says goes together."""
    quantized = SCHEMES[spec.scheme].weight is not None
    return (
        spec.world_size % spec.dp == 0
        and (spec.exchange == "all_gather" or (spec.tp == 1 and spec.replicas == 1))
        and (spec.placement not in ("linear", "round_robin") or spec.ep <= spec.E)
        and (spec.shared != "shard" or spec.replicas > 1)
        and not (spec.tp > 1 and (quantized or spec.I % spec.tp))
        and not (quantized and spec.dtype == "float32")
        and not (spec.fully_sharded and (spec.tp == 1 or spec.adapters == "none" or spec.H % spec.tp))
        and not (spec.own_first and (spec.batched or spec.fully_sharded))
        and not (spec.batched and (spec.weight_on_input or SCHEMES[spec.scheme].weight not in (None, "fp8")))
        and not (spec.weight_on_input and spec.top_k > 1)
    )


def _of_few_rows(spec: ParallelSpec, device: str) -> ParallelSpec:
    """The spec with so few tokens that a rank's adapted experts have one size of blocks, where kernels are compiled.

    Adapters beside larger blocks are pinned on one rank.
    """
    if not POOLS[device].is_compiled or spec.adapters == "none":
        return spec
    while spec.M > 1 and spec.dp * spec.max_tokens * spec.top_k > MEAN_ROWS * spec.E:
        spec = replace(spec, M=spec.M - 1)
    return spec


def meshes_of(world_size: int | None = None) -> tuple[tuple[int, int, int], ...]:
    """The meshes of some number of ranks; None: of up to four."""
    known = tuple(mesh for mesh in MESHES if world_size in (None, mesh[0] * mesh[2]))
    if known or world_size is None:
        return known
    sizes = [tp for tp in (1, 2, 4) if world_size % tp == 0]
    return tuple((tp, dp, world_size // tp) for tp in sizes for dp in (world_size, 1))


def _sizes(device: str, scheme: str, tp: int) -> list[tuple[int, int, int, int]]:
    """H, I and blocks of which each shard has sizes of the pools, for which the limits were fitted."""
    return [(h, i * tp, bn, bk) for h, i, bn, bk in POOLS[device].shapes_of(scheme)]


def pinned_parallel(device: str, capabilities: Capabilities, *, batched: bool) -> tuple[ParallelSpec, ...]:
    """Every mesh with each exchange and part of shared experts; every placement, split and scheme."""
    specs = [_of_few_rows(spec, device) for spec in _pinned(device, capabilities)]
    if batched:
        slabs = [replace(spec, batched=True, own_first=False) for spec in specs[:: len(specs) // 12]]
        if POOLS[device].is_compiled:  # of those with adapters one
            adapted = [spec for spec in slabs if spec.adapters != "none"]
            slabs = [spec for spec in slabs if spec not in adapted[1:]]
        specs += slabs
    return tuple(spec for spec in specs if is_possible(spec) and spec.scheme in capabilities.schemes)


def _pinned(device: str, capabilities: Capabilities) -> Iterator[ParallelSpec]:
    hidden, intermediate, _, _ = _sizes(device, "none", 4)[0]
    dtype = capabilities.dtypes[0]
    adapter_ranks, compiled = ranks_of(device), POOLS[device].is_compiled
    plain = ParallelSpec(M=13, H=hidden, I=intermediate, E=5, top_k=3, dtype=dtype)
    for exchange in EXCHANGES:
        for number, (tp, dp, ep) in enumerate(MESHES):
            for shared in SHARED_PARTS:
                placement = PLACEMENTS[(number + len(shared)) % len(PLACEMENTS)]
                overlap = shared != "none" and bool(number % 2)
                own_first = bool((number + len(shared)) % 2)
                yield replace(
                    plain,
                    exchange=exchange,
                    tp=tp,
                    dp=dp,
                    ep=ep,
                    shared=shared,
                    placement=placement,
                    overlap=overlap,
                    own_first=own_first,
                )
        spread = replace(plain, exchange=exchange, dp=3, ep=3)
        for seed, placement in enumerate(PLACEMENTS):
            for split in SPLITS:
                kept = {"slack": seed % 3, "seed": seed, "shared": "whole", "own_first": bool(seed % 2)}
                yield replace(spread, placement=placement, split=split, **kept)
        # Replicas have the same tokens, and must send each pair to the same copy.
        yield replace(plain, dp=1, ep=2, placement="everywhere", seed=1)
        yield replace(plain, dp=2, ep=4, placement="everywhere", seed=2)
        for scheme in PARALLEL_SCHEMES[1:]:
            h, i, block_n, block_k = POOLS[device].shapes_of(scheme)[0]
            scaled = replace(spread, scheme=scheme, H=h, I=i, block_n=block_n, block_k=block_k, split="uneven")
            scaled = replace(scaled, dtype="bfloat16", slack=1)
            yield from (replace(scaled, own_first=not seed, seed=seed) for seed in range(1 if compiled else 2))
            if exchange == "all_to_all":
                yield replace(scaled, earlier=EARLIER[1 + len(scheme) % 2], seed=8)
        for number, other in enumerate(capabilities.dtypes[1:]):
            if EXCHANGES[number % 2] == exchange:
                yield replace(spread, dtype=other, seed=4)
        yield replace(spread, routing="all_invalid")
        yield replace(spread, routing="some_invalid", split="one_empty")
        yield replace(spread, M=0)
        yield replace(spread, M=0, own_first=True, seed=1)
        for number, earlier in enumerate(EARLIER[1:]):
            before = replace(spread, earlier=earlier, split="uneven", routing="skewed", slack=number)
            yield replace(before, shared="whole", overlap=True, seed=2)
            if exchange == "all_to_all":
                yield replace(before, dp=4, ep=4, placement="round_robin", seed=4)
                yield replace(before, split="one_empty", placement="one_rank", seed=5)
                yield replace(before, adapters=adapter_ranks[number], seed=7)
                yield replace(before, M=1, seed=1)
        # Of many choices: more words beside each row than the least block of them.
        yield from (replace(spread, E=12, top_k=9, slack=1, seed=seed) for seed in range(2))
        yield replace(plain, exchange=exchange, tp=1, dp=1, ep=1)
        yield replace(spread, top_k=1, weight_on_input=True)
        for number, adapted in enumerate(ADAPTED):
            tp, dp, ep = MESHES[number % len(MESHES)] if exchange == "all_gather" else (1, *MESHES[number % 3][1:])
            yield replace(
                plain,
                exchange=exchange,
                tp=tp,
                dp=dp,
                ep=ep,
                placement=PLACEMENTS[number % len(PLACEMENTS)],
                split=SPLITS[number % len(SPLITS)],
                adapters=adapter_ranks[number % len(adapter_ranks)],
                adapted=adapted,
                tokens=ADAPTER_TOKENS[number // 2 % len(ADAPTER_TOKENS)],
                own_first=bool(number % 2),
                seed=number,
            )
        for scheme in ("fp8_block",) if POOLS[device].is_compiled else PARALLEL_SCHEMES[1:]:
            h, i, block_n, block_k = POOLS[device].shapes_of(scheme)[0]
            scaled = replace(spread, scheme=scheme, H=h, I=i, block_n=block_n, block_k=block_k, dtype="bfloat16")
            yield replace(scaled, adapters="mixed", split="uneven", seed=3)
    yield replace(plain, tp=2, dp=2, ep=1, bias="both")
    yield replace(plain, tp=4, dp=2, ep=1, adapters="wide" if "wide" in adapter_ranks else "many")
    sharded = replace(plain, fully_sharded=True)
    for number, (adapted, (tp, dp, ep)) in enumerate(zip(ADAPTED, itertools.cycle(m for m in MESHES if m[0] > 1))):
        yield replace(
            sharded,
            tp=tp,
            dp=dp,
            ep=ep,
            adapters=adapter_ranks[number % len(adapter_ranks)],
            adapted=adapted,
            tokens=ADAPTER_TOKENS[number // 2 % len(ADAPTER_TOKENS)],
            shared=SHARED_PARTS[number % len(SHARED_PARTS)],
            overlap=number % len(SHARED_PARTS) > 0,
            placement=PLACEMENTS[number % len(PLACEMENTS)],
            seed=number,
        )
    yield replace(sharded, tp=2, dp=2, ep=1, adapters="many", bias="both")
    yield replace(sharded, tp=2, dp=2, ep=1, adapters="one", top_k=1, weight_on_input=True)
    yield replace(sharded, tp=2, dp=1, ep=1, adapters="one", routing="some_invalid")
    yield replace(sharded, tp=2, dp=1, ep=1, adapters="many", M=2)  # a pair's adapter is asked for by itself


def parallel_specs(
    device: str, capabilities: Capabilities, *, batched: bool, world_size: int | None = None
) -> st.SearchStrategy[ParallelSpec]:
    """Layers over two to four ranks, with any mesh, placement, split, scheme and part of shared experts.

    Args:
        device: which pools.
        capabilities: of the subject.
        batched: the batched activation format is one of them.
        world_size: restricts the ranks.
    """
    pools = POOLS[device]
    meshes = meshes_of(world_size)
    # What travels, and to whom, is the point here; which kernels compute it is that of others.
    dtypes = compiled_dtypes(device, capabilities)

    biases = ("none", "none", "both") if "both" in capabilities.biases and not pools.is_compiled else ("none",)
    ranks = ranks_of(device)

    @st.composite
    def specs(draw: st.DrawFn) -> ParallelSpec:
        tp, dp, ep = draw(st.sampled_from(meshes))
        own = dp == tp * ep and tp == 1
        dtype = draw(st.sampled_from(dtypes))
        scheme = "none"
        if tp == 1 and dtype in pools.scaled_dtypes and draw(st.booleans()):
            scheme = draw(st.sampled_from([s for s in PARALLEL_SCHEMES if s in capabilities.schemes]))
        sizes = _sizes(device, scheme, tp)
        hidden, intermediate, block_n, block_k = draw(st.sampled_from(sizes[:1] if pools.is_compiled else sizes))
        experts = max(ep, draw(st.sampled_from((4, 5, 8))))
        top_k = draw(st.integers(1, 4))
        shared = draw(st.sampled_from(SHARED_PARTS if tp * ep > dp else SHARED_PARTS[:2]))
        adapted = draw(st.integers(0, 3)) == 0
        if pools.is_compiled and scheme != "none":
            shared, adapted = "none", False
        slabs = batched and SCHEMES[scheme].weight in (None, "fp8") and draw(st.integers(0, 3)) == 0
        slabs = slabs and not (adapted and pools.is_compiled)
        fully_sharded = adapted and tp > 1 and hidden % tp == 0 and draw(st.booleans())
        exchange = draw(st.sampled_from(EXCHANGES)) if own else "all_gather"
        return ParallelSpec(
            M=draw(st.integers(0 if capabilities.empty else 1, 20)),
            H=hidden,
            I=intermediate,
            E=experts,
            top_k=top_k,
            tp=tp,
            dp=dp,
            ep=ep,
            exchange=exchange,
            placement=draw(st.sampled_from(PLACEMENTS)),
            split=draw(st.sampled_from(SPLITS)),
            slack=draw(st.integers(0, 2)),
            dtype=dtype,
            routing=draw(st.sampled_from(("uniform", "one_expert", "skewed", "repeated", "some_invalid"))),
            weights=draw(st.sampled_from(capabilities.weights)),
            scheme=scheme,
            block_n=block_n,
            block_k=block_k,
            bias=draw(st.sampled_from(biases)),
            shared=shared,
            overlap=shared != "none" and draw(st.booleans()),
            own_first=not slabs and not fully_sharded and draw(st.booleans()),
            earlier=draw(st.sampled_from(("none", *EARLIER))) if exchange == "all_to_all" else "none",
            batched=slabs,
            weight_on_input=top_k == 1 and not slabs and capabilities.weight_on_input and draw(st.booleans()),
            adapters=draw(st.sampled_from(ranks)) if adapted else "none",
            adapted=draw(st.sampled_from(ADAPTED)) if adapted else "everything",
            tokens=draw(st.sampled_from(ADAPTER_TOKENS)) if adapted else "mixed",
            fully_sharded=fully_sharded,
            seed=draw(SEEDS),
        )

    return specs().map(lambda spec: _of_few_rows(spec, device))

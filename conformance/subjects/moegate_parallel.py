"""moegate's layers that ranks share: `MoELayer` with `ParallelExperts`, on the suite's links or on process groups."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...impl import platform
from ...impl.checks import debug_checks
from ...impl.config import ActivationFormat
from ...impl.experts_module import RoutedExperts, SharedExperts
from ...impl.layer import Gate, MoELayer, RoutingMethod
from ...impl.lora.table import AdapterTable
from ...impl.parallel.collectives import Group, Work
from ...impl.parallel.exchange import Exchange, Launched, Received
from ...impl.parallel.experts import ParallelExperts
from ...impl.parallel.mesh import Mesh
from ...impl.parallel.placement import ExpertPlacement, linear_placement, round_robin_placement
from ...impl.parallel.ranks import Ranks, connect
from ...impl.parallel.shards import experts_of_rank, shard_of_adapter, shard_of_experts
from ...impl.parallel.wire import Tokens
from ...impl.path import record_path
from ...impl.weights import ExpertsWeights
from ..parallel_cases import ParallelCase
from ..properties.ep import RankResult, Slice
from .moegate_lora import as_adapter

Arguments = Callable[[Any], dict[str, Any]]
_CPU = platform._cpu
# Set-up and calls beyond the agreed number of tokens: more rows than a call needs.
_SPARE = 5


class _Done:
    def wait(self) -> None:
        """It is done already."""


class _Linked(Group):
    """A channel of the suite's as a group."""

    def __init__(self, name: str, channel: Any, device: str) -> None:
        super().__init__(name, channel.rank, channel.size, device)
        self._channel = channel
        # Of each all-to-all, whether it has its place in the caller's stream.
        self.in_order: list[bool] = []

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        self._channel.all_gather(out, x)
        return _Done()

    def _reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        self._channel.reduce_scatter(out, x)
        return _Done()

    def _all_reduce(self, x: Tensor) -> Work:
        self._channel.all_reduce(x)
        return _Done()

    def _all_to_all(self, out: Tensor, x: Tensor, received: list[int], sent: list[int]) -> Work:
        self.in_order.append(False)
        self._channel.all_to_all(out, x, received, sent)
        return _Done()

    def _all_to_all_in_order(self, out: Tensor, x: Tensor, received: list[int], sent: list[int]) -> Work:
        work = self._all_to_all(out, x, received, sent)
        self.in_order[-1] = True
        return work


class _Numbered(Exchange):
    """An exchange that also says which token each row is: numbers travel as adapters do, before any of those."""

    name = "numbered"

    def __init__(self, exchange: Exchange, token_ids: Tensor) -> None:
        self._exchange, self._token_ids = exchange, token_ids
        self.arrived: Tensor | None = None
        self.own: Received | None = None

    def dispatch(
        self, tokens: Tokens, padded_tokens: int, *, own_first: bool = False, runs_beside: bool = True
    ) -> Launched:
        numbers = replace(tokens, lora_ids=self._token_ids)
        launched = self._exchange.dispatch(numbers, padded_tokens, own_first=own_first, runs_beside=runs_beside)
        if tokens.lora_ids is not None:
            received = launched.wait()
            self.arrived = (launched.again() or received).tokens.lora_ids
            launched = self._exchange.dispatch(tokens, padded_tokens, own_first=own_first, runs_beside=runs_beside)
        self.own = launched.own
        return launched

    def combine(
        self, partial: Tensor, received: Received, shared: Tensor | None = None, own: Tensor | None = None
    ) -> Tensor:
        return self._exchange.combine(partial, received, shared, own)


class _Observed(ParallelExperts):
    """Keeps what arrived and what was made of it."""

    token_ids: Tensor
    seen: RankResult
    _own: RankResult | None = None

    def join(self, *arguments: Any) -> None:
        super().join(*arguments)
        self._numbered = _Numbered(super().exchange, self.token_ids)

    @property
    def exchange(self) -> Exchange:
        return self._numbered

    def partial_sums(
        self, received: Received, experts: RoutedExperts, adapters: AdapterTable | None = None, *arguments: Any
    ) -> Tensor:
        partial = super().partial_sums(received, experts, adapters, *arguments)
        tokens = received.tokens
        is_own = received is self._numbered.own
        token_ids = self.token_ids if is_own else tokens.lora_ids if adapters is None else self._numbered.arrived
        ids = tokens.topk_ids.long()
        expert_map = (self._local_map if tokens.ids_are_local else self._expert_map).long()
        if token_ids is None:
            raise ValueError("lora_ids: expected them to arrive with their tokens, got None")
        seen = RankResult(
            output=partial,
            partial=partial.clone(),
            hidden_states=None if tokens.input_scale is not None else tokens.hidden_states.clone(),
            token_ids=token_ids.clone(),
            local_ids=torch.where(ids >= 0, expert_map[ids.clamp(min=0)], -1),
            topk_weights=tokens.topk_weights.clone(),
            experts=self.placement.experts_of_rank[self.ep_rank],
            lora_ids=None if adapters is None or tokens.lora_ids is None else tokens.lora_ids.clone(),
        )
        if is_own:
            # What has no expert here would not have come in an all-to-all, and is no finding where it only stays.
            stays = self.exchange_name == "all_to_all"
            self._own = _of_rows(seen, (seen.local_ids >= 0).any(dim=1)) if stays else seen
            return partial
        self.seen = seen if self._numbered.own is None else _joined(self._own, seen)
        return partial


def _of_rows(result: RankResult, which: Tensor) -> RankResult:
    return replace(result, **{name: t[which] for name, t in vars(result).items() if isinstance(t, Tensor)})


def _joined(own: RankResult | None, others: RankResult) -> RankResult:
    """What a rank worked on, in two calls, as if it had been one."""
    if own is None:
        raise ValueError("own: expected the experts' part of the tokens that stayed apart, got None")
    parts = {name: (t, vars(others)[name]) for name, t in vars(own).items() if isinstance(t, Tensor)}
    return replace(others, **{name: torch.cat(both) for name, both in parts.items()})


# Orders of shared experts that run while tokens travel.
_BESIDE = ("mk_internal_overlapped", "multi_stream_overlapped")
_ranks_without_triton = 0
_lock = threading.Lock()


@contextmanager
def _without_triton() -> Iterator[None]:
    """Inside, for all ranks that are threads of this process, the CPU is one on which no Triton kernel runs."""
    global _ranks_without_triton
    with _lock:
        _ranks_without_triton += 1
        platform._cpu = lambda: replace(_CPU(), interpreted=False)
    try:
        yield
    finally:
        with _lock:
            _ranks_without_triton -= 1
            if not _ranks_without_triton:
                platform._cpu = _CPU


def ranks_of(mesh: Mesh, links: Any, device: str = "cpu") -> Ranks:
    """The groups of a mesh on a rank's links."""
    if links.process_group is not None:
        return links.remembered(("ranks", mesh), lambda: connect(mesh, links.process_group))

    def group(name: str, ranks: tuple[int, ...]) -> Group | None:
        return _Linked(name, links.channel(ranks), device) if len(ranks) > 1 else None

    world = _Linked("world", links.channel(tuple(range(links.size))), device)
    rank = links.rank
    names = {"peers": mesh.data_peers, "replicas": mesh.replicas, "shards": mesh.shards}
    return Ranks(mesh, world, *(group(name, ranks_of_group(rank)) for name, ranks_of_group in names.items()))


def _placement(case: ParallelCase) -> ExpertPlacement:
    spec = case.spec
    made = {"linear": linear_placement, "round_robin": round_robin_placement}.get(spec.placement)
    return ExpertPlacement(spec.E, case.experts_of_rank) if made is None else made(spec.E, spec.ep)


def _weights(arguments: dict[str, Any]) -> ExpertsWeights:
    return ExpertsWeights(*(arguments[name] for name in ("w13", "w2", "w13_bias", "w2_bias", "quant")))


def _as_arguments(weights: ExpertsWeights) -> dict[str, Any]:
    return {name: getattr(weights, name) for name in ("w13", "w2", "w13_bias", "w2_bias", "quant")}


def run_rank(
    case: ParallelCase, links: Any, variant: str, arguments: Arguments, fails: tuple[int, str] | None
) -> RankResult:
    """One rank's part of a case.

    Args:
        case: of all ranks.
        links: to the others: `rank`, `size`, `channel(ranks)`, and a process group or None.
        variant: the experts' backend.
        arguments: of the experts of a case, by the names of `RoutedExperts`.
        fails: the rank that raises, and in which step of its layer (`routing`, `experts`); None: nobody.
    """
    spec, rank = case.spec, links.rank
    fails_in = fails[1] if fails is not None and fails[0] == rank else None
    x = case.hidden_states(rank)
    device, dtype = x.device.type, x.dtype
    given = arguments(case.routed)
    parallel = _Observed(
        ranks_of(Mesh(spec.tp, spec.dp, spec.ep), links, device),
        _placement(case),
        max_tokens=spec.max_tokens + (_SPARE if spec.seed % 3 == 0 else 0),
        exchange=spec.exchange,
        shared_part="whole" if spec.shared == "none" else spec.shared,
        overlap=spec.overlap,
        own_first=spec.own_first,
        activation_format=ActivationFormat.BATCHED if spec.batched else ActivationFormat.STANDARD,
    )
    parallel.token_ids = case.token_ids(rank)
    place = parallel.mesh.place(rank)
    mine = experts_of_rank(_weights(given), parallel.placement.experts_of_rank[place.ep_rank])
    interleaved, gated = given["interleaved"], case.routed.activation.is_gated
    mine = shard_of_experts(mine, place.tp_rank, place.tp_size, is_gated=gated, interleaved=interleaved)
    experts = RoutedExperts(
        **{**given, **_as_arguments(mine)},
        dtype=dtype,
        backend=variant,
        apply_router_weight_on_input=spec.weight_on_input,
    )
    shared = None
    if case.shared is not None:
        of_shared = _weights(arguments(case.shared))
        if spec.shared == "shard":
            replicas = parallel.mesh.replicas(rank)
            of_shared = shard_of_experts(of_shared, replicas.index(rank), len(replicas))
        shared = SharedExperts(of_shared.w13[0], of_shared.w2[0], dtype=dtype, backend=variant)

    def select(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        del hidden_states
        if fails_in == "routing":
            raise ValueError(f"made to raise in routing on rank {rank}")
        return routings[0]

    if fails_in == "experts":

        def fail(*arguments: Any) -> None:
            raise ValueError(f"made to raise in experts on rank {rank}")

        experts.register_forward_pre_hook(fail)
    adapters = _table(case, parallel, experts)
    gate = Gate(torch.zeros((spec.E, spec.H), dtype=dtype, device=device))
    layer = MoELayer(
        gate,
        experts,
        RoutingMethod(spec.top_k),
        shared_experts=shared,
        adapters=adapters,
        parallel=parallel,
    )
    # No routing of ours gives every id that experts take: -1, or one twice.
    layer._select = select
    # Where no Triton runs, what travels is planned, packed and summed in torch.
    plain = variant == "cpu" and spec.seed % 2 == 1
    debug = debug_checks() if spec.seed % 2 or fails is not None else nullcontext()
    peers = parallel.ranks.peers
    routings = [*case.earlier_routing(rank), case.routing(rank)]
    with debug, _without_triton() if plain else nullcontext():
        while len(routings) > 1:
            layer(x, case.lora_ids(rank), padded_tokens=spec.max_tokens)
            del routings[0]
        if isinstance(peers, _Linked):
            peers.in_order.clear()
        with record_path() as record:
            output = layer(x, case.lora_ids(rank), padded_tokens=spec.max_tokens)
    seen = peers.in_order if isinstance(peers, _Linked) and spec.exchange == "all_to_all" else None
    place_of = output.untyped_storage().data_ptr() if output.numel() else None
    operands = [t for part in (case.routed, case.shared) if part is not None for t in part.tensors().values()]
    is_own = all(t.untyped_storage().data_ptr() != place_of for t in operands if t.numel())
    return replace(
        parallel.seen,
        output=output.clone(),
        is_own=is_own,
        slices=_slices(adapters),
        travels_beside=None if seen is None else not seen[0],
        runs_beside=spec.own_first or record.last("shared_experts_order") in _BESIDE,
        leaves_early=None if seen is None else record.last("expected_rows") == "held",
    )


def _table(case: ParallelCase, parallel: ParallelExperts, experts: RoutedExperts) -> AdapterTable | None:
    """The adapters of a rank's experts and columns."""
    if case.lora is None:
        return None
    function, place = experts.function, parallel.mesh.place(parallel.ranks.rank)
    kind = {"is_gated": function.kind.is_gated, "interleaved": function.interleaved}
    table = AdapterTable(
        len(case.lora.adapters),
        case.lora.max_rank,
        num_experts=case.spec.E,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        dtype=experts.dtype,
        device=experts.w2.device,
        expert_map=parallel.placement.local_experts(parallel.ep_rank),
        fully_sharded_over=parallel.ranks.shards if case.spec.fully_sharded else None,
        **kind,
    )
    for adapter in map(as_adapter, case.lora.adapters):
        whole = case.spec.fully_sharded
        table.load(adapter if whole else shard_of_adapter(adapter, place.tp_rank, place.tp_size, **kind))
    return table


def _slices(table: AdapterTable | None) -> dict[Slice, tuple[Tensor, Tensor]] | None:
    """What a table holds of its adapters."""
    if table is None:
        return None
    return {
        (slot, name, expert): (a.clone(), b.clone())
        for slot in table.loaded
        for name, expert, a, b in table.slices_of(slot)
    }

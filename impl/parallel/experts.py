"""The experts of a layer that several ranks share: placement, exchange, and the layer's steps between the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from itertools import count
from typing import Any

import torch

from ..checks import debugging, expect_bool, expect_instance, expect_int, expect_one_of, expect_tensor
from ..config import ActivationFormat
from ..experts_module import RoutedExperts
from ..fused_moe import what_decides
from ..lora.table import AdapterTable
from ..overlap import beside
from ..quantization import ActivationScale
from ..replay import replaying_unless_said
from ..shared_experts import SharedExpertsOrder
from .adapters import adapter_facts, expect_adapters_of_rank
from .agreement import agree, together
from .all_gather import AllGather
from .all_to_all import AllToAll
from .exchange import Exchange, Launched, Received
from .placement import ExpertPlacement, choose_copies
from .ranks import Ranks
from .slabs import batched_partial
from .travel import Homes
from .wire import Tokens, Wire

# Shared experts that are to run while tokens travel.
_BESIDE = (SharedExpertsOrder.MK_INTERNAL_OVERLAPPED, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED)
_numbers = count()
Select = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Shared = Callable[[torch.Tensor], torch.Tensor]


class SharedPart(StrEnum):
    """What of the shared experts a rank holds, and so where their output joins the sum."""

    WHOLE = "whole"  # all of them: added to the rank's own tokens once everything else is reduced
    SHARD = "shard"  # columns of I, over the replicas: added before their one reduction


class ParallelExperts:
    """What a layer needs to know of the other ranks; one for each layer.

    Args:
        ranks: from `connect`.
        placement: of the experts over the ranks of `ranks.mesh.ep_size`.
        max_tokens: the most tokens that a rank may bring to a call; the same on every rank.
        exchange: `all_gather`, which can be captured in a CUDA graph, or `all_to_all`, for eager calls of ranks that
            all have tokens of their own and whole experts.
        shared_part: what of the shared experts each rank holds; `shard` needs replicas.
        overlap: shared experts run inside dispatch and combine: while the tokens travel.
        own_first: while they travel, the rank's experts work on its own tokens, which then do not travel to it. Two
            calls of the experts cost the host twice, and weights are read twice: for many tokens, in captured graphs.
            Not in the batched format, nor beside adapters cut in both matrices, whose ranks meet in their experts.
        expect_rows: rows of an all-to-all leave before the host knows their numbers, where the last calls with as many
            `padded_tokens` suggest them; where these do not keep to that, they leave once more. Not with `own_first`.
        activation_format: in which the experts get what was received.

    Raises:
        TypeError, ValueError: parts that do not go together, by name; the same on every rank.
    """

    def __init__(
        self,
        ranks: Ranks,
        placement: ExpertPlacement,
        *,
        max_tokens: int,
        exchange: str = AllGather.name,
        shared_part: SharedPart | str = SharedPart.WHOLE,
        overlap: bool = False,
        own_first: bool = False,
        expect_rows: bool = True,
        activation_format: ActivationFormat | str = ActivationFormat.STANDARD,
    ) -> None:
        expect_instance("ranks", ranks, Ranks)
        self.ranks, self.placement = ranks, placement
        self.mesh = ranks.mesh
        self.max_tokens, self.exchange_name, self.overlap, self.own_first = max_tokens, exchange, overlap, own_first
        self.expect_rows = expect_rows
        facts = {
            "placement": hashlib.sha256(repr(placement).encode()).hexdigest()[:16],
            "max_tokens": max_tokens if isinstance(max_tokens, int) else repr(max_tokens),
            "exchange": str(exchange),
            "shared_part": str(shared_part),
            "own_first": str(own_first),
            "expect_rows": str(expect_rows),
            "activation_format": str(activation_format),
        }
        with together(ranks.world, facts, always=True):
            self._check(shared_part, activation_format)
        self.shared_part = SharedPart(shared_part)
        self.activation_format = ActivationFormat(activation_format)
        self._exchange: Exchange | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelExperts:
        """The ranks are there once, whoever speaks of them."""
        return self

    def _check(self, shared_part: str, activation_format: str) -> None:
        mesh, placement = self.mesh, self.placement
        expect_instance("placement", placement, ExpertPlacement)
        expect_int("max_tokens", self.max_tokens, low=1)
        expect_bool("overlap", self.overlap)
        expect_bool("own_first", self.own_first)
        expect_bool("expect_rows", self.expect_rows)
        if placement.num_ranks != mesh.ep_size:
            raise ValueError(f"placement: expected one of ep_size {mesh.ep_size} ranks, got {placement.num_ranks}")
        for name, value, known in (
            ("exchange", self.exchange_name, (AllGather.name, AllToAll.name)),
            ("shared_part", shared_part, tuple(map(str, SharedPart))),
            ("activation_format", activation_format, tuple(map(str, ActivationFormat))),
        ):
            expect_one_of(name, value, known)
        if self.exchange_name == AllToAll.name and (mesh.num_replicas > 1 or mesh.tp_size > 1):
            raise ValueError(
                f"exchange: expected all_gather where ranks have the same tokens or parts of experts, got all_to_all "
                f"with {mesh}"
            )
        if self.own_first and activation_format == ActivationFormat.BATCHED:
            raise ValueError("own_first: expected False in the batched format, got True")
        if shared_part == SharedPart.SHARD and mesh.num_replicas == 1:
            raise ValueError(f"shared_part: expected whole where no ranks have the same tokens, got shard with {mesh}")

    @property
    def ep_rank(self) -> int:
        """This rank's share of the experts."""
        return self.mesh.ep_rank(self.ranks.rank)

    @property
    def exchange(self) -> Exchange:
        """How tokens travel.

        Raises:
            RuntimeError: no layer has joined.
        """
        if self._exchange is None:
            raise RuntimeError("experts: expected a layer that has joined, got none")
        return self._exchange

    def agreeing(self) -> AbstractContextManager[None]:
        """A block of set-up, in which an error of one rank becomes every rank's; all of them enter one."""
        return together(self.ranks.world, {}, always=True)

    def join(self, experts: RoutedExperts, num_experts: int, top_k: int, adapters: AdapterTable | None = None) -> None:
        """Take the experts of a layer; every rank's layer calls this as it is made.

        Args:
            experts: of this rank.
            num_experts: E, logical.
            top_k: of the routing.
            adapters: of these experts, which each call is given again.

        Raises:
            TypeError, ValueError: experts, or adapters of experts, that are not those of the placement, or ranks whose
                layers or tables differ; the same everywhere.
        """
        quant = experts.quant
        facts = {
            "num_experts": num_experts,
            "top_k": top_k,
            "hidden_size": experts.hidden_size,
            "intermediate_size": experts.intermediate_size,
            "dtype": str(experts.dtype),
            "scheme": "none" if quant is None else f"{quant.scheme} {quant.activation_scale}",
            **adapter_facts(adapters),
        }
        with together(self.ranks.world, facts, always=True):
            self._check_experts(experts, num_experts)
            if self.own_first and adapters is not None and adapters.shards is not None:
                raise ValueError("own_first: expected False beside fully sharded adapters, got True")
            held = self.placement.experts_of_rank[self.ep_rank]
            expect_adapters_of_rank(adapters, experts, num_experts, held, self.ranks.shards)
        device = experts.w2.device
        tables, place = self.placement.tables(device), self.placement
        homes = Homes(tables.rank_of, tables.local_of)
        # Tokens travel with physical ids, or with logical ones where those say as much, and nothing is looked up.
        local = place.expert_map(self.ep_rank) if place.has_copies else place.local_experts(self.ep_rank)
        if not place.has_copies:
            only = tables.copies[:, 0].long()
            homes = Homes(tables.rank_of[only], tables.local_of[only])
        numbers = torch.arange(self.placement.num_physical, dtype=torch.int32)
        by_local = torch.where(numbers < experts.num_local_experts, numbers, -1)
        # Graphs of earlier experts hold other maps.
        self._number = next(_numbers)
        self._tables, self._expert_map, self._local_map = tables, local.to(device), by_local.to(device)
        wire = Wire(quant if self.activation_format is ActivationFormat.STANDARD else None)
        if self.exchange_name == AllToAll.name:
            peers = self.ranks.world if self.ranks.peers is None else self.ranks.peers
            self._exchange = AllToAll(peers, homes, wire, expect_rows=self.expect_rows)
        else:
            self._exchange = AllGather(self.ranks.peers, self.ranks.replicas, wire)

    def _check_experts(self, experts: RoutedExperts, num_experts: int) -> None:
        held = len(self.placement.experts_of_rank[self.ep_rank])
        if num_experts != self.placement.num_experts:
            raise ValueError(
                f"placement: expected one of the gate's {num_experts} experts, got {self.placement.num_experts}"
            )
        if experts.num_local_experts != held:
            raise ValueError(f"experts: expected the {held} of the placement, got {experts.num_local_experts}")
        quant = experts.quant
        if quant is not None and quant.activation_scale is ActivationScale.TENSOR and self.mesh.world_size > 1:
            raise ValueError(
                "quant: expected scales that a token has for itself, or a static one, got one of the whole tensor, "
                "which would depend on what a rank has of it"
            )

    def _together(self, meetings: int = 0, **facts: Any) -> AbstractContextManager[None]:
        return together(self.ranks.world, facts, meetings=meetings) if debugging() else nullcontext()

    def run(
        self,
        hidden_states: torch.Tensor,
        experts: RoutedExperts,
        select: Select,
        shared: Shared | None,
        *,
        order: SharedExpertsOrder = SharedExpertsOrder.NONE,
        stream: torch.cuda.Stream | None = None,
        shared_is_reduced: bool = False,
        padded_tokens: int | None = None,
        adapters: AdapterTable | None = None,
        lora_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A layer's output for this rank's tokens; every rank calls it, also one without tokens.

        Args:
            hidden_states: `[M, H]`.
            experts: of this rank.
            select: routing weights and logical ids, `[M, top_k]` each, of hidden states.
            shared: the shared experts, or None.
            order: when they run.
            stream: of `multi_stream_overlapped`.
            shared_is_reduced: their output is summed over the ranks already.
            padded_tokens: rows that each rank has with its padding; None: `max_tokens`.
            adapters: of this rank's experts, in the slots that every rank has them in; None where no rank has any.
            lora_ids: `[M]` int32, the slot of each token's adapter, which travels with it; None: this rank's tokens
                have none. Other ranks' may, so with adapters every token takes its id along.

        Raises:
            TypeError, ValueError: more tokens than `padded_tokens`, or more of them than `max_tokens`, ids of another
                shape or without adapters; in debug mode on all ranks, and then also tables that differ.
        """
        exchange = self.exchange
        rows = self.max_tokens if padded_tokens is None else padded_tokens
        output = None
        if self.ranks.replicas is not None and debugging():
            agree(self.ranks.replicas, {"num_tokens of ranks with the same tokens": len(hidden_states)})
        with self._together(padded_tokens=rows, **(adapter_facts(adapters) if debugging() else {})):
            expect_int("padded_tokens", rows, low=0, high=self.max_tokens)
            if len(hidden_states) > rows:
                raise ValueError(f"hidden_states: expected at most {rows} tokens, as agreed, got {len(hidden_states)}")
            lora_ids = _travelling_ids(adapters, lora_ids, hidden_states)
            if shared is not None and order is SharedExpertsOrder.EXTERNAL:
                output = shared(hidden_states)
            topk_weights, topk_ids = select(hidden_states)
            if self.placement.has_copies:
                # Replicas have the same tokens, and must choose alike.
                topk_ids = choose_copies(topk_ids, self._tables, self.mesh.dp_rank(self.ranks.rank))
            tokens = Tokens(hidden_states, topk_weights, topk_ids.to(torch.int32), lora_ids)
        # Asked before the host waits for numbers of rows, and the device then for the host.
        key = self._key(experts) if self.exchange_name == AllToAll.name else None
        runs_beside = shared is not None and order in _BESIDE
        launched = exchange.dispatch(tokens, rows, own_first=self.own_first, runs_beside=runs_beside)
        # Ranks whose adapters are cut in both matrices meet between them: once for each of the two products.
        with self._together(2 if adapters is not None and adapters.shards is not None else 0), launched:
            if shared is not None and order is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED and stream is not None:
                with beside(lambda: shared(hidden_states), stream, hidden_states) as side:
                    received, partial, own = self._work_on(launched, experts, adapters, key)
                output = side.joined()
            else:
                if shared is not None and order is SharedExpertsOrder.MK_INTERNAL_OVERLAPPED:
                    output = shared(hidden_states)  # while the tokens travel
                received, partial, own = self._work_on(launched, experts, adapters, key)
                if shared is not None and output is None:
                    output = shared(hidden_states)
        if output is None:
            return exchange.combine(partial, received, own=own)
        if self.shared_part is SharedPart.SHARD and not shared_is_reduced:
            return exchange.combine(partial, received, output, own)
        return exchange.combine(partial, received, own=own).add_(output)

    def _work_on(
        self,
        launched: Launched,
        experts: RoutedExperts,
        adapters: AdapterTable | None,
        key: tuple[object, ...] | None,
    ) -> tuple[Received, torch.Tensor, torch.Tensor | None]:
        """What arrived, the experts' part of its sums, and that of the rank's own tokens where those stayed apart."""
        own = None if launched.own is None else self.partial_sums(launched.own, experts, adapters)
        received = launched.wait()
        partial = self.partial_sums(received, experts, adapters, key)
        anew = launched.again()
        if anew is not None:
            received, partial = anew, self.partial_sums(anew, experts, adapters, key)
        return received, partial, own

    def partial_sums(
        self,
        received: Received,
        experts: RoutedExperts,
        adapters: AdapterTable | None = None,
        key: tuple[object, ...] | None = None,
    ) -> torch.Tensor:
        """What the experts here make of what arrived: `[rows, H]`, a part of each token's sum.

        Args:
            received: from the exchange.
            experts: of this rank.
            adapters: likewise.
            key: what the work hangs on beside the tokens and adapters, where somebody has asked already.
        """
        tokens, dp_size = received.tokens, self.mesh.dp_size
        expert_map = self._local_map if tokens.ids_are_local else self._expert_map
        if self.activation_format is ActivationFormat.BATCHED:
            ids = tokens.topk_ids.long()
            local_ids = torch.where(ids >= 0, expert_map[ids.clamp(min=0)], -1)
            return batched_partial(experts, tokens, local_ids, dp_size, adapters)
        out = received.sums
        if out is None and tokens.input_scale is not None:
            out = torch.empty(tokens.hidden_states.shape, dtype=experts.dtype, device=tokens.hidden_states.device)

        def work() -> torch.Tensor:
            return experts(
                tokens.hidden_states,
                tokens.topk_weights,
                tokens.topk_ids,
                expert_map,
                self.placement.num_physical,
                adapters,
                None if adapters is None else tokens.lora_ids,
                dp_size=dp_size,
                input_scale=tokens.input_scale,
                out=out,
            )

        with replaying_unless_said():
            if received.landing is None or adapters is not None:
                return work()
            return received.landing.work(self._key(experts) if key is None else key, work)

    def _key(self, experts: RoutedExperts) -> tuple[object, ...]:
        """What the experts' work hangs on beside the tokens and adapters."""
        return (self._number, *what_decides(), *experts.identity())


def _travelling_ids(
    adapters: AdapterTable | None, lora_ids: torch.Tensor | None, hidden_states: torch.Tensor
) -> torch.Tensor | None:
    """The adapter of each token, as it travels; None where no rank has adapters."""
    num_tokens = len(hidden_states)
    if lora_ids is not None:
        if adapters is None:
            raise ValueError("lora_ids: expected None without adapters, got ids")
        expect_tensor("lora_ids", lora_ids, shape=(num_tokens,), dtypes=(torch.int32,), like=hidden_states)
        adapters.debug_expect_ids("lora_ids", lora_ids)
        return lora_ids
    if adapters is None:
        return None
    return torch.full((num_tokens,), -1, dtype=torch.int32, device=hidden_states.device)

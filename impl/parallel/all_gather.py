"""All-gather and reduce-scatter: every rank sees all tokens, and the sums come back by parts.

Every size is known before anything runs, so the exchange can be captured in a CUDA graph. Ranks with fewer tokens are
padded to the agreed number; padded tokens have no expert (their ids are -1) and add nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .collectives import Group
from .exchange import Exchange, Launched, Received
from .wire import Tokens, Wire


@dataclass(frozen=True, eq=False)
class _Ticket:
    num_tokens: int
    # Of all ranks' rows, where the experts have written everything there is.
    sums: torch.Tensor | None = None


class AllGather(Exchange):
    """For tokens of several ranks, tokens that several ranks have alike (replicas), or both.

    Sums over the ranks are the backend's, in the dtype of the activations.

    Args:
        peers: ranks that have all tokens between them; None where this rank has them all.
        replicas: ranks that have the same tokens; None where there are no others.
        wire: how tokens travel.
    """

    name: ClassVar[str] = "all_gather"

    def __init__(self, peers: Group | None, replicas: Group | None, wire: Wire) -> None:
        self._peers, self._replicas, self._wire = peers, replicas, wire

    def dispatch(
        self, tokens: Tokens, padded_tokens: int, *, own_first: bool = False, runs_beside: bool = True
    ) -> Launched:
        """One collective, which is never in the way of what runs beside it."""
        del runs_beside
        peers = self._peers
        if peers is None:
            return Launched(lambda: Received(tokens, _Ticket(tokens.num_tokens)))
        sent = self._wire.quantized(tokens)
        packed = self._wire.pack(sent, padded_tokens)
        arrived = packed.new_empty((padded_tokens * peers.size, packed.shape[1]))
        work = peers.all_gather(arrived, packed)
        first, end = peers.rank * padded_tokens, (peers.rank + 1) * padded_tokens
        is_between = first > 0 and end < len(arrived)
        rows, sums = slice(None), None
        if own_first and not is_between:
            rows = slice(0, first) if first else slice(end, None)
            sums = tokens.hidden_states.new_empty((len(arrived), tokens.hidden_states.shape[1]))

        def finish() -> Received:
            work.wait()
            there = self._wire.tokens(arrived[rows], sent, ids_are_local=False)
            if own_first and is_between:
                # The other ranks' rows lie on both sides: one call takes them all, with no expert in between.
                there.topk_ids[first:end].fill_(-1)
                if there.lora_ids is not None:
                    there.lora_ids[first:end].fill_(-1)
            return Received(there, _Ticket(tokens.num_tokens, sums), None if sums is None else sums[rows])

        if not own_first:
            return Launched(finish)
        return Launched(finish, Received(sent, sums=None if sums is None else sums[first : first + tokens.num_tokens]))

    def combine(
        self,
        partial: torch.Tensor,
        received: Received,
        shared: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum over the peers' experts, by parts; then, with what the shared experts add, over the replicas."""
        ticket: _Ticket = received.ticket
        total = partial
        if self._peers is not None:
            if ticket.sums is not None:
                partial = ticket.sums
            rows = len(partial) // self._peers.size
            if own is not None and ticket.sums is None:
                first = self._peers.rank * rows
                partial[first : first + ticket.num_tokens] = own
            total = partial.new_empty((rows, partial.shape[1]))
            self._peers.reduce_scatter(total, partial).wait()
            total = total[: ticket.num_tokens]
        if shared is not None:
            total = total.add_(shared)
        if self._replicas is not None:
            self._replicas.all_reduce(total).wait()
        return total

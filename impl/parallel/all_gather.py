"""All-gather and reduce-scatter: every rank sees all tokens, and the sums come back by parts.

Every size is known before anything runs, so the exchange can be captured in a CUDA graph. Ranks with fewer tokens are
padded to the agreed number; padded tokens have no expert (their ids are -1) and add nothing.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .collectives import Group
from .exchange import Exchange, Launched, Received
from .wire import Tokens, Wire


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

    def dispatch(self, tokens: Tokens, padded_tokens: int) -> Launched:
        """One collective."""
        peers, num_tokens = self._peers, tokens.num_tokens
        if peers is None:
            return Launched(lambda: Received(tokens, num_tokens))
        sent = self._wire.quantized(tokens)
        packed = self._wire.pack(sent, padded_tokens)
        arrived = packed.new_empty((padded_tokens * peers.size, packed.shape[1]))
        work = peers.all_gather(arrived, packed)

        def finish() -> Received:
            work.wait()
            return Received(self._wire.tokens(arrived, sent, ids_are_local=False), num_tokens)

        return Launched(finish)

    def combine(self, partial: torch.Tensor, received: Received, shared: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over the peers' experts, by parts; then, with what the shared experts add, over the replicas."""
        num_tokens = received.ticket
        own = partial
        if self._peers is not None:
            own = partial.new_empty((len(partial) // self._peers.size, partial.shape[1]))
            self._peers.reduce_scatter(own, partial).wait()
            own = own[:num_tokens]
        if shared is not None:
            own = own.add_(shared)
        if self._replicas is not None:
            self._replicas.all_reduce(own).wait()
        return own

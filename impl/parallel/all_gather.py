"""All-gather and reduce-scatter: every rank sees all tokens, and the sums come back by parts.

Every size is known before anything runs, so the exchange can be captured in a CUDA graph. Ranks with fewer tokens are
padded to the agreed number; padded tokens have no expert (their ids are -1) and add nothing.
"""

from __future__ import annotations

import struct
from typing import ClassVar

import torch

from .collectives import Group
from .exchange import Exchange, Launched, Received
from .rows import as_bytes
from .wire import Tokens, Wire

# A scale of 1 in the words of a token that is not there.
_ONE = struct.unpack("<i", struct.pack("<f", 1.0))[0]


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
        """Two collectives: the hidden states, and all else."""
        peers, num_tokens = self._peers, tokens.num_tokens
        if peers is None:
            return Launched(lambda: Received(tokens, num_tokens))
        sent = self._wire.quantized(tokens)
        rows = _padded(sent.hidden_states, padded_tokens)
        words = self._padded_words(sent, padded_tokens)
        all_rows, all_words = (t.new_empty((len(t) * peers.size, *t.shape[1:])) for t in (rows, words))
        works = [peers.all_gather(all_words, words), peers.all_gather(all_rows, rows)]

        def finish() -> Received:
            for work in works:
                work.wait()
            return Received(self._wire.tokens(all_rows, all_words, sent, ids_are_local=False), num_tokens)

        return Launched(finish)

    def _padded_words(self, tokens: Tokens, padded_tokens: int) -> torch.Tensor:
        words = self._wire.words(tokens)
        missing = padded_tokens - len(words)
        if not missing:
            return words
        top_k = tokens.topk_ids.shape[1]
        padding = words.new_full((missing, words.shape[1]), _ONE)
        padding[:, : 2 * top_k] = 0
        padding[:, :top_k] = -1
        if tokens.lora_ids is not None:
            padding[:, 2 * top_k] = -1
        return torch.cat([words, padding])

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


def _padded(rows: torch.Tensor, padded_tokens: int) -> torch.Tensor:
    """Rows of zeros behind the others; dense."""
    if len(rows) == padded_tokens:
        return rows.contiguous()
    padded = torch.zeros((padded_tokens, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    as_bytes(padded)[: len(rows)] = as_bytes(rows)
    return padded

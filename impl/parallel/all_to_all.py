"""All-to-all with variable splits: each token travels once to each rank that holds one of its experts.

It carries the ids that its experts have there and their weights; one sum per token and rank comes back, and a token's
sums are added in the order of the ranks, in float32, so that the same call gives the same bits. How many tokens go
where is known on the device alone, and the host must know it: eager only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .collectives import Group
from .exchange import Exchange, Launched, Received
from .placement import PlacementTables
from .rows import take_rows
from .travel import Travel, plan_travel, ranks_of_tokens, sum_over_ranks
from .wire import Tokens, Wire


@dataclass(frozen=True, eq=False)
class _Ticket:
    travel: Travel
    sent: list[int]
    received: list[int]


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class AllToAll(Exchange):
    """For ranks each of which has its own tokens and whole experts.

    Args:
        peers: all ranks, in the order of the placement.
        tables: of the placement, on the device.
        wire: how tokens travel.
    """

    name: ClassVar[str] = "all_to_all"

    def __init__(self, peers: Group, tables: PlacementTables, wire: Wire) -> None:
        self._peers, self._tables, self._wire = peers, tables, wire

    def dispatch(self, tokens: Tokens, padded_tokens: int) -> Launched:
        """Three collectives: the numbers of rows, for which the host waits, the hidden states, and all else.

        Raises:
            RuntimeError: under the capture of a CUDA graph.
        """
        del padded_tokens  # nothing is padded here
        if is_capturing():
            raise RuntimeError(
                "all_to_all: expected an eager call, got the capture of a CUDA graph, which cannot hold splits that "
                "differ from call to call: use all_gather"
            )
        peers = self._peers
        present = ranks_of_tokens(tokens.topk_ids, self._tables, peers.size)
        sent, received = self._exchange_counts(present)
        travel = plan_travel(tokens.topk_ids, present, self._tables, sum(sent))
        going = self._wire.quantized(tokens)
        carried = replace(
            going,
            topk_ids=travel.local_ids,
            topk_weights=tokens.topk_weights[travel.tokens],
            lora_ids=None if tokens.lora_ids is None else tokens.lora_ids[travel.tokens],
            input_scale=going.input_scale[travel.tokens] if self._wire.scale_travels else going.input_scale,
        )
        rows, words = take_rows(going.hidden_states, travel.tokens), self._wire.words(carried)
        here = sum(received)
        all_rows, all_words = (t.new_empty((here, *t.shape[1:])) for t in (rows, words))
        works = [
            peers.all_to_all(all_words, words, received, sent),
            peers.all_to_all(all_rows, rows, received, sent),
        ]

        def finish() -> Received:
            for work in works:
                work.wait()
            arrived = self._wire.tokens(all_rows, all_words, carried, ids_are_local=True)
            return Received(arrived, _Ticket(travel, sent, received))

        return Launched(finish)

    def _exchange_counts(self, present: torch.Tensor) -> tuple[list[int], list[int]]:
        """Rows to send to each rank, and to receive from each."""
        sent = present.sum(dim=0)
        both = torch.stack([sent, torch.empty_like(sent)])
        ones = [1] * self._peers.size
        self._peers.all_to_all(both[1], both[0], ones, ones).wait()
        to_send, to_receive = both.tolist()
        return to_send, to_receive

    def combine(self, partial: torch.Tensor, received: Received, shared: torch.Tensor | None = None) -> torch.Tensor:
        """Each sum back to the rank that its token came from, and a token's sums added up in the order of the ranks."""
        if shared is not None:
            raise ValueError("shared: expected None, as no rank has another's tokens here, got a tensor")
        ticket: _Ticket = received.ticket
        back = partial.new_empty((len(ticket.travel.tokens), partial.shape[1]))
        self._peers.all_to_all(back, partial.contiguous(), ticket.sent, ticket.received).wait()
        return sum_over_ranks(back, ticket.travel.slots)

"""All-to-all with variable splits: each token travels once to each rank that holds one of its experts.

It carries the ids that its experts have there and their weights; one sum per token and rank comes back, and a token's
sums are added in the order of the ranks, in float32, so that the same call gives the same bits. How many tokens go
where is known on the device alone, and the host must know it: eager only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .collectives import Group
from .exchange import Exchange, Launched, Received
from .travel import Homes, Travel, plan_travel, sum_over_ranks
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
        homes: of the placement, on the device.
        wire: how tokens travel.
    """

    name: ClassVar[str] = "all_to_all"

    def __init__(self, peers: Group, homes: Homes, wire: Wire) -> None:
        self._peers, self._homes, self._wire = peers, homes, wire

    def dispatch(self, tokens: Tokens, padded_tokens: int, *, own_first: bool = False) -> Launched:
        """Two collectives: the numbers of rows, for which the host waits, and the rows, which are packed meanwhile.

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
        num_tokens, top_k = tokens.topk_ids.shape
        counts = torch.empty((2, peers.size), dtype=torch.int32, device=tokens.topk_ids.device)
        travel = plan_travel(tokens.topk_ids, self._homes, counts[0], stays=peers.rank if own_first else None)
        ones = [1] * peers.size
        work = peers.all_to_all(counts[1], counts[0], ones, ones)
        going = self._wire.quantized(tokens)
        packed = self._wire.pack(going, num_tokens * min(top_k, peers.size), travel)
        work.wait()
        sent, received = counts.tolist()
        arrived = packed.new_empty((sum(received), packed.shape[1]))
        work = peers.all_to_all(arrived, packed[: sum(sent)], received, sent)

        def finish() -> Received:
            work.wait()
            return Received(self._wire.tokens(arrived, going, ids_are_local=True), _Ticket(travel, sent, received))

        return Launched(finish, Received(going) if own_first else None)

    def combine(
        self,
        partial: torch.Tensor,
        received: Received,
        shared: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each sum back to the rank that its token came from, and a token's sums added up in the order of the ranks."""
        if shared is not None:
            raise ValueError("shared: expected None, as no rank has another's tokens here, got a tensor")
        ticket: _Ticket = received.ticket
        back = partial.new_empty((sum(ticket.sent), partial.shape[1]))
        self._peers.all_to_all(back, partial.contiguous(), ticket.sent, ticket.received).wait()
        return sum_over_ranks(back, ticket.travel, own)

"""All-to-all with variable splits: each token travels once to each rank that holds one of its experts.

It carries the ids that its experts have there and their weights; one sum per token and rank comes back, and a token's
sums are added in the order of the ranks, in float32, so that the same call gives the same bits. How many tokens go
where is known on the device alone, and the host must know it: eager only.

The device has nothing to do while the host learns the numbers and launches what follows, so little is launched anew:
kernels are replayed (`impl.replay`), and rows that arrive are rounded up to a number that comes again, with rows that
have no expert. With own tokens first numbers come to the host, and rows leave, on a stream beside the caller's: the
host waits for the plan alone, and not for what the caller's stream was given since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from ..replay import is_replaying, may_launch_otherwise, replaying_unless_said
from .collectives import Group, Work
from .exchange import Exchange, Launched, Received
from .landing import Hold, site_of, take_landing
from .travel import Homes, Travel, plan_travel, sum_over_ranks
from .wire import Tokens, Wire

Splits = tuple[list[int], list[int]]
"""The rows that go to each rank, and that come from each."""


@dataclass(frozen=True, eq=False)
class _Ticket:
    travel: Travel
    most: int  # rows that could have been sent
    sent: list[int]
    received: list[int]
    hold: Hold | None  # of the memory in which they lie, until the sums are back


@dataclass(frozen=True, eq=False)
class _UnderWay:
    """Rows that come here; whoever reads them waits first."""

    rows: torch.Tensor
    wait: Callable[[], object]
    ticket: _Ticket


def _round_up(num_rows: int) -> int:
    """At most a sixteenth more rows, and one of few numbers: calls whose rows differ by little have one form."""
    step = max(1, 1 << max(0, num_rows.bit_length() - 5))
    return -(-num_rows // step) * step


def _lie_in_their_rows(tokens: Tokens) -> bool:
    """Whether all that the experts take of tokens that arrive on a GPU is read where it lies."""
    return tokens.topk_ids.is_cuda and tokens.lora_ids is None and tokens.input_scale is None


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
        # Pinned memory of the host for numbers, which nobody uses now.
        self._pinned: list[torch.Tensor] = []

    def dispatch(
        self, tokens: Tokens, padded_tokens: int, *, own_first: bool = False, runs_beside: bool = True
    ) -> Launched:
        """Two collectives: the numbers of rows, for which the host waits, and the rows, which are packed meanwhile.

        With `own_first` the host waits, and the rows leave, only once the rank's own tokens have been given to its
        experts.

        Raises:
            RuntimeError: under the capture of a CUDA graph.
        """
        del padded_tokens  # nothing is padded here
        if is_capturing(tokens.topk_ids.device):
            raise RuntimeError(
                "all_to_all: expected an eager call, got the capture of a CUDA graph, which cannot hold splits that "
                "differ from call to call: use all_gather"
            )
        with replaying_unless_said():
            return self._dispatch(tokens, own_first, runs_beside)

    def _dispatch(self, tokens: Tokens, own_first: bool, runs_beside: bool) -> Launched:
        peers, device, dtype = self._peers, tokens.topk_ids.device, tokens.hidden_states.dtype
        num_tokens, top_k = tokens.topk_ids.shape
        counts = torch.empty((2, peers.size), dtype=torch.int32, device=device)
        travel = plan_travel(tokens.topk_ids, self._homes, counts[0], stays=peers.rank if own_first else None)
        ones = [1] * peers.size
        work = peers.all_to_all(counts[1], counts[0], ones, ones, in_order=not own_first)
        splits = self._to_the_host(counts, work, beside=own_first)
        going = self._wire.quantized(tokens)
        packed = self._wire.pack(going, num_tokens * min(top_k, peers.size), travel)
        is_packed = _event_of_now(device) if own_first else None
        hidden_size = tokens.hidden_states.shape[1]
        can_land = not own_first and _lie_in_their_rows(going) and may_launch_otherwise()
        site = site_of(packed.shape[1], hidden_size, dtype, device) if can_land else None
        laid_out = (dtype, hidden_size, top_k)

        def leave() -> _UnderWay:
            sent, received = splits()
            num_rows = sum(received)
            most = _round_up(num_rows) if is_replaying() else num_rows
            hold = None if site is None else take_landing(site, most)
            # Memory of that stream's pool: the caller's may still work with what it has freed.
            with _beside(device, is_packed) if own_first else nullcontext():
                rows = packed.new_empty((most, packed.shape[1])) if hold is None else hold.landing.rows
                if hold is not None:
                    if not hold.landing.is_padding:
                        self._wire.pad(rows, 0, going)
                    hold.landing.is_padding = False
                in_order = not (own_first or runs_beside)
                work = peers.all_to_all(rows[:num_rows], packed[: sum(sent)], received, sent, in_order=in_order)
                if hold is None:
                    self._wire.pad(rows, num_rows, going)
                arrival = _arrival(rows, work) if own_first else work.wait
                return _UnderWay(rows, arrival, _Ticket(travel, len(packed), sent, received, hold))

        def arrive(coming: _UnderWay) -> Received:
            coming.wait()
            if coming.ticket.hold is None:
                return Received(self._wire.tokens(coming.rows, going, ids_are_local=True), coming.ticket)
            landing = coming.ticket.hold.landing
            arrived = landing.views.get(laid_out)
            if arrived is None:
                arrived = landing.views[laid_out] = self._wire.tokens(coming.rows, going, ids_are_local=True)
            return Received(arrived, coming.ticket, landing.sums, landing)

        if own_first:
            return Launched(lambda: arrive(leave()), Received(going))
        coming = leave()
        return Launched(lambda: arrive(coming))

    def _to_the_host(self, counts: torch.Tensor, work: Work, *, beside: bool) -> Callable[[], Splits]:
        """Start to bring `counts [2, ranks]` int32 to the host once `work` is done; the answer waits for them.

        Whoever calls keeps the counts until then.
        """
        if not counts.is_cuda:

            def read_here() -> Splits:
                work.wait()
                sent, received = counts.tolist()
                return sent, received

            return read_here
        with _beside(counts.device, _event_of_now(counts.device)) if beside else nullcontext():
            work.wait()
            there = self._pinned.pop() if self._pinned else torch.empty_like(counts, device="cpu", pin_memory=True)
            there.copy_(counts, non_blocking=True)
            is_there = torch.cuda.current_stream(counts.device).record_event()

        def read() -> Splits:
            is_there.synchronize()
            sent, received = there.tolist()
            self._pinned.append(there)
            return sent, received

        return read

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
        num_rows = sum(ticket.sent)
        with replaying_unless_said():
            back = partial.new_empty((ticket.most if is_replaying() else num_rows, partial.shape[1]))
            sums = partial[: sum(ticket.received)].contiguous()
            work = self._peers.all_to_all(back[:num_rows], sums, ticket.sent, ticket.received, in_order=True)
            if ticket.hold is not None:
                # Whoever gets this memory next finds no tokens in it, and the host gains time where the device would
                # wait for it.
                self._wire.pad(ticket.hold.landing.rows, 0, received.tokens)
                ticket.hold.landing.is_padding = True
            work.wait()
            return sum_over_ranks(back, ticket.travel, own)


# --- The stream beside the caller's, on a GPU ------------------------------------------------------------------------


@cache
def _stream_of(index: int) -> torch.cuda.Stream:
    """One for all layers of a device: their exchanges share the links anyway. What it launches goes first."""
    return torch.cuda.Stream(torch.device("cuda", index), priority=-1)


def _event_of_now(device: torch.device) -> torch.Event | None:
    """When the current stream has done what it was given so far; None on a CPU, where that is done."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def _beside(device: torch.device, since: torch.Event | None) -> Iterator[None]:
    """A block on the stream beside, once `since` has happened; on a CPU a block like any other."""
    if since is None:
        yield
        return
    stream = _stream_of(torch.cuda.current_device() if device.index is None else device.index)
    stream.wait_event(since)
    with torch.cuda.stream(stream):
        yield


def _arrival(rows: torch.Tensor, work: Work) -> Callable[[], object]:
    """What makes the caller's stream wait for rows that come on the stream beside; on a CPU the caller itself."""
    if not rows.is_cuda:
        return work.wait
    work.wait()
    has_arrived = torch.cuda.current_stream(rows.device).record_event()

    def wait() -> None:
        here = torch.cuda.current_stream(rows.device)
        here.wait_event(has_arrived)
        rows.record_stream(here)

    return wait

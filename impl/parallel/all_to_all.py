"""All-to-all with variable splits: each token travels once to each rank that holds one of its experts.

It carries the ids that its experts have there and their weights; one sum per token and rank comes back, and a token's
sums are added in the order of the ranks, in float32, so that the same call gives the same bits. How many tokens go
where is known on the device alone, and the host must know it: eager only.

The device would have nothing to do while the host learns the numbers and launches what follows. So rows leave without
them where earlier calls suggest how many there will be (`expected_rows`): what is set aside and not needed travels as
tokens without an expert, and the host reads the numbers behind the launch of the experts. Where they do not keep to
that, the rows leave once more and the experts work anew. Else little is launched anew: kernels are replayed
(`impl.replay`), and rows that arrive are rounded up to a number that comes again. With own tokens first numbers come to
the host, and rows leave, on a stream beside the caller's: the host waits for the plan alone, and not for what the
caller's stream was given since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch

from .. import path
from ..replay import is_replaying, may_launch_otherwise, replaying_unless_said
from .agreement import expect_alike
from .collectives import Group, Work
from .exchange import Exchange, Launched, Received
from .expected_rows import ExpectedRows, Numbers, Room, round_up
from .landing import Hold, site_of, take_landing
from .travel import Homes, Travel, plan_travel, sum_over_ranks
from .wire import Tokens, Wire


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


def _lie_in_their_rows(tokens: Tokens) -> bool:
    """Whether all that the experts take of tokens that arrive on a GPU is read where it lies."""
    return tokens.topk_ids.is_cuda and tokens.lora_ids is None and tokens.input_scale is None


def _of_one_padding(numbers: Numbers) -> Numbers:
    """Of what all ranks sent the rows: behind them each said how many it has with its padding."""
    expect_alike("padded_tokens", numbers[:, -1].tolist())
    return numbers[:, :-1]


def _of_rank(rows: Numbers, rank: int) -> tuple[list[int], list[int]]:
    """What a rank sends to each, and what it receives from each."""
    return rows[rank].tolist(), rows[:, rank].tolist()


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Sending:
    """The rows of one dispatch on their way.

    Args:
        peers: all ranks.
        wire: how tokens travel.
        tokens: of this rank.
        travel: their plan.
        own_first: rows leave on the stream beside.
        in_order: else they leave in the caller's stream, and nothing is to run beside them.

    Attributes:
        going: the tokens as they travel.
    """

    def __init__(
        self, peers: Group, wire: Wire, tokens: Tokens, travel: Travel, *, own_first: bool, in_order: bool
    ) -> None:
        self._peers, self._wire, self._planned = peers, wire, travel
        self._own_first, self._in_order = own_first, in_order and not own_first
        self.going = wire.quantized(tokens)
        self._device, (num_tokens, top_k) = tokens.topk_ids.device, tokens.topk_ids.shape
        self._most = num_tokens * min(top_k, peers.size)
        self._laid_out = (tokens.hidden_states.dtype, tokens.hidden_states.shape[1], top_k)

    def pack(self, room: Room | None) -> None:
        """Launch what makes rows of the tokens; those set aside and not needed become tokens without an expert."""
        if room is None:
            self._travel = self._planned
            self._packed = self._wire.pack(self.going, self._most, self._travel)
        else:
            self._travel = replace(self._planned, room=room)
            self._packed = self._wire.pack(self.going, sum(room.sent), self._travel)
        self._is_packed = _event_of_now(self._device) if self._own_first else None
        dtype, hidden_size, _ = self._laid_out
        can_land = not self._own_first and _lie_in_their_rows(self.going) and may_launch_otherwise()
        self._site = site_of(self._packed.shape[1], hidden_size, dtype, self._device) if can_land else None

    def leave(self, sent: list[int], received: list[int]) -> _UnderWay:
        """Launch the exchange of what was packed: rows for each rank, and from each."""
        packed, num_rows = self._packed, sum(received)
        most = round_up(num_rows) if is_replaying() else num_rows
        hold = None if self._site is None else take_landing(self._site, most)
        # Memory of that stream's pool: the caller's may still work with what it has freed.
        with _beside(self._device, self._is_packed) if self._own_first else nullcontext():
            rows = packed.new_empty((most, packed.shape[1])) if hold is None else hold.landing.rows
            if hold is not None:
                hold.landing.pad_from(num_rows, self._wire, self.going)
            work = self._peers.all_to_all(rows[:num_rows], packed[: sum(sent)], received, sent, in_order=self._in_order)
            if hold is None:
                self._wire.pad(rows, num_rows, self.going)
            arrival = _arrival(rows, work) if self._own_first else work.wait
            return _UnderWay(rows, arrival, _Ticket(self._travel, len(packed), sent, received, hold))

    def arrive(self, coming: _UnderWay) -> Received:
        """What has come, once the caller's stream has waited for it."""
        coming.wait()
        if coming.ticket.hold is None:
            return Received(self._wire.tokens(coming.rows, self.going, ids_are_local=True), coming.ticket)
        landing = coming.ticket.hold.landing
        arrived = landing.views.get(self._laid_out)
        if arrived is None:
            arrived = self._wire.tokens(coming.rows, self.going, ids_are_local=True)
            landing.views[self._laid_out] = arrived
        return Received(arrived, coming.ticket, landing.sums, landing)


class AllToAll(Exchange):
    """For ranks each of which has its own tokens and whole experts.

    Args:
        peers: all ranks, in the order of the placement.
        homes: of the placement, on the device.
        wire: how tokens travel.
        expect_rows: rows leave before the host knows their numbers, where earlier calls suggest them.
    """

    name: ClassVar[str] = "all_to_all"

    def __init__(self, peers: Group, homes: Homes, wire: Wire, *, expect_rows: bool = True) -> None:
        self._peers, self._homes, self._wire = peers, homes, wire
        self._expected = ExpectedRows(peers.rank) if expect_rows else None
        # Pinned memory of the host for numbers, which nobody uses now.
        self._pinned: list[torch.Tensor] = []

    def dispatch(
        self, tokens: Tokens, padded_tokens: int, *, own_first: bool = False, runs_beside: bool = True
    ) -> Launched:
        """Two collectives: the numbers of rows, and the rows, for which the host waits for the numbers or does not.

        With `own_first` it does, and the rows leave only once the rank's own tokens have been given to its experts.

        Raises:
            RuntimeError: under the capture of a CUDA graph.
            ValueError: ranks with different `padded_tokens`, as soon as numbers are read; on every rank.
        """
        if is_capturing(tokens.topk_ids.device):
            raise RuntimeError(
                "all_to_all: expected an eager call, got the capture of a CUDA graph, which cannot hold splits that "
                "differ from call to call: use all_gather"
            )
        with replaying_unless_said():
            return self._dispatch(tokens, padded_tokens, own_first, runs_beside)

    def _dispatch(self, tokens: Tokens, padded_tokens: int, own_first: bool, runs_beside: bool) -> Launched:
        peers, device = self._peers, tokens.topk_ids.device
        expected = None if own_first else self._expected
        room = None if expected is None else expected.room(padded_tokens, device)
        numbers = torch.empty((1 + peers.size, peers.size + 1), dtype=torch.int32, device=device)
        stays = peers.rank if own_first else None
        travel = plan_travel(tokens.topk_ids, self._homes, numbers[0], padded_tokens, stays)
        work = peers.all_gather(numbers[1:], numbers[:1], in_order=not own_first)
        read = self._to_the_host(numbers[1:], work, beside=own_first)
        sending = _Sending(peers, self._wire, tokens, travel, own_first=own_first, in_order=not runs_beside)
        sending.pack(room)

        if room is not None:
            coming = sending.leave(room.sent, room.received)

            def again() -> Received | None:
                rows = read()
                has_room = expected is not None and expected.learn(padded_tokens, rows)
                path.note("expected_rows", "held" if has_room else "exceeded")
                if has_room:
                    return None
                sending.pack(None)
                return sending.arrive(sending.leave(*_of_rank(rows, peers.rank)))

            return Launched(lambda: sending.arrive(coming), again=again)
        if own_first:
            there = lambda: sending.arrive(sending.leave(*_of_rank(read(), peers.rank)))  # noqa: E731
            return Launched(there, Received(sending.going))
        rows = read()
        coming = sending.leave(*_of_rank(rows, peers.rank))
        if expected is not None:
            expected.learn(padded_tokens, rows)
        return Launched(lambda: sending.arrive(coming))

    def _to_the_host(self, numbers: torch.Tensor, work: Work, *, beside: bool) -> Callable[[], Numbers]:
        """Start to bring `numbers [ranks, ranks + 1]` int32 to the host once `work` is done; the answer waits for them.

        Whoever calls keeps the numbers until then.
        """
        if not numbers.is_cuda:

            def read_here() -> Numbers:
                work.wait()
                return _of_one_padding(numbers.numpy())

            return read_here
        with _beside(numbers.device, _event_of_now(numbers.device)) if beside else nullcontext():
            work.wait()
            there = self._pinned.pop() if self._pinned else torch.empty_like(numbers, device="cpu", pin_memory=True)
            there.copy_(numbers, non_blocking=True)
            is_there = torch.cuda.current_stream(numbers.device).record_event()

        def read() -> Numbers:
            is_there.synchronize()
            here = there.numpy().copy()
            self._pinned.append(there)
            return _of_one_padding(here)

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
            if ticket.hold is not None and ticket.travel.room is None:
                # Whoever gets this memory next finds no tokens in it, and the host gains time where the device would
                # wait for it.
                ticket.hold.landing.pad_from(0, self._wire, received.tokens)
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

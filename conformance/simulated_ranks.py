"""Ranks without processes: each is a thread, one runs at a time, and collectives are lists that all have filled.

A rank runs until it calls a collective, and the next one goes on. When nobody can go on there is a deadlock, and it is
known at once who waits where; when all have called, what they called is compared. So thousands of cases take seconds,
and the same case always runs in the same order.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class DeadlockError(RuntimeError):
    """Nobody can go on."""


class MismatchError(RuntimeError):
    """Ranks of one group called different collectives, or sizes that do not agree."""


@dataclass(frozen=True)
class Call:
    """One collective as one rank called it.

    Attributes:
        name: `all_gather`, `reduce_scatter`, `all_reduce` or `all_to_all`.
        ranks: of the group, by their numbers in the world.
        shape, dtype: of what this rank gave; rows of an all-to-all are said by its splits.
        sent, received: rows to and from each rank of the group, of an all-to-all.
    """

    name: str
    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()

    def __str__(self) -> str:
        splits = f", sent {list(self.sent)}, received {list(self.received)}" if self.sent else ""
        return f"{self.name} of ranks {list(self.ranks)} with {list(self.shape)} {self.dtype}{splits}"


def disagreement(calls: Sequence[Call]) -> str | None:
    """Why the calls of a group's ranks, in their order, are not one collective; None where they are."""
    first = calls[0]
    for call in calls[1:]:
        if (call.name, call.ranks, call.shape, call.dtype) != (first.name, first.ranks, first.shape, first.dtype):
            return f"rank {first.ranks[0]} calls {first}, another {call}"
    for i, sender in enumerate(calls):
        for j, receiver in enumerate(calls):
            if sender.sent and sender.sent[j] != receiver.received[i]:
                ranks = first.ranks
                return (
                    f"rank {ranks[i]} sends {sender.sent[j]} rows to rank {ranks[j]}, "
                    f"which expects {receiver.received[i]}"
                )
    return None


@dataclass
class RankOutcome:
    """How a rank ended.

    Attributes:
        result: what its body returned.
        error: what it raised.
        calls: its collectives, in order.
    """

    result: Any = None
    error: BaseException | None = None
    calls: list[Call] = field(default_factory=list)


@dataclass
class _Waiting:
    call: Call
    operands: tuple[Tensor, Tensor]


class Hub:
    """Where the ranks of one run meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.outcomes = [RankOutcome() for _ in range(size)]
        self._waiting: dict[int, _Waiting] = {}
        self._raises: dict[int, Exception] = {}
        self._finished: set[int] = set()
        self._turn = 0
        self._condition = threading.Condition()

    def meet(self, rank: int, call: Call, out: Tensor, x: Tensor) -> None:
        """Call a collective as `rank`, and go on when it is done."""
        self.outcomes[rank].calls.append(call)
        with self._condition:
            self._waiting[rank] = _Waiting(call, (out, x))
            # Only ranks of one group that wait for the same ranks are in one collective.
            if all(r in self._waiting and self._waiting[r].call.ranks == call.ranks for r in call.ranks):
                self._complete(call.ranks)
            self._pass_on()
            self._condition.wait_for(lambda: self._turn == rank and rank not in self._waiting)
        if rank in self._raises:
            raise self._raises.pop(rank)

    def _complete(self, ranks: tuple[int, ...]) -> None:
        waiting = [self._waiting.pop(rank) for rank in ranks]
        why = disagreement([one.call for one in waiting])
        if why is not None:
            self._raises.update({rank: MismatchError(why) for rank in ranks})
            return
        _move(waiting[0].call.name, waiting)

    def _pass_on(self) -> None:
        """Give the turn to the next rank that can go on; where there is none, end everybody's wait."""
        running = [rank for rank in range(self.size) if rank not in self._waiting and rank not in self._finished]
        if not running and self._waiting:
            report = self.report()
            self._raises.update({rank: DeadlockError(report) for rank in self._waiting})
            running = sorted(self._waiting)
            self._waiting.clear()
        if running:
            later = [rank for rank in running if rank > self._turn]
            self._turn = min(later or running)
        self._condition.notify_all()

    def report(self) -> str:
        """Who waits where."""
        lines = []
        for rank, outcome in enumerate(self.outcomes):
            if rank in self._waiting:
                lines.append(f"rank {rank} waits in its collective {len(outcome.calls)}: {self._waiting[rank].call}")
            else:
                how = "returned" if outcome.error is None else f"raised {outcome.error!r}"
                lines.append(f"rank {rank} {how} after {len(outcome.calls)} collectives")
        return "; ".join(lines)

    def run(self, rank: int, body: Callable[[int], Any]) -> None:
        """One rank from its first turn to its end."""
        with self._condition:
            self._condition.wait_for(lambda: self._turn == rank)
        outcome = self.outcomes[rank]
        try:
            outcome.result = body(rank)
        except BaseException as error:
            outcome.error = error
        with self._condition:
            self._finished.add(rank)
            self._pass_on()


def _move(name: str, waiting: Sequence[_Waiting]) -> None:
    """Do a collective on what all ranks gave."""
    gave = [one.operands[1].clone() for one in waiting]
    outs = [one.operands[0] for one in waiting]
    if name == "all_gather":
        for out in outs:
            out.copy_(torch.cat(gave))
    elif name == "all_to_all":
        parts = [x.split(list(one.call.sent)) for x, one in zip(gave, waiting, strict=True)]
        for rank, out in enumerate(outs):
            out.copy_(torch.cat([of_rank[rank] for of_rank in parts]))
    else:
        # Rounded to the dtype at each step, as collectives on the way from rank to rank are.
        total = gave[0]
        for x in gave[1:]:
            total = total + x
        shares = total.chunk(len(outs)) if name == "reduce_scatter" and len(total) else [total] * len(outs)
        for out, share in zip(outs, shares, strict=True):
            out.copy_(share)


class Channel:
    """A group of simulated ranks as one of them sees it; every call is done when it returns."""

    def __init__(self, hub: Hub, world_rank: int, ranks: tuple[int, ...]) -> None:
        self._hub, self._world_rank, self.ranks = hub, world_rank, ranks
        self.rank, self.size = ranks.index(world_rank), len(ranks)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Every rank's `x`, one after the other, into `out`."""
        self._meet("all_gather", out, x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """The sum of every rank's r-th part of `x` into `out` of rank r."""
        self._meet("reduce_scatter", out, x)

    def all_reduce(self, x: Tensor) -> None:
        """The sum of every rank's `x`, in place."""
        self._meet("all_reduce", x, x)

    def all_to_all(self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """The r-th part of `x` to rank r, theirs into `out`."""
        call = Call(
            "all_to_all", self.ranks, (0, *x.shape[1:]), str(x.dtype), tuple(map(int, sent)), tuple(map(int, received))
        )
        self._hub.meet(self._world_rank, call, out, x)

    def _meet(self, name: str, out: Tensor, x: Tensor) -> None:
        self._hub.meet(self._world_rank, Call(name, self.ranks, tuple(x.shape), str(x.dtype)), out, x)


class SimulatedLinks:
    """What one simulated rank knows of the others."""

    process_group = None

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub, self.rank, self.size = hub, rank, hub.size

    def channel(self, ranks: tuple[int, ...]) -> Channel:
        """The group of these ranks, this one among them."""
        return Channel(self._hub, self.rank, ranks)


def run_simulated(size: int, body: Callable[[int, SimulatedLinks], Any]) -> list[RankOutcome]:
    """Run `body(rank, links)` as `size` ranks, one at a time, in an order that never changes."""
    hub = Hub(size)
    threads = []
    for rank in range(size):
        context = contextvars.copy_context()
        links = SimulatedLinks(hub, rank)
        run = lambda rank=rank, links=links: hub.run(rank, lambda number: body(number, links))  # noqa: E731
        threads.append(threading.Thread(target=context.run, args=(run,), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return hub.outcomes

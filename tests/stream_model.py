"""Streams, events and the caching allocator as a model of what happens before what, without a GPU.

Every access to a block of memory is stamped with a vector clock: one count for each stream. Two accesses of which one
writes must be ordered by the streams' own order and by events, or they race, on whatever schedule. So one run of the
model stands for all delays that a device could show.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace


class RaceError(AssertionError):
    """Two accesses that nothing orders."""


@dataclass(eq=False)
class Stream:
    name: str
    clock: dict[str, int] = field(default_factory=dict)
    free: list[Block] = field(default_factory=list)

    def wait_event(self, event):
        for name, count in event.clock.items():
            self.clock[name] = max(self.clock.get(name, 0), count)

    def tick(self):
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.name, self.clock[self.name]

    def has_seen(self, stamp):
        name, count = stamp
        return self.clock.get(name, 0) >= count


@dataclass(eq=False)
class Event:
    """Waiting for one that was never recorded waits for nothing, as CUDA has it."""

    clock: dict[str, int] = field(default_factory=dict)

    def record(self, stream):
        self.clock = dict(stream.clock)


@dataclass(eq=False)
class Block:
    """Memory of one stream's pool; the accesses outlive whoever held it."""

    accesses: list[tuple[tuple[str, int], bool, str]] = field(default_factory=list)


class Tensor:
    """A view of a block; freed by hand."""

    device = "cuda:0"

    def __init__(self, world, block, pool):
        self.world, self.block, self.pool, self.users = world, block, pool, set()

    def record_stream(self, stream):
        self.users.add(stream)

    def write(self, what):
        self.world.access(self.block, writes=True, what=what)

    def read(self, what):
        self.world.access(self.block, writes=False, what=what)

    def free(self):
        """Back to the pool at once, unless another stream uses it: then only when that one is done, which is later."""
        if not self.users - {self.pool}:
            self.pool.free.append(self.block)


class World:
    """One device: what stands for `torch.cuda` while `beside` runs."""

    def __init__(self):
        self.current = Stream("caller")
        self.torch = SimpleNamespace(
            cuda=SimpleNamespace(current_stream=lambda device: self.current, Event=Event, stream=self.on)
        )

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def allocate(self):
        pool = self.current
        return Tensor(self, pool.free.pop() if pool.free else Block(), pool)

    def access(self, block, *, writes, what):
        stream = self.current
        for stamp, wrote, other in block.accesses:
            if (writes or wrote) and not stream.has_seen(stamp):
                raise RaceError(f"{what} on {stream.name} is not ordered after {other} on {stamp[0]}")
        block.accesses.append((stream.tick(), writes, what))

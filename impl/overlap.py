"""Two pieces of work side by side: one on the caller's stream, the other on the device's auxiliary stream.

Streams meet by events alone; the host never waits. Four hand-overs make it right, and each is there for a reason:

    fork    an event on the caller's stream, for which the auxiliary one waits: what it reads must have been written
    join    an event on the auxiliary stream, for which the caller's waits: what the caller reads must have been written
    keep    the result lies in memory of the auxiliary stream's pool; the allocator is told that the caller's stream
            reads it, or another caller's work would be given it while it is still being read
    always  the join is made after an error too: what the auxiliary stream still reads could otherwise be freed

The inputs need no such mark: the caller's stream waits for the join before anything that it does after the call, and
with it whoever is given their memory next. Inside the capture of a CUDA graph, fork and join are what takes the
auxiliary stream into the graph and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .checks import expect_instance


@cache
def _stream_of(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(torch.device("cuda", index))


def auxiliary_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The auxiliary stream of a device, one for all layers of this process; None where there is none.

    One is enough: what several layers or callers give it runs one after the other, and a second one would let their
    shared experts compete.

    Raises:
        TypeError: no device.
    """
    expect_instance("device", device, torch.device)
    if device.type != "cuda":
        return None
    return _stream_of(torch.cuda.current_device() if device.index is None else device.index)


def expect_stream(name: str, stream: Any, device: torch.device) -> torch.cuda.Stream:
    """Check a stream of the caller's.

    Raises:
        TypeError: no stream.
        ValueError: one of another device.
    """
    if not isinstance(stream, torch.cuda.Stream):
        raise TypeError(f"{name}: expected a torch.cuda.Stream, got {type(stream).__name__}")
    if stream.device != device:
        raise ValueError(f"{name}: expected a stream of {device}, got one of {stream.device}")
    return stream


@dataclass
class Side:
    """The work on the auxiliary stream; it has a result once it is joined."""

    _result: torch.Tensor | None = None

    def joined(self) -> torch.Tensor:
        """The result, which the caller's stream may read now.

        Raises:
            RuntimeError: the block has not ended.
        """
        if self._result is None:
            raise RuntimeError("result: expected the end of the block beside it, got a question inside it")
        return self._result


@contextmanager
def beside(work: Callable[[], torch.Tensor], stream: torch.cuda.Stream, like: torch.Tensor) -> Iterator[Side]:
    """Run `work` on `stream` beside the block, which stays on the caller's stream; joined where the block ends.

    Args:
        work: enqueues kernels, and returns a tensor of their making.
        stream: of the device of `like`.
        like: a tensor on the device.

    Yields:
        What has the result once the block has ended.
    """
    caller = torch.cuda.current_stream(like.device)
    side = Side()
    forked = torch.cuda.Event()
    forked.record(caller)
    stream.wait_event(forked)
    joined = torch.cuda.Event()
    try:
        try:
            with torch.cuda.stream(stream):
                result = work()
        finally:
            joined.record(stream)
        yield side
    finally:
        caller.wait_event(joined)
    result.record_stream(caller)
    side._result = result

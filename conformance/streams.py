"""Calls on a GPU's streams under conditions in which a wait that is missing shows, or one that nobody asked for.

Work is held up by a sleep on one stream at one hand-over. The input is written at the last moment and gone right after
the call, and what is freed is given to others at once, who write NaN over it.

For a wait too many, the default stream is held until the call has ended: no clock decides what is said of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# About 2 ms at 2 GHz: several times what the host takes to enqueue a small layer. A shorter sleep is over before the
# work that should have waited for it is there.
DELAY_CYCLES = 4_000_000
# How long a call may take that waits for nobody, and how often the held stream looks whether it is let go: some seconds
# longer, and then it goes on by itself, so that a host which waits for it is not caught.
_HELD_SECONDS, _HELD_LOOKS = 1.0, 1 << 23


class Delays:
    """Sleeps where a layer's hand-overs are said to be: called with a place, on the stream that is held up there.

    Attributes:
        places: those that sleep now.
        side: the stream of the shared experts, once it was seen.
    """

    def __init__(self, places: Sequence[str] = ()) -> None:
        self.places = tuple(places)
        self.side: torch.cuda.Stream | None = None

    def __call__(self, place: str) -> None:
        """Sleep, if this is one of the places."""
        if place == "before_shared":
            self.side = torch.cuda.current_stream()
        if place in self.places:
            torch.cuda._sleep(DELAY_CYCLES)


def take_freed(stream: torch.cuda.Stream, like: Tensor) -> None:
    """Give the memory that was freed on a stream to others, who write NaN over it at once.

    Sizes are the tensor's own and those around it, many at a time, so that hardly a freed block is left over.
    """
    with torch.cuda.stream(stream):
        sizes = [*[like.numel()] * 16, *[1 << 10] * 4, *[1 << 14] * 4, 1 << 18, 1 << 20]
        taken = [torch.empty(size, dtype=like.dtype, device=like.device).fill_(torch.nan) for size in sizes if size]
        del taken


def late_and_gone(run: Callable[[], Tensor], x: Tensor, held: Tensor, delays: Delays) -> Tensor:
    """A copy of one call's output, on the current stream.

    Args:
        run: the call, which reads `x`.
        x: its input, which holds NaN before and after.
        held: what is written there just before the call.
        delays: also of "before_fork", the input itself.
    """
    caller = torch.cuda.current_stream()
    x.fill_(torch.nan)
    torch.cuda._sleep(DELAY_CYCLES // 4)
    delays("before_fork")
    x.copy_(held)
    output = run()
    x.fill_(torch.nan)
    kept = output.clone()
    del output
    for stream in {caller, delays.side or caller}:
        take_freed(stream, kept)
    return kept


@triton.jit
def _wait_kernel(released_ptr, most):
    looks = 0
    while (looks < most) & (tl.load(released_ptr, volatile=True) == 0):
        looks += 1


def while_default_stream_is_held(run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """A copy of the output of a call on a stream of the caller's, and whether it ends while the default stream waits.

    A call that gives the default stream some of its work either waits for it, or has an output without it; one that
    waits for the whole device does not end.

    Args:
        run: the call. It is made twice: what is loaded and allocated at first may wait for the device.
    """
    caller, other, default = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()
    released = torch.ones(1, dtype=torch.int32, device=caller.device)
    done, held = torch.cuda.Event(), torch.cuda.Event()
    _wait_kernel[(1,)](released, _HELD_LOOKS)
    torch.cuda.synchronize()
    with torch.cuda.stream(caller):
        kept = run().clone()
    # What the first call left behind is right, and would be taken for the second one's.
    for stream in (caller, default):
        take_freed(stream, kept)
    released.fill_(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(default):
        _wait_kernel[(1,)](released, _HELD_LOOKS)
        held.record()
    try:
        with torch.cuda.stream(caller):
            kept = run().clone()
            done.record()
        until = time.monotonic() + _HELD_SECONDS
        while not done.query() and time.monotonic() < until:
            time.sleep(1e-4)
        return kept, done.query() and not held.query()
    finally:
        with torch.cuda.stream(other):
            released.fill_(1)
        torch.cuda.synchronize()

"""Calls on a GPU's streams under conditions in which a wait that is missing shows: delays, and a starved allocator.

Work is held up by a sleep on one stream at one hand-over. The input is written at the last moment and gone right after
the call, and what is freed is given to others at once, who write NaN over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# About 2 ms at 2 GHz: several times what the host takes to enqueue a small layer. A shorter sleep is over before the
# work that should have waited for it is there.
DELAY_CYCLES = 4_000_000


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

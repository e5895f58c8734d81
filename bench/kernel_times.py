"""How long the kernels of a graph take by themselves: what a replay costs beyond that is its boundaries."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .timer import CudaClock, Pass

_PASSES = 3
# So long a device is kept busy before the pass that counts: one that comes out of idleness, or from other work at its
# power limit, has other clocks, by several per cent either way. So the replays that kernels are compared with are
# timed here too, after as much of the same. Beyond so many kernels records take seconds to read.
_BUSY_SECONDS, _MOST_KERNELS = 0.2, 20_000


@dataclass(frozen=True)
class KernelTimes:
    """Kernels of one call.

    Attributes:
        count: how many.
        seconds: of all of them, one after the other.
        replay: seconds of the call that they are of, with what lies between them, at the same clocks.
    """

    count: float
    seconds: float
    replay: float


def kernel_times(run: Pass, calls: int, device: torch.device) -> KernelTimes | None:
    """The kernels of one call, as the profiler's records of the device (CUPTI) have them; the median of some passes.

    Args:
        run: a pass of `calls` calls, which launches at least one kernel.
        calls: how many.
        device: a GPU.

    Returns:
        None where the profiler records no kernel.
    """
    kernels = len(_durations(run, 1, device))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    most = min(_BUSY_SECONDS / (time.perf_counter() - start), _MOST_KERNELS / max(1, kernels))
    repeats = max(1, round(most))
    passes, replays = [], []
    for _ in range(_PASSES):
        passes.append(_durations(run, repeats, device))
        replays.append(_replay(run, repeats, device))
    return summarise(passes, replays, calls)


def summarise(passes: Sequence[Sequence[float]], replays: Sequence[float], calls: int) -> KernelTimes | None:
    """The kernels of one call, from the seconds of every kernel of each pass, and of passes without records.

    None where a pass has none, or another number than the next: then records were lost, and a sum would be too small.
    """
    counts = {len(durations) for durations in passes}
    if len(counts) != 1 or 0 in counts:
        return None
    seconds = statistics.median(sum(durations) for durations in passes)
    return KernelTimes(counts.pop() / calls, seconds / calls, statistics.median(replays) / calls)


def last_pass(events: Sequence[tuple[float, float]], repeats: int) -> list[float]:
    """The durations of the last of `repeats` equal passes, from the start and duration of every kernel, in any order.

    Empty where the number of kernels is none that so many equal passes have.
    """
    count, rest = divmod(len(events), repeats)
    return [] if rest else [duration for _, duration in sorted(events)[len(events) - count :]]


def _replay(run: Pass, repeats: int, device: torch.device) -> float:
    """Seconds of the last of `repeats` equal passes."""
    for _ in range(repeats - 1):
        run()
    clock = CudaClock(device)
    read = clock.time(run)
    clock.finish()
    return read()


def _durations(run: Pass, repeats: int, device: torch.device) -> list[float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize(device)
    on_device = [event.time_range for event in profile.events() or () if event.device_type.name == "CUDA"]
    # Copies and fills are nodes of the graph as kernels are; what the profiler itself adds has no duration.
    events = [(span.start / 1e6, took) for span in on_device if (took := span.elapsed_us() / 1e6) > 0]
    return last_pass(events, repeats)

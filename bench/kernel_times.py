"""How long the kernels of a graph take by themselves: what a replay costs beyond that is its boundaries."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .timer import Pass

_PASSES = 3


@dataclass(frozen=True)
class KernelTimes:
    """Kernels of one call.

    Attributes:
        count: how many.
        seconds: of all of them, one after the other.
    """

    count: float
    seconds: float


def kernel_times(run: Pass, calls: int, device: torch.device) -> KernelTimes | None:
    """The kernels of one call, as the profiler's records of the device (CUPTI) have them; the median of some passes.

    Args:
        run: a pass of `calls` calls, which launches at least one kernel.
        calls: how many.
        device: a GPU.

    Returns:
        None where the profiler records no kernel.
    """
    passes = [_durations(run, device) for _ in range(_PASSES)]
    return summarise(passes, calls)


def summarise(passes: Sequence[Sequence[float]], calls: int) -> KernelTimes | None:
    """The kernels of one call from the seconds of every kernel of each pass.

    None where a pass has none, or another number than the next: then records were lost, and a sum would be too small.
    """
    counts = {len(durations) for durations in passes}
    if len(counts) != 1 or 0 in counts:
        return None
    return KernelTimes(counts.pop() / calls, statistics.median(sum(durations) for durations in passes) / calls)


def _durations(run: Pass, device: torch.device) -> list[float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    on_device = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
    # Copies and fills are nodes of the graph as kernels are; what the profiler itself adds has no duration.
    return [time / 1e6 for event in on_device if (time := event.time_range.elapsed_us()) > 0]

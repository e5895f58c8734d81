"""What an overlap of shared and routed experts gains: the statistics of one cell, and of a run.

    hideable   = serial - max(routed alone, shared alone, bytes of both / bandwidth)
    efficiency = (serial - overlapped) / hideable

Nothing can hide more than `hideable`: the longer part stays, and so does the traffic of both.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .kernel_times import KernelTimes
from .machine import Machine
from .timer import PairedRatio, Timing

SCHEMA = "moegate-overlap/1"
# A pure read of an H200's memory.
READ_BANDWIDTH = 4.49e12
# Under this the clock decides more than the overlap: such cells are reported, not counted.
LEAST_HIDEABLE = 3e-6
# What an overlap may lose and still be taken.
LEAST_RATIO = 0.99
# M of which the mean efficiency is taken.
COUNTED_TOKENS = (1, 4, 16, 64, 128, 256)
COUNTED_LAYERS = ("deepseek-v3-tp8", "qwen3.5-35b-a3b")


@dataclass(frozen=True)
class OverlapCell:
    """One layer at one M, all of it timed in one interleaved run.

    Attributes:
        layer: its name.
        num_tokens: M.
        dtype: how experts are stored.
        serial: seconds of a call whose shared experts run after the routed ones (NO_OVERLAP).
        overlapped: on two streams (MULTI_STREAM_OVERLAPPED).
        routed: of the layer without shared experts, its router included.
        shared: of the shared experts alone.
        bytes: that a call must move, routed and shared.
        calls: timed in turn.
        is_cold: the weights of every call left the cache before they were read again.
        method: "cuda-graph", or how else it was timed.
        kernels: of the serial call, where they could be timed.
        machine: where.
    """

    layer: str
    num_tokens: int
    dtype: str
    serial: Timing
    overlapped: Timing
    routed: Timing
    shared: Timing
    bytes: float
    calls: int
    is_cold: bool
    method: str
    kernels: KernelTimes | None
    machine: Machine

    @property
    def ratio(self) -> PairedRatio:
        """Serial over overlapped, round by round: above 1 the overlap is faster."""
        return PairedRatio.of(self.serial, self.overlapped)

    @property
    def hideable(self) -> float:
        """Seconds that an overlap could hide at best; may be negative."""
        alone = max(self.routed.median, self.shared.median, self.bytes / READ_BANDWIDTH)
        return self.serial.median - alone

    @property
    def efficiency(self) -> float | None:
        """The part of it that is hidden; None where hardly anything could be."""
        if self.hideable < LEAST_HIDEABLE:
            return None
        return (self.serial.median - self.overlapped.median) / self.hideable

    @property
    def boundary(self) -> float | None:
        """Seconds that the serial graph takes beyond its kernels, for each of them; None where they were not timed."""
        if self.kernels is None:
            return None
        return (self.kernels.replay - self.kernels.seconds) / self.kernels.count

    @property
    def excess(self) -> float | None:
        """The same for all of them, over the kernels' times."""
        return None if self.kernels is None else self.kernels.replay / self.kernels.seconds - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the fields, and what follows from them."""
        return {
            **asdict(self),
            "ratio": asdict(self.ratio),
            "hideable": self.hideable,
            "efficiency": self.efficiency,
            "boundary": self.boundary,
            "excess": self.excess,
        }


def mean_efficiency(cells: Sequence[OverlapCell]) -> tuple[float, int] | None:
    """The arithmetic mean over the cells that count, and how many they are; None where there is none."""
    counted = [
        cell.efficiency
        for cell in cells
        if cell.layer in COUNTED_LAYERS and cell.num_tokens in COUNTED_TOKENS and cell.efficiency is not None
    ]
    return (statistics.fmean(counted), len(counted)) if counted else None


def largest_worthwhile(cells: Sequence[OverlapCell]) -> int:
    """The largest measured M up to which no cell loses: what a threshold may be. 0 where the smallest loses already."""
    worst: dict[int, float] = {}
    for cell in cells:
        worst[cell.num_tokens] = min(worst.get(cell.num_tokens, float("inf")), cell.ratio.median)
    threshold = 0
    for num_tokens in sorted(worst):
        if worst[num_tokens] < LEAST_RATIO:
            break
        threshold = num_tokens
    return threshold


def thresholds(cells: Sequence[OverlapCell]) -> Mapping[str, int]:
    """`largest_worthwhile` of each layer, and of all of them as "all"."""
    names = dict.fromkeys(cell.layer for cell in cells)
    each = {name: largest_worthwhile([cell for cell in cells if cell.layer == name]) for name in names}
    return {**each, "all": largest_worthwhile(cells)}

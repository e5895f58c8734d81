"""Clocks and how they are used: device events around graph replays, several contenders interleaved in one run.

The pieces: a `Clock` times one pass (a callable), `interleave` lets several passes take turns in random order, and
`capture_graph` turns a list of calls into one pass. A pass on a GPU is one CUDA graph that holds every call of a
rotation, so a call's share has no launch gaps but those inside a graph, as when a model is served. Whatever a call
does on other streams is joined before a graph ends, and so before the end event.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Pass = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """The samples of one contender, in seconds of one call, in the order taken; none is ever dropped."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("samples: expected at least one, got none")
        if any(not sample > 0 for sample in self.samples):
            raise ValueError(f"samples: expected times of more than 0 s, got {min(self.samples)}")

    @property
    def median(self) -> float:
        """The median in seconds."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile in seconds (linear interpolation); both the sample where there is one."""
        return quartiles(self.samples)

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        low, high = self.quartiles
        return (high - low) / self.median


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile by linear interpolation between order statistics."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True)
class PairedRatio:
    """How long one contender takes over another, from samples taken in the same rounds.

    Attributes:
        median: the median of the rounds' ratios; under 1 the first one is faster.
        low: their first quartile.
        high: their third quartile.
    """

    median: float
    low: float
    high: float

    @staticmethod
    def of(ours: Timing, theirs: Timing) -> PairedRatio:
        """Ours over theirs, round by round.

        Raises:
            ValueError: another number of samples, so that they cannot be paired.
        """
        if len(ours.samples) != len(theirs.samples):
            raise ValueError(f"samples: expected as many of both, got {len(ours.samples)} and {len(theirs.samples)}")
        ratios = [a / b for a, b in zip(ours.samples, theirs.samples, strict=True)]
        return PairedRatio(statistics.median(ratios), *quartiles(ratios))


def synchronise(device: torch.device) -> None:
    """Wait for a device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock(Protocol):
    """Times passes. A reading may be available only after `finish`."""

    method: str

    def time(self, run: Pass) -> Callable[[], float]:
        """Run `run` once; the callable returned gives its seconds, once `finish` was called."""
        ...

    def finish(self) -> None:
        """Wait for everything that was started."""
        ...


class HostClock:
    """`time.perf_counter` around work that is done when it returns: for CPUs."""

    method = "host"

    def time(self, run: Pass) -> Callable[[], float]:
        """Run `run` now."""
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return lambda: seconds

    def finish(self) -> None:
        """Nothing is left to wait for."""


class CudaClock:
    """CUDA events on the current stream; passes are enqueued without waiting for each other."""

    method = "cuda-events"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, run: Pass) -> Callable[[], float]:
        """Enqueue `run` between two events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def finish(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)


def interleave(
    passes: Mapping[str, Pass],
    clock: Clock,
    *,
    rounds: int,
    seed: int = 0,
    while_running: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Time every pass once a round, in an order drawn anew for each round.

    What drifts (clocks, temperature, other users of the machine) then meets all contenders alike.

    Args:
        passes: the contenders by name.
        clock: what times them.
        rounds: samples of each.
        seed: of the orders.
        while_running: called once when everything is enqueued and, on a GPU, mostly still running.

    Returns:
        Seconds of each pass by name, in the order of the rounds: sample i of every contender is from round i.

    Raises:
        ValueError: fewer than one round, or no contender.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if not passes:
        raise ValueError("passes: expected at least one, got none")
    order = random.Random(seed)
    names = list(passes)
    # The first pass after a pause would wait for its launch between its events, so one untimed pass goes first.
    passes[names[0]]()
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            readings[name].append(clock.time(passes[name]))
    if while_running is not None:
        while_running()
    clock.finish()
    return {name: [read() for read in readings[name]] for name in passes}


def choose_rounds(
    passes: Mapping[str, Pass], clock: Clock, *, budget: float, least: int = 10, most: int = 60, warm_up: float = 0.03
) -> int:
    """Warm up for about `warm_up` seconds of passes, and say how many rounds fit in `budget` seconds."""
    estimate = 0.0
    for run in passes.values():
        clock.time(run)
        clock.finish()
        reading = clock.time(run)
        clock.finish()
        estimate += max(reading(), 1e-7)
    for _ in range(min(200, int(warm_up / estimate))):
        for run in passes.values():
            run()
    clock.finish()
    return max(least, min(most, int(budget / estimate)))


@dataclass(frozen=True)
class Captured:
    """A list of calls as one pass.

    Attributes:
        run: runs all of them, writing into `outputs`.
        outputs: what each call returned; each run writes them anew where `method` is "cuda-graph".
        method: "cuda-graph", or "cuda-eager" where capturing failed.
        note: why it is not a graph, else empty.
    """

    run: Pass
    outputs: Sequence[torch.Tensor]
    method: str
    note: str = ""


Capture = Callable[[Sequence[Callable[[], torch.Tensor]], torch.device], Captured]


def one_after_another(calls: Sequence[Callable[[], torch.Tensor]], device: torch.device) -> Captured:
    """All calls in one pass of the host: nothing to capture on a CPU."""
    del device
    return Captured(lambda: [call() for call in calls], [], "host")


def capture_graph(calls: Sequence[Callable[[], torch.Tensor]], device: torch.device) -> Captured:
    """All calls in one CUDA graph, or in one eager pass where they cannot be captured, with the reason.

    Each call runs once before, on a stream of its own: compilation and lazily created handles stay out of the graph.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
    except Exception as error:  # whatever a kernel's launcher does that a capture forbids
        torch.cuda.synchronize(device)
        return Captured(lambda: [call() for call in calls], [], "cuda-eager", f"{type(error).__name__}: {error}"[:300])
    return Captured(graph.replay, outputs, "cuda-graph")


class SampleClock:
    """A timer for pytest-benchmark that plays back device times which were measured beforehand.

    pytest-benchmark subtracts two readings of its timer; between them `advance` moves this one by exactly one sample,
    so what it stores, prints and compares is device time:

        CLOCK = SampleClock()

        @pytest.mark.benchmark(timer=CLOCK)
        def test_layer(benchmark):
            play = CLOCK.play(samples)
            benchmark.pedantic(play.advance, setup=play.next, rounds=len(samples))
    """

    __name__ = "device-time"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """The reading."""
        return self._now

    def play(self, samples: Sequence[float]) -> _Playback:
        """Readings for one benchmark."""
        return _Playback(self, samples)


class _Playback:
    def __init__(self, clock: SampleClock, samples: Sequence[float]) -> None:
        self._clock, self._samples, self._index = clock, samples, -1

    def next(self) -> None:
        # From zero each time: a running sum would lose the samples' last bits.
        self._clock._now = 0.0
        self._index += 1

    def advance(self) -> None:
        self._clock._now = self._samples[self._index]

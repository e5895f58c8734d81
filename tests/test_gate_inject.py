"""Injected slow-downs are as large as they claim, and rows of a gate's table say what became of a workload."""

import math
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moegate.bench.gate import inject, worker
from moegate.bench.gate.inject import Injection, tolerance
from moegate.bench.gate.record import State
from moegate.bench.gate.table import renamed
from moegate.bench.timer import Captured, one_after_another
from moegate.bench.workloads import SMALL_MODELS, Workload
from moegate.impl import path
from moegate.impl.kernels import combine

CALL_SECONDS, HZ, CALLS = 30e-6, 1.7e9, 4
LEVELS = (0.01, 0.02, 0.03, 0.05)


class Gpu:
    """A device on which a pass takes its calls' time, and what their last kernels spin.

    Attributes:
        dead: cycles of a spin that nothing waits for.
        extra: cycles that the kernel with a spin takes more, whatever it spins.
        speed: of the SM clock at a time, over the usual one; a spin of some cycles and the calls both follow it.
        stalls: the share of passes that the host comes late for, which then take three times as long.
        noise: of each pass, relative.
    """

    method = "fake"

    def __init__(self, monkeypatch, *, dead=0, extra=0, speed=lambda now: 1.0, stalls=0.0, noise=0.003):
        self.dead, self.extra, self.speed, self.stalls, self.noise = dead, extra, speed, stalls, noise
        self.now, self.draw, self.captures = 0.0, random.Random(0), 0
        monkeypatch.setattr(inject, "spinning_combine", lambda: SimpleNamespace(__name__="spinning"))
        monkeypatch.setattr(
            path, "launch", lambda kernel, grid, *args, spin_cycles=None, **meta: self.cycles(spin_cycles)
        )

    def cycles(self, spin):
        return 0 if spin is None else self.extra + max(0, spin - self.dead)

    def capture(self):
        self.captures += 1
        cycles = [path.launch(combine.combine_kernel, (1,)) for _ in range(CALLS)]
        return Captured(lambda: sum(cycles), cycles, "cuda-graph")

    def slower(self, captured):
        """What is really there."""
        return captured.run() / HZ / (CALLS * CALL_SECONDS)

    def time(self, run):
        seconds = (CALLS * CALL_SECONDS + run() / HZ) / self.speed(self.now) * math.exp(self.draw.gauss(0, self.noise))
        seconds *= 3 if self.draw.random() < self.stalls else 1
        self.now += seconds
        return lambda: seconds

    def finish(self):
        pass


def injected(gpu, levels=LEVELS, asked=None):
    return Injection(gpu.capture, gpu, torch.device("cuda")).at(levels, gpu.capture(), asked)


@pytest.mark.parametrize(
    "device",
    [
        {},
        {"extra": 150},
        {"dead": 600},
        {"dead": 300, "extra": 100, "stalls": 0.1},
        # At the power limit: the clock falls by a quarter while passes are timed, and steps up and down.
        {"speed": lambda now: 0.75 + 0.25 * math.exp(-now / 0.003) + (0.02 if math.sin(now / 0.002) > 0 else 0.0)},
    ],
    ids=["plain", "slow kernel", "short spins hide", "host comes late", "power limit"],
)
def test_a_slow_down_is_corrected_until_it_is_the_one_that_is_wanted(monkeypatch, device):
    gpu = Gpu(monkeypatch, **device)
    made = injected(gpu)
    assert path.launch(combine.combine_kernel, (1,)) == 0  # nothing is left behind
    for level in LEVELS:
        assert made[level].captured is not None
        assert made[level].reached == pytest.approx(level, abs=tolerance(level))
        # The passes that decided were themselves timed with noise.
        assert gpu.slower(made[level].captured) == pytest.approx(level, abs=1.5 * tolerance(level))


def test_a_process_begins_with_what_another_one_found(monkeypatch):
    gpu = Gpu(monkeypatch, dead=600)
    made = injected(gpu)
    assert gpu.captures > 1 + len(LEVELS)
    gpu.captures = 0
    injected(gpu, asked={level: each.asked for level, each in made.items()})
    assert gpu.captures == 1 + len(LEVELS)  # at once right


def test_a_device_that_repeats_badly_is_measured_longer_and_not_corrected_at_random(monkeypatch):
    gpu = Gpu(monkeypatch, noise=0.015)
    monkeypatch.setattr(inject, "_GUESSED_HZ", HZ)
    made = injected(gpu, (0.03,))
    assert gpu.captures <= 1 + 2
    assert gpu.slower(made[0.03].captured) == pytest.approx(0.03, abs=1.5 * tolerance(0.03))


def test_a_spin_that_slows_nothing_is_no_slow_down(monkeypatch):
    made = injected(Gpu(monkeypatch, dead=10**9), (0.03,))
    assert made[0.03].captured is None
    assert made[0.03].reached == pytest.approx(0, abs=0.005)


def test_a_kernel_that_is_too_slow_without_any_spin_gives_no_small_slow_down(monkeypatch):
    gpu = Gpu(monkeypatch, extra=round(0.018 * CALL_SECONDS * HZ))
    made = injected(gpu)
    assert made[0.01].captured is None
    assert made[0.01].reached == pytest.approx(0.018, abs=0.002)
    assert all(made[level].captured is not None for level in LEVELS[1:])


def test_a_workload_of_the_base_is_gone_or_has_another_name():
    models = list(SMALL_MODELS.values())
    base = [Workload(model, 1, dtype="fp32", cache_state="warm") for model in models[:3]]
    head = [replace(base[0], model=replace(models[0], name="another-name")), base[1]]
    rows = renamed({workload.id for workload in base}, head, ())
    assert set(rows) == {base[0].id, base[2].id}
    assert (rows[base[0].id].state, rows[base[0].id].renamed_to) == (State.RENAMED, head[0].id)
    assert rows[base[2].id].state is State.MISSING
    assert renamed({base[1].id}, base, ()) == {}


def test_a_side_is_warm_once_it_is_prepared(monkeypatch):
    """Sides that had not run since they were captured took twice as long in their first turns on a CPU."""
    runs = []

    def capture(calls, device):
        captured = one_after_another(calls, device)
        return replace(captured, run=lambda: runs.append(time.perf_counter()) or captured.run())

    monkeypatch.setattr(worker, "one_after_another", capture)
    workload = Workload(next(iter(SMALL_MODELS.values())), 1, dtype="fp32", cache_state="warm")
    side = worker.Worker("moegate", "cpu")
    side.prepare(worker.workload_as_data(workload), calls=1, copies=1)
    assert runs[-1] - runs[0] >= 0.01
    before = len(runs)
    assert side.pace()["seconds"] > 0
    assert len(runs) > before
    injected = side.inject([0.5], {})
    assert injected["reached"].keys() == {"0.5"}
    if injected["injected"]:
        assert side.block(passes=2, level="0.5")["seconds"] > 0

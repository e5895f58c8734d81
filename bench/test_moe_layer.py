"""The routed experts of real models' layers: device time, floor and verdict as pytest-benchmark stores them."""

from __future__ import annotations

import warnings

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from moegate.bench.plugin import DONE, layer_bench_of, selected_workloads
from moegate.bench.timer import SampleClock
from moegate.bench.workloads import Workload

CLOCK = SampleClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each workload that the options select."""
    workloads = selected_workloads(metafunc.config)
    metafunc.parametrize("workload", workloads, ids=[workload.id for workload in workloads])


@pytest.mark.benchmark(timer=CLOCK)
def test_moe_layer(workload: Workload, benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    layer_bench = layer_bench_of(pytestconfig)
    if workload.unsupported:
        pytest.skip(workload.unsupported)
    if benchmark.enabled:
        measured = layer_bench.measure(workload)
        record = measured.records[0]
        benchmark.group = f"{workload.model.name} {workload.stored} {workload.routing} {record.cache_state}"
        benchmark.extra_info.update(record.as_dict())
        benchmark.extra_info["peers"] = [peer.as_dict() for peer in measured.records[1:]]
        benchmark.extra_info["peer_failures"] = dict(measured.failures)
        for name, reason in measured.failures.items():
            warnings.warn(f"peer {name} was not timed: {reason}", stacklevel=1)
        play = CLOCK.play(record.timing.samples)
        benchmark.pedantic(play.advance, setup=play.next, rounds=len(record.timing.samples))
    else:
        benchmark.pedantic(layer_bench.check, args=(workload,))
    pytestconfig.stash[DONE] = pytestconfig.stash.get(DONE, 0) + 1

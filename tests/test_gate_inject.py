"""Injected slow-downs are as large as they claim, and rows of a gate's table say what became of a workload."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moegate.bench.gate import inject
from moegate.bench.gate.inject import Injection
from moegate.bench.gate.record import State
from moegate.bench.gate.table import renamed
from moegate.bench.timer import Captured
from moegate.bench.workloads import SMALL_MODELS, Workload
from moegate.impl import path
from moegate.impl.kernels import combine

CALL_SECONDS, HZ = 30e-6, 1.7e9


@pytest.fixture
def gpu(monkeypatch):
    """A device on which a pass of four calls takes what its last kernels spin, and some cycles more to begin with."""
    monkeypatch.setattr(inject, "spinning_combine", lambda: SimpleNamespace(__name__="spinning"))

    def launch(kernel, grid, *args, spin_cycles=None, **meta):
        return 0 if spin_cycles is None else 200 + spin_cycles

    monkeypatch.setattr(path, "launch", launch)

    def capture():
        cycles = [path.launch(combine.combine_kernel, (1,)) for _ in range(4)]
        return Captured(lambda: cycles, cycles, "cuda-graph")

    def seconds(captured, passes):
        return [4 * CALL_SECONDS + sum(captured.run()) / HZ] * passes

    return capture, seconds


def test_a_spin_is_calibrated_to_the_slow_down_that_is_wanted(gpu):
    capture, seconds = gpu
    levels = (0.01, 0.02, 0.03, 0.05)
    made = Injection(capture, seconds, torch.device("cuda")).at(levels, capture())
    assert path.launch(combine.combine_kernel, (1,)) == 0  # nothing is left behind
    for level in levels:
        captured, reached = made[level]
        assert reached == pytest.approx(level, rel=0.01)
        assert seconds(captured, 1)[0] == pytest.approx(4 * CALL_SECONDS * (1 + level), rel=1e-4)


def test_a_spin_that_slows_nothing_is_an_error(gpu):
    capture, _ = gpu
    with pytest.raises(RuntimeError, match="cycles does not slow the layer down"):
        Injection(capture, lambda captured, passes: [1e-3] * passes, torch.device("cuda")).at((0.03,), capture())


def test_a_workload_of_the_base_is_gone_or_has_another_name():
    models = list(SMALL_MODELS.values())
    base = [Workload(model, 1, dtype="fp32", cache_state="warm") for model in models[:3]]
    head = [replace(base[0], model=replace(models[0], name="another-name")), base[1]]
    rows = renamed({workload.id for workload in base}, head, ())
    assert set(rows) == {base[0].id, base[2].id}
    assert (rows[base[0].id].state, rows[base[0].id].renamed_to) == (State.RENAMED, head[0].id)
    assert rows[base[2].id].state is State.MISSING
    assert renamed({base[1].id}, base, ()) == {}

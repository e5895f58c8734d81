"""The host's time of an eager layer: both ways are timed in turns, on bits that are the same."""

import pytest
import torch
from rich.console import Console

from moegate.bench import launch_overhead
from moegate.bench.launch_overhead import AS_IT_STANDS, REPLAYED, host_seconds, measure, show
from moegate.impl import replay

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _nothing_is_known():
    replay.forget()
    yield
    replay.forget()


def test_the_clock_runs_for_the_calls_alone(monkeypatch):
    told = iter([10.0, 14.0])
    monkeypatch.setattr(launch_overhead.time, "perf_counter", lambda: next(told))
    calls = []
    assert host_seconds(lambda: calls.append(1), DEVICE, calls=8) == 0.5
    assert len(calls) == 8


def test_both_ways_of_a_layer_are_measured_and_shown():
    rows = measure("qwen3-30b-a3b/16", 2, DEVICE, dtype="bf16", rounds=2)
    assert [row["way"] for row in rows] == [AS_IT_STANDS, REPLAYED]
    assert all(0 < row["least"] <= row["median"] for row in rows)
    console = Console(record=True, width=120)
    show(rows, console)
    text = console.export_text()
    assert AS_IT_STANDS in text
    assert REPLAYED in text


def test_a_replay_of_other_bits_is_not_timed_silently(monkeypatch):
    taken = []

    def changed(self, *arguments):
        taken.append(1)
        return torch.zeros_like(arguments[0]) if len(taken) > 2 else torch.ones_like(arguments[0])

    monkeypatch.setattr("moegate.impl.layer.MoELayer.forward", changed)
    with pytest.raises(AssertionError, match="a replay gives other bits"):
        measure("qwen3-30b-a3b/16", 2, DEVICE, rounds=1)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--models", "nosuch", "model"), ("--tokens", "1,two", "tokens: expected"), ("--dtype", "bf17", "dtype")],
)
def test_bad_arguments_are_refused_by_name(option, value, named, capsys):
    assert launch_overhead.main([option, value]) == 4
    assert named in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured_and_said_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch_overhead.main([]) == 3
    assert "torch sees no GPU here" in capsys.readouterr().err

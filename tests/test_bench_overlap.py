"""What an overlap gains: its statistics, and a dry run on the CPU, where something stands in for the second stream."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from moegate.bench import __main__ as command
from moegate.bench import overlap_runner
from moegate.bench.kernel_times import KernelTimes, last_pass, summarise
from moegate.bench.layers import LAYERS, LayerBank, LayerModel
from moegate.bench.machine import describe_machine
from moegate.bench.overlap import OverlapCell, largest_worthwhile, mean_efficiency, thresholds
from moegate.bench.overlap_report import as_json, overlap_table, summary
from moegate.bench.overlap_runner import measure_overlap, run_overlap
from moegate.bench.timer import HostClock, Timing, one_after_another
from moegate.bench.verification import WrongKernelError
from moegate.bench.workloads import Model
from moegate.impl import layer as layer_module
from moegate.impl.layer import RoutingMethod
from moegate.impl.shared_experts import SWITCH_VARIABLE, SharedExpertsOrder

CPU = torch.device("cpu")


def _timing(microseconds):
    return Timing((microseconds * 1e-6,) * 3)


def _cell(layer="deepseek-v3-tp8", num_tokens=1, **changes):
    times = {"serial": 30.0, "overlapped": 24.0, "routed": 20.0, "shared": 12.0} | changes
    return OverlapCell(
        layer,
        num_tokens,
        "bf16",
        **{name: _timing(time) for name, time in times.items()},
        bytes=44.9e6,  # 10 us
        calls=16,
        is_cold=True,
        method="cuda-graph",
        kernels=KernelTimes(12, 24e-6, 30e-6),
        machine=describe_machine(CPU),
    )


# --- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "bytes", "hideable"),
    [({}, 0, 10e-6), ({"shared": 25.0}, 0, 5e-6), ({}, 4.49e12 * 28e-6, 2e-6), ({"routed": 31.0}, 0, -1e-6)],
    ids=["routed", "shared", "traffic", "negative"],
)
def test_what_could_be_hidden_is_what_the_longest_of_the_parts_and_the_traffic_leaves(changes, bytes, hideable):
    assert replace(_cell(**changes), bytes=bytes).hideable == pytest.approx(hideable)


def test_efficiency_is_the_hidden_part_of_it():
    assert _cell().efficiency == pytest.approx(0.6)
    assert _cell(overlapped=31.0).efficiency == pytest.approx(-0.1)
    assert _cell(serial=22.9, overlapped=20.0).efficiency is None, "under 3 us nothing is counted"
    assert _cell().ratio.median == pytest.approx(1.25)


def test_a_boundary_is_what_the_graph_takes_beyond_its_kernels():
    assert _cell().boundary == pytest.approx(0.5e-6)
    assert _cell().excess == pytest.approx(0.25)
    without = replace(_cell(), kernels=None)
    assert (without.boundary, without.excess) == (None, None)


def test_the_mean_is_over_the_cells_that_count():
    cells = [
        _cell(),
        _cell("qwen3.5-35b-a3b", 256, overlapped=20.0),
        _cell("qwen2-57b-a14b-tp4", overlapped=29.0),
        _cell(num_tokens=512, overlapped=29.0),
        _cell(num_tokens=4, serial=21.0),
    ]
    assert mean_efficiency(cells) == (pytest.approx(0.8), 2)
    assert mean_efficiency(cells[2:]) is None


def test_a_threshold_is_the_last_m_before_the_first_loss():
    def cells(layer, ratios):
        return [_cell(layer, m, serial=30.0 * ratio, overlapped=30.0) for m, ratio in ratios.items()]

    one = cells("one", {1: 1.2, 64: 1.0, 256: 0.991, 512: 0.98, 1024: 1.05})
    other = cells("other", {64: 0.97, 1: 1.0})
    assert largest_worthwhile(one) == 256
    assert thresholds([*one, *other]) == {"one": 256, "other": 1, "all": 1}
    assert largest_worthwhile(cells("lost", {1: 0.98, 4: 1.5})) == 0


def test_kernels_are_summed_a_call_and_lost_records_give_no_sum():
    replays = [6.0, 5.0, 4.0]
    assert summarise([[1.0, 2.0], [1.0, 4.0], [1.0, 3.0]], replays, calls=2) == KernelTimes(1, 2.0, 2.5)
    assert summarise([[1.0, 2.0], [1.0], [1.0, 3.0]], replays, calls=2) is None
    assert summarise([[], [], []], replays, calls=2) is None


def test_of_passes_that_keep_a_device_busy_the_last_counts_and_uneven_ones_do_not():
    events = [(3.0, 0.3), (0.0, 9.0), (1.0, 9.0), (2.0, 0.2)]
    assert last_pass(events, repeats=2) == [0.2, 0.3]
    assert last_pass(events[:3], repeats=2) == []
    assert last_pass([], repeats=3) == []


def test_the_layers_are_those_of_their_sources():
    deepseek, qwen, large = (LAYERS[name] for name in LAYERS)
    sizes = [(each.routed.intermediate_size, each.shared_size, each.routed.hidden_size) for each in LAYERS.values()]
    assert sizes == [(256, 256, 7168), (512, 512, 2048), (640, 5120, 3584)]
    # w13 and w2 in one byte, a float32 scale for each block of 128 x 128.
    assert deepseek.shared_bytes == deepseek.expert_bytes == 3 * 256 * 7168 + 3 * 2 * 56 * 4
    assert qwen.shared_bytes == 3 * 512 * 2048 * 2 + 2048 * 2
    assert large.shared_bytes == 8 * large.expert_bytes + 3584 * 2
    assert deepseek.router_bytes == 256 * 7168 * 4
    assert qwen.bytes_of_call(2, 15.5) == 15.5 * qwen.expert_bytes + qwen.router_bytes + qwen.shared_bytes + 24576


# --- a dry run ---------------------------------------------------------------------------------------------------

SMALL = LayerModel(Model("small", 8, 2, 64, 32, "none"), "bf16", RoutingMethod(2), shared_size=48, shared_is_gated=True)
BLOCKS = LayerModel(
    Model("blocks", 8, 2, 128, 128, "none"),
    "fp8-block",
    RoutingMethod(2, "sigmoid", num_expert_group=2, topk_group=1, routed_scaling_factor=2.5),
    shared_size=128,
    router_dtype=torch.float32,
    has_correction_bias=True,
)


@contextmanager
def _inline(work, stream, like):
    result = work()
    yield SimpleNamespace(joined=lambda: result)


@pytest.fixture
def second_stream(monkeypatch):
    """A layer takes what stands for a second stream here, unless the switch is on."""

    def order(*arguments):
        is_off = os.environ.get(SWITCH_VARIABLE) == "1"
        chosen = SharedExpertsOrder.NO_OVERLAP if is_off else SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
        return SimpleNamespace(order=chosen, reasons=())

    monkeypatch.setattr(layer_module, "auxiliary_stream", lambda device: object())
    monkeypatch.setattr(layer_module, "beside", _inline)
    monkeypatch.setattr(
        layer_module,
        "order_of_call",
        lambda setting, *rest: order() if setting.has_shared_experts else SimpleNamespace(order="none", reasons=()),
    )


def _measure(model, num_tokens=3, **options):
    options = {"clock": HostClock(), "capture": one_after_another, "budget": 0.0} | options
    return measure_overlap(model, num_tokens, LayerBank(model, CPU), **options)


@pytest.mark.parametrize("model", [SMALL, BLOCKS], ids=lambda model: model.name)
@pytest.mark.usefixtures("second_stream")
def test_a_layer_is_timed_in_both_orders_and_in_parts(model, monkeypatch):
    monkeypatch.setattr(overlap_runner, "calls_to_average", lambda num_tokens: 2)
    monkeypatch.setenv(SWITCH_VARIABLE, "0")
    cell = _measure(model)
    assert (cell.layer, cell.num_tokens, cell.calls, cell.method) == (model.name, 3, 2, "host")
    assert len(cell.serial.samples) == len(cell.overlapped.samples) == len(cell.shared.samples) >= 10
    assert not cell.is_cold
    assert cell.kernels is None
    assert os.environ[SWITCH_VARIABLE] == "0", "the environment is as it was"


def test_a_layer_that_does_not_overlap_is_an_error_and_is_reported(monkeypatch):
    monkeypatch.setattr(overlap_runner, "calls_to_average", lambda num_tokens: 1)
    with pytest.raises(RuntimeError, match="order: expected multi_stream_overlapped, got no_overlap"):
        _measure(SMALL)
    monkeypatch.setattr(overlap_runner, "measure_overlap", lambda model, m, bank, **_: 1 / (m - 1))
    cells, failures = run_overlap([SMALL], [1, 2], CPU)
    assert cells == [1.0]
    assert failures == [("small", 1, "ZeroDivisionError: division by zero")]


@pytest.mark.usefixtures("second_stream")
def test_an_overlap_of_other_bits_is_not_timed(monkeypatch):
    @contextmanager
    def wrong(work, stream, like):
        result = work() * 1.01
        yield SimpleNamespace(joined=lambda: result)

    monkeypatch.setattr(overlap_runner, "calls_to_average", lambda num_tokens: 1)
    monkeypatch.setattr(layer_module, "beside", wrong)
    with pytest.raises(WrongKernelError, match="call 0 on two streams has other bits than on one"):
        _measure(SMALL)


@pytest.mark.usefixtures("second_stream")
def test_a_serial_layer_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(overlap_runner, "calls_to_average", lambda num_tokens: 1)
    plain = overlap_runner._plain_layer
    monkeypatch.setattr(overlap_runner, "_plain_layer", lambda model, call: 1.1 * plain(model, call))
    with pytest.raises(WrongKernelError, match="the serial layer used"):
        _measure(SMALL)


# --- what is printed ---------------------------------------------------------------------------------------------


def test_the_table_shows_every_cell_and_the_summary_what_they_say_together():
    cells = [_cell(), replace(_cell(num_tokens=512, overlapped=31.0), kernels=None, is_cold=False)]
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(overlap_table(cells))
    text = console.export_text()
    first, second = (line for line in text.splitlines() if "deepseek" in line)
    for shown in ("30.00", "24.00", "1.250 ±0.000", "44.9 MB", "0.60", "12", "0.50", "25.0%", "cold"):
        assert shown in first
    assert "unproven" in second
    assert "…" not in text
    lines = summary(cells)
    assert lines[0] == "mean efficiency 0.60 of 1 cells that could hide 3 us"
    assert "0.968 (deepseek-v3-tp8, M = 512)" in lines[1]
    assert "deepseek-v3-tp8 1, all 1" in lines[2]


def test_the_json_holds_cells_failures_and_thresholds():
    data = json.loads(json.dumps(as_json([_cell()], [("x", 4, "why")])))
    assert data["schema"] == "moegate-overlap/1"
    assert data["cells"][0]["efficiency"] == pytest.approx(0.6)
    assert data["failures"] == [{"layer": "x", "num_tokens": 4, "reason": "why"}]
    assert data["thresholds"] == {"deepseek-v3-tp8": 1, "all": 1}
    assert as_json([], [])["mean_efficiency"] is None


def test_the_command_line_says_what_it_cannot_do(capsys):
    assert command.main(["--overlap", "--device", "cpu"]) == 3
    for options in (["--models", "mixtral-8x7b"], ["--dtype", "bf16"], ["--tokens", "0"], ["--peer", "a.py:b"]):
        with pytest.raises(SystemExit) as stop:
            command.main(["--overlap", *options])
        assert stop.value.code == 4
    assert "with --overlap" in capsys.readouterr().err

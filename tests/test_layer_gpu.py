"""Two streams and CUDA graphs on a GPU: whatever is held up, and wherever a graph was captured, the bits are eager's.

    python -m pytest tests/test_layer_gpu.py -q -s

On a machine without a GPU every test is skipped. What the suite asks of every subject (SHARED-17, SHARED-18, GRAPH) is
here asked in a thousand cases, with the layer's own gate, and again with each guard of the overlap taken away.
"""

import contextlib
import functools
import types
from itertools import combinations
from pathlib import Path

import pytest
import torch
from layers import E, H, layer_of, quantised_shared, tokens

from moegate.conformance.properties.shared import PLACES
from moegate.conformance.streams import DELAY_CYCLES, Delays, late_and_gone, take_freed
from moegate.conformance.subjects.moegate_shared import hold_up
from moegate.impl import layer as layer_module
from moegate.impl import overlap
from moegate.impl.layer import MoELayer, RoutingMethod
from moegate.impl.path import record_path
from moegate.impl.shared_experts import SWITCH_VARIABLE, THRESHOLD_VARIABLE

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="streams and graphs need an NVIDIA GPU"
)

DELAYS = ((), *((place,) for place in PLACES), *combinations(PLACES, 2))  # 16
SEEDS = 18
KINDS = ("plain", "gated", "fp8", "threshold")
MOST = 512


@pytest.fixture(autouse=True)
def _overlaps(monkeypatch):
    """Every M of these tests is within the threshold, whatever the process was started with."""
    monkeypatch.setenv(THRESHOLD_VARIABLE, str(MOST))
    monkeypatch.setenv(SWITCH_VARIABLE, "0")


def _layer(kind="plain", **options):
    if kind == "fp8":
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("fp8 e4m3 needs compute capability 8.9")
        routed = layer_of(device="cuda", shared=False)
        shared = quantised_shared(device="cuda")
        return MoELayer(routed.gate, routed.experts, routed.routing, shared_experts=shared, **options)
    return layer_of(device="cuda", gated=kind == "gated", **options)


@contextlib.contextmanager
def _serial(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv(SWITCH_VARIABLE, "1")
        yield


def _x(count, seed):
    return tokens(count, device="cuda", name=f"x{seed}")


def _equal(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def _auxiliary():
    stream = overlap.auxiliary_stream(torch.device("cuda"))
    assert stream is not None
    return stream


@functools.cache
def _streams():
    """Two streams of the caller's, neither of which is the auxiliary one: torch hands out 32 in turn."""
    found = {}
    while len(found) < 2:
        stream = torch.cuda.Stream()
        if stream != _auxiliary():
            found[stream.cuda_stream] = stream
    return list(found.values())


def _call(layer, held, delays, *, caller=None):
    """One call on a stream of the caller's, whose input's memory is also given to others right after."""
    stream = torch.cuda.current_stream() if caller is None else caller
    with torch.cuda.stream(stream):
        x = torch.empty_like(held)
        kept = late_and_gone(lambda x=x: layer(x), x, held, delays)
        del x
        take_freed(stream, kept)
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_delays_at_every_hand_over_change_no_bit(kind, monkeypatch):
    """16 sets of delays, 18 seeds, 4 kinds: 1,152 cases."""
    delays = Delays()
    layer = hold_up(_layer(kind), delays)
    with _serial(monkeypatch):
        counts = [1 + (7 * seed) % 40 if kind != "threshold" else MOST for seed in range(SEEDS)]
        inputs = [_x(count, seed) for seed, count in enumerate(counts)]
        expected = [layer(x) for x in inputs]
    with record_path() as record:
        layer(inputs[0])
    assert record.last("shared_experts_order") == "multi_stream_overlapped"
    different = []
    for places in DELAYS:
        delays.places = places
        outputs = [_call(layer, x, delays) for x in inputs]
        torch.cuda.synchronize()
        different += [(places, s) for s in range(SEEDS) if not _equal(outputs[s], expected[s])]
    assert different == []


def test_any_stream_of_the_caller_s_will_do(monkeypatch):
    layer, x = _layer("gated"), _x(13, 0)
    with _serial(monkeypatch):
        expected = layer(x)
    torch.cuda.synchronize()
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1), _auxiliary()):
        stream.wait_stream(torch.cuda.current_stream())
        output = _call(layer, x, Delays(), caller=stream)
        stream.synchronize()  # this stream alone
        assert _equal(output, expected)


def test_two_layers_on_two_streams_and_two_micro_batches_in_flight(monkeypatch):
    delays = Delays()
    layers = [hold_up(_layer("gated"), delays), hold_up(_layer("plain"), delays)]
    inputs = [_x(count, seed) for seed, count in enumerate((3, 17, 40, 1, 29, 8))]
    with _serial(monkeypatch):
        expected = [[layer(x) for x in inputs] for layer in layers]
    torch.cuda.synchronize()
    for places in DELAYS:
        delays.places = places
        outputs = []
        for turn, x in enumerate(inputs):
            for which, layer in enumerate(layers):
                # Each layer meets both streams, and each stream both layers.
                stream = _streams()[(turn + which) % 2]
                outputs.append((which, turn, _call(layer, x, delays, caller=stream)))
        torch.cuda.synchronize()
        assert [(w, t) for w, t, output in outputs if not _equal(output, expected[w][t])] == []


def test_the_host_never_waits():
    """A call returns while the device still sleeps: no synchronisation of a device, a stream or an event."""
    layer, x = _layer("gated").prepare((5,)), _x(5, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    done = torch.cuda.Event()
    try:
        torch.cuda._sleep(200 * DELAY_CYCLES)
        layer(x)
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def _captured(layer, held, pool=None):
    """A graph of one call, its input and its output, after a call that was not captured."""
    x = held.clone()
    layer.prepare((len(x),))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = layer(x)
    return graph, x, output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [(), *((place,) for place in PLACES[1:])], ids="-".join)
def test_a_graph_replays_other_inputs_routings_and_fewer_tokens(kind, places, monkeypatch):
    delays = Delays(places)
    layer = hold_up(_layer(kind), delays)
    captured_at = 48 if kind != "threshold" else MOST
    graph, x, output = _captured(layer, _x(captured_at, 0))
    delays.places = ()
    for seed in range(1, 20):
        count = captured_at if seed % 2 else 1 + (11 * seed) % captured_at
        # Padding may hold anything that is a number; eager calls of other sizes come in between.
        x.fill_(1.0)
        x[:count] = _x(count, seed)
        graph.replay()
        replayed = output.clone()
        with _serial(monkeypatch):
            eager = layer(x)
            layer(x[:count])
        assert _equal(replayed, eager)
        for stream in (torch.cuda.current_stream(), _auxiliary()):
            take_freed(stream, eager)


def test_graphs_of_several_sizes_share_a_pool_and_stay_right(monkeypatch):
    layer = _layer("gated")
    pool = torch.cuda.graph_pool_handle()
    graphs = {count: _captured(layer, _x(count, count), pool) for count in (64, 8, 1)}
    for seed in range(12):
        count = (64, 1, 8)[seed % 3]
        graph, x, output = graphs[count]
        x.copy_(_x(count, seed))
        graph.replay()
        replayed = output.clone()
        # A larger eager call in between frees and takes memory.
        layer(_x(MOST, seed))
        with _serial(monkeypatch):
            assert _equal(replayed, layer(x))


def test_a_graph_reads_weights_that_were_changed_in_place(monkeypatch):
    layer = _layer("gated")
    graph, x, output = _captured(layer, _x(8, 0))
    graph.replay()
    before = output.clone()
    layer.shared_experts.expert.w2.mul_(2)
    layer.gate.weight.copy_(layer.gate.weight.roll(1, 0))
    graph.replay()
    assert not _equal(output, before)
    with _serial(monkeypatch):
        assert _equal(output, layer(x))


def test_a_capture_over_the_declared_maximum_is_an_error_and_hangs_nothing():
    layer = _layer("plain", max_captured_tokens=8).prepare((8, 9))
    x, too_many = _x(8, 0), _x(9, 0)
    torch.cuda.synchronize()
    with (
        pytest.raises(ValueError, match="at most max_captured_tokens 8 tokens in a CUDA graph's capture, got 9"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(too_many)
    graph, x, output = _captured(layer, x)
    graph.replay()
    assert _equal(output, layer(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_stream_of_another_device_is_refused_by_name():
    with pytest.raises(ValueError, match="aux_stream: expected a stream of cuda:0, got one of cuda:1"):
        _layer("plain", aux_stream=torch.cuda.Stream(torch.device("cuda", 1)))


def test_the_compiled_layer_overlaps_and_can_be_captured(monkeypatch):
    torch._dynamo.reset()
    layer, x = _layer("gated"), _x(8, 0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with record_path() as record:
        compiled(x)
    assert record.last("shared_experts_order") == "multi_stream_overlapped"
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compiled(x)
    x.copy_(_x(8, 1))
    graph.replay()
    with _serial(monkeypatch):
        assert _equal(output, layer(x))


# --- every guard is needed on the device too ---------------------------------------------------------------------

GUARDS = {
    "the fork's event is not recorded": ("    forked.record(caller)\n", ""),
    "the auxiliary stream does not wait": ("    stream.wait_event(forked)\n", ""),
    "the join's event is not recorded": ("            joined.record(stream)\n", "            pass\n"),
    "the caller does not wait": ("        caller.wait_event(joined)\n", "        pass\n"),
    "the result's memory is not kept": ("    result.record_stream(caller)\n", ""),
}
MOST_CASES = 50


def _micro_batches(layer, inputs, delays):
    """Calls on two streams: one is held up before its sum while the other's shared experts take memory."""
    outputs = []
    for turn, held in enumerate(inputs):
        delays.places = ("after_routed",) if turn % 2 == 0 else ()
        outputs.append(_call(layer, held, delays, caller=_streams()[turn % 2]))
    torch.cuda.synchronize()
    return outputs


@pytest.mark.parametrize("guard", GUARDS)
def test_removing_a_guard_is_caught_within_fifty_cases(guard, monkeypatch):
    kept, lost = GUARDS[guard]
    source = Path(overlap.__file__).read_text()
    assert source.count(kept) == 1
    module = types.ModuleType("overlap_without_a_guard")
    module.__package__ = overlap.__package__  # what it imports from beside it
    exec(compile(source.replace(kept, lost), "overlap.py", "exec"), vars(module))
    delays = Delays()
    layer = hold_up(_layer("gated"), delays)
    inputs = [_x(1 + 5 * (seed % 8), seed) for seed in range(10)]
    with _serial(monkeypatch):
        expected = [layer(x) for x in inputs]
    torch.cuda.synchronize()
    monkeypatch.setattr(layer_module, "beside", module.beside)
    cases = 0
    # Cases that hold up the shared experts, the input, and the sum, in turn.
    for places in (("before_fork",), ("before_shared",), ("after_shared",), None, None):
        if places is None:
            outputs = _micro_batches(layer, inputs, delays)
        else:
            delays.places = places
            outputs = [_call(layer, x, delays) for x in inputs]
            torch.cuda.synchronize()
        caught = [not _equal(a, b) for a, b in zip(outputs, expected, strict=True)]
        if any(caught):
            print(f"{guard}: caught in case {cases + caught.index(True) + 1}")
            return
        cases += len(inputs)
    pytest.fail(f"{guard}: {MOST_CASES} cases, and no bit differs")


def test_padding_tokens_of_another_routing_stay_apart(monkeypatch):
    """A token's output does not depend on which others are in the batch: rows of a padded replay are the eager rows."""
    layer = _layer("plain", routing=RoutingMethod(2, renormalize=False))
    graph, x, output = _captured(layer, _x(16, 0))
    for seed in range(5):
        x.copy_(_x(16, seed))
        graph.replay()
        first = output.clone()
        x[8:] = 0
        graph.replay()
        assert _equal(output[:8], first[:8])
    assert output.shape == (16, H)
    assert layer.num_experts == E

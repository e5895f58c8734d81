"""Two streams side by side: every hand-over is needed, shown on a model of streams that stands for every schedule."""

import types
from pathlib import Path

import pytest
import torch
from stream_model import RaceError, Stream, World

from moegate.impl import overlap

SOURCE = Path(overlap.__file__).read_text()


def _load(source, world):
    """`impl/overlap.py`, or an edited copy of it, on a model of the device."""
    module = types.ModuleType("overlap_under_test")
    module.__package__ = "moegate.impl"  # what it imports from beside it
    exec(compile(source, "overlap.py", "exec"), vars(module))
    module.torch = world.torch
    return module.beside


class _FailureError(Exception):
    pass


class _Layer:
    """What a layer does with memory, on the model."""

    def __init__(self, source):
        self.world = World()
        self.beside = _load(source, self.world)
        self.auxiliary = Stream("auxiliary")

    def call(self, x, *, fails_in=None):
        world = self.world

        def shared():
            x.read("shared experts read the input")
            scratch = world.allocate()
            scratch.write("shared experts write the first GEMM's output")
            if fails_in == "work":
                raise _FailureError
            result = world.allocate()
            result.write("shared experts write their output")
            scratch.free()
            return result

        with self.beside(shared, self.auxiliary, x) as side:
            x.read("the router reads the input")
            routed = world.allocate()
            routed.write("routed experts write their output")
            if fails_in == "block":
                raise _FailureError
        result = side.joined()
        result.read("the sum reads the shared output")
        routed.write("the sum writes")
        result.free()
        return routed

    def one_call(self, fails_in=None):
        x = self.world.allocate()
        x.write("the layer before writes the input")
        if fails_in is None:
            self.call(x).free()
        else:
            with pytest.raises(_FailureError):
                self.call(x, fails_in=fails_in)
        # Whoever comes next on this stream may be given the input's memory.
        x.free()
        after = self.world.allocate()
        after.write("the next layer writes over the input")
        after.free()


def _several_layers(layer):
    for _ in range(3):
        layer.one_call()


def _two_micro_batches(layer):
    """Two callers on streams of their own, one after the other, and again: they share the auxiliary stream."""
    callers = [Stream("first"), Stream("second")]
    for _ in range(2):
        for caller in callers:
            with layer.world.on(caller):
                layer.one_call()


def _a_caller_on_the_auxiliary_stream(layer):
    with layer.world.on(layer.auxiliary):
        layer.one_call()
    layer.one_call()


def _an_error_beside_it(layer):
    layer.one_call(fails_in="block")
    layer.one_call()


def _an_error_in_the_work(layer):
    layer.one_call(fails_in="work")
    layer.one_call()


SCENARIOS = (
    _several_layers,
    _two_micro_batches,
    _a_caller_on_the_auxiliary_stream,
    _an_error_beside_it,
    _an_error_in_the_work,
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
def test_nothing_races_on_any_schedule(scenario):
    scenario(_Layer(SOURCE))


GUARDS = {
    "the fork's event is not recorded": ("    forked.record(caller)\n", ""),
    "the auxiliary stream does not wait": ("    stream.wait_event(forked)\n", ""),
    "the join's event is not recorded": ("            joined.record(stream)\n", "            pass\n"),
    "the caller does not wait": ("        caller.wait_event(joined)\n", "        pass\n"),
    "the result's memory is not kept": ("    result.record_stream(caller)\n", ""),
    "the result is kept for the wrong stream": ("result.record_stream(caller)", "result.record_stream(stream)"),
    "the fork is on the wrong stream": ("forked.record(caller)", "forked.record(stream)"),
    "the join is recorded before the work": (
        "    joined = torch.cuda.Event()\n",
        "    joined = torch.cuda.Event()\n    joined.record(stream)\n    joined.record = lambda stream: None\n",
    ),
    "an error beside it joins nothing": (
        "        yield side\n    finally:\n        caller.wait_event(joined)\n",
        "        yield side\n        caller.wait_event(joined)\n    finally:\n        pass\n",
    ),
    "an error in the work joins nothing": (
        "        finally:\n            joined.record(stream)\n",
        "            joined.record(stream)\n        finally:\n            pass\n",
    ),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_every_guard_is_needed(guard):
    kept, lost = GUARDS[guard]
    assert SOURCE.count(kept) == 1
    caught = []
    for scenario in SCENARIOS:
        try:
            scenario(_Layer(SOURCE.replace(kept, lost)))
        except RaceError as race:
            caught.append(str(race))
    assert caught, f"{guard}: no scenario shows it"


def test_a_result_is_there_only_once_it_is_joined():
    layer = _Layer(SOURCE)
    x = layer.world.allocate()
    with layer.beside(layer.world.allocate, layer.auxiliary, x) as side, pytest.raises(RuntimeError, match="result"):
        side.joined()
    assert side.joined() is not None


def test_a_cpu_has_no_auxiliary_stream():
    assert overlap.auxiliary_stream(torch.device("cpu")) is None


def test_what_is_no_stream_is_refused_by_name():
    with pytest.raises(TypeError, match=r"aux_stream: expected a torch\.cuda\.Stream, got str"):
        overlap.expect_stream("aux_stream", "1", torch.device("cpu"))


def test_a_stream_of_another_device_is_refused_by_name(monkeypatch):
    class OtherStream:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "Stream", OtherStream)
    with pytest.raises(ValueError, match="aux_stream: expected a stream of cuda:0, got one of cuda:1"):
        overlap.expect_stream("aux_stream", OtherStream(), torch.device("cuda", 0))

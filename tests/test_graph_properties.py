"""The judge of graphs without a GPU, where a replay runs the call again: graphs that go wrong are caught by name."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from moegate.conformance.catalogue import due
from moegate.conformance.numerics import Numerics
from moegate.conformance.properties.graph import (
    Calls,
    judge_eager,
    judge_fewer_tokens,
    judge_replays,
    judge_streams,
)
from moegate.conformance.shared_cases import SharedSpec, build_shared
from moegate.conformance.subjects.eager import EagerSubject
from moegate.conformance.subjects.moegate import MoegateSubject

SPECS = [
    SharedSpec(M=6, H=64, I=32, E=8, top_k=2, shared_size=48, gated=True, scaling="above_one"),
    SharedSpec(M=5, H=40, I=24, E=5, top_k=3, shared_size=16, dtype="float16", padded_rows=True, seed=3),
    SharedSpec(M=9, H=64, I=32, E=8, top_k=2, shared_size=48, shared_scheme="fp8_channel_token", seed=5),
]
HONEST = MoegateSubject()
NUMERICS = Numerics()


class _Rerun:
    """A graph without a GPU."""

    def __init__(self, call):
        self.call, self.output = call, call().clone()

    def replay(self):
        self.output.copy_(self.call())


def _eager(case):
    return HONEST.shared(case, "cpu", overlapped=False, hold=None)


def _prepare(case):
    return HONEST.capture(case, "cpu")


@pytest.fixture(autouse=True)
def _no_streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


def _cases(spec, count):
    return [build_shared(replace(spec, seed=spec.seed + 7 * own)) for own in range(count)]


def _violated(spec, **changes):
    """What a subject violates that is called in this way."""
    calls = Calls(**({"prepare": _prepare, "eager": _eager, "record": _Rerun} | changes))
    case, *donors = _cases(spec, 3)
    verdicts = judge_replays(case, donors, calls)
    for takes_invalid in (True, False):
        verdicts += judge_fewer_tokens(*_cases(spec, 1), 3, calls, NUMERICS, takes_invalid=takes_invalid)
    verdicts += judge_streams(_cases(spec, 2), calls, [None, None])
    verdicts.append(judge_eager(*_cases(spec, 2), calls))
    assert {verdict.property.id for verdict in verdicts} == {f"GRAPH-0{number}" for number in range(1, 9)}
    return {verdict.property.id for verdict in verdicts if not verdict.holds}


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_an_honest_graph_holds_everything(spec):
    assert _violated(spec) == set()


class _Nothing(_Rerun):
    def replay(self):
        pass


class _Stale(_Rerun):
    def __init__(self, call):
        super().__init__(call)
        self.first = self.output.clone()

    def replay(self):
        self.output.copy_(self.first)


class _LastRowIsNotWritten(_Rerun):
    def replay(self):
        self.output[:-1].copy_(self.call()[:-1])


class _Drifting(_Rerun):
    times = 0

    def replay(self):
        self.times += 1
        self.output.copy_(self.call() * (1 + (self.times > 2) * 0.1))


class _ReadsTheLastCapture(_Rerun):
    """Graphs that share a workspace: each runs what was captured last."""

    captured: list = []  # noqa: RUF012 (that is the fault)

    def __init__(self, call):
        super().__init__(call)
        self.captured.append(call)

    def replay(self):
        self.output.copy_(self.captured[-1]())


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (_Nothing, {"GRAPH-01", "GRAPH-02"}),
        (_Stale, {"GRAPH-02", "GRAPH-05"}),
        (_LastRowIsNotWritten, {"GRAPH-01", "GRAPH-02"}),
        (_Drifting, {"GRAPH-06"}),
        (_ReadsTheLastCapture, {"GRAPH-07"}),
    ],
)
def test_a_graph_that_goes_wrong_is_caught_by_name(record, expected):
    for spec in SPECS:
        assert expected <= _violated(spec, record=record), spec


def _caching(key):
    """Routing that is remembered by an address: of the ids, or of the hidden states."""
    cache = {}

    def prepare(case):
        def call():
            address = key(case).data_ptr()
            ids = cache.setdefault(address, case.routed.topk_ids.clone())
            return _eager(replace(case, routed=replace(case.routed, topk_ids=ids)))

        return call

    return prepare


class _KeepsItsWeights(_Rerun):
    """The weights are copied when it is captured."""

    def __init__(self, call):
        super().__init__(call)
        self.before = None

    def replay(self):
        case = self.call.case
        if self.before is None:
            self.before = case.routed.w2.clone()
        self.output.copy_(_eager(replace(case, routed=replace(case.routed, w2=self.before))))


def _named(case):
    call = _prepare(case)

    def named():
        return call()

    named.case = case
    return named


def _scales_its_input(case):
    def call():
        output = _eager(case)
        case.hidden_states.mul_(0.5)
        return output

    return call


def _leaks(case):
    """The rows of a batch are not apart: each gets a part of the last one."""

    def call():
        output = _eager(case)
        return output + 0.125 * output[-1:]

    return call


def _drops_the_scaling(case):
    return _prepare(replace(case, routed_scaling_factor=1.5))


@pytest.mark.parametrize(
    ("prepare", "record", "expected"),
    [
        (_caching(lambda case: case.routed.topk_ids), _Rerun, {"GRAPH-02", "GRAPH-08"}),
        (_caching(lambda case: case.hidden_states), _Rerun, {"GRAPH-02", "GRAPH-08"}),
        (_named, _KeepsItsWeights, {"GRAPH-05"}),
        (_scales_its_input, _Rerun, {"GRAPH-06"}),
        (_leaks, _Rerun, {"GRAPH-01", "GRAPH-03", "GRAPH-04"}),
        (_drops_the_scaling, _Rerun, {"GRAPH-01", "GRAPH-04"}),
    ],
    ids=["ids_by_address", "ids_by_input", "weights_kept", "input_written", "padding_leaks", "scaled"],
)
def test_a_call_that_goes_wrong_is_caught_by_name(prepare, record, expected):
    assert expected <= _violated(SPECS[0], prepare=prepare, record=record)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda case: torch.zeros_like(case.hidden_states),
        lambda case: case.hidden_states.clone(),
        lambda case: _eager(case).roll(1, 0),
        lambda case: _eager(case).nanmean(0, keepdim=True).expand(case.hidden_states.shape).contiguous(),
    ],
    ids=["zeros", "input", "other_rows", "mean"],
)
def test_what_is_wrong_in_the_eager_call_too_is_seen_by_the_reference(wrong):
    for spec in SPECS:
        assert "GRAPH-04" in _violated(spec, eager=wrong, prepare=lambda case: lambda: wrong(case)), spec


def test_graphs_are_due_on_a_gpu_alone_and_where_a_subject_can_be_captured():
    def ids(subject, device):
        return {prop.id for prop in due(subject, device) if prop.id.startswith("GRAPH")}

    assert ids(HONEST, "cpu") == {"GRAPH-08"}
    assert ids(EagerSubject(), "cpu") == ids(EagerSubject(), "cuda") == set()


def test_graphs_are_due_on_a_gpu(monkeypatch):
    monkeypatch.setattr(MoegateSubject, "unavailable", lambda self, variant, device: None)
    found = {prop.id for prop in due(HONEST, "cuda") if prop.id.startswith("GRAPH")}
    assert found == {f"GRAPH-0{number}" for number in range(1, 9)}

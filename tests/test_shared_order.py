"""The order of shared experts: its question space enumerated, and faults planted in its tests, each caught by name."""

from dataclasses import replace
from itertools import chain, combinations, islice

import pytest

from moegate.conformance.judge import PROPERTIES
from moegate.conformance.shared_order import (
    ORDER_OF_TEST,
    SharedOrderSpec,
    enumerate_orders,
    orders,
    unreadable,
)
from moegate.conformance.subjects.moegate_shared import MoegateSharedOrder
from moegate.impl import shared_experts
from moegate.impl.path import record_path
from moegate.impl.platform import Platform
from moegate.impl.shared_experts import (
    SWITCH_VARIABLE,
    TESTS,
    THRESHOLD_VARIABLE,
    OrderTest,
    SharedExpertsOrder,
    SharedExpertsSetting,
    order_of_call,
    shared_experts_order,
)

ORDER_PROPERTIES = {
    id for id, prop in PROPERTIES.items() if id.startswith("SHARED-") and prop.facets == ("shared_order",)
}
HOPPER = Platform.parse("cuda:9.0")


def _violated(relations_every=0):
    """What every 13th point of the space sees violated: no factor of the space divides 13."""
    some = islice(orders(), 0, None, 13)
    return set(enumerate_orders(MoegateSharedOrder(), some, relations_every=relations_every).violated())


def test_every_property_holds_on_every_point_of_the_space():
    result = enumerate_orders(MoegateSharedOrder(), chain(unreadable(), orders()), relations_every=23)
    assert result.violated() == {}
    assert result.points > 60_000
    assert {prop.id for prop in result.counts} == ORDER_PROPERTIES
    assert {prop.id: count.cases for prop, count in result.counts.items() if count.cases < 30} == {}
    assert set(result.decisions) == {*(order.value for order in SharedExpertsOrder), "refused"}


def test_tensor_parallelism_with_external_experts_keeps_its_overlap():
    setting = SharedExpertsSetting(uses_external_experts=True)
    decision = shared_experts_order(setting, HOPPER, has_auxiliary_stream=True, num_tokens=256)
    assert decision.order is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
    beyond = shared_experts_order(setting, HOPPER, has_auxiliary_stream=True, num_tokens=257)
    assert beyond.order is SharedExpertsOrder.EXTERNAL
    assert "257 tokens are more than the threshold of 256" in str(beyond)


# --- planted faults ----------------------------------------------------------------------------------------------

PAIRS = list(combinations(range(len(TESTS)), 2))


def _outcomes(table):
    """What a table of tests decides where exactly two of its tests, and the last resort, hold."""
    order = [test.value for test, *_ in table]
    return {
        frozenset(held): next(ORDER_OF_TEST[test] for test in order if test in held)
        for held in ({a, b, "serial"} for a, b in combinations(ORDER_OF_TEST, 2))
    }


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda i: TESTS[i][0].value)
def test_swapping_any_two_tests_is_caught(monkeypatch, first, second):
    swapped = list(TESTS)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    # Also where both decide on the same order, whose reasons differ.
    monkeypatch.setattr(shared_experts, "TESTS", tuple(swapped))
    violated = _violated()
    assert {"SHARED-09", "SHARED-10"} & violated
    if _outcomes(TESTS) != _outcomes(swapped):
        assert violated - {"SHARED-09"}, "an order that changed must be seen by more than the reasons' order"


def test_38990_itself_is_caught_by_its_name(monkeypatch):
    swapped = [*TESTS[:3], TESTS[4], TESTS[3], TESTS[5]]
    monkeypatch.setattr(shared_experts, "TESTS", tuple(swapped))
    assert "SHARED-06" in _violated()


@pytest.mark.parametrize("dropped", range(len(TESTS) - 1), ids=lambda i: TESTS[i][0].value)
def test_dropping_a_test_is_caught(monkeypatch, dropped):
    monkeypatch.setattr(shared_experts, "TESTS", (*TESTS[:dropped], *TESTS[dropped + 1 :]))
    assert "SHARED-10" in _violated()


def _with_question(change):
    """Every test is asked about a changed question."""

    def plant(patch):
        original = shared_experts._Question

        def changed(*fields):
            return change(original(*fields))

        patch.setattr(shared_experts, "_Question", changed)

    return plant


def _without_cause(cause, *, of=OrderTest.UNSAFE):
    """A test forgets one of its causes."""

    def plant(patch):
        def forgetful(asked):
            def without(question):
                _, causes = asked(question)
                causes = {name: why for name, why in causes.items() if name not in (cause, "safe")}
                return bool(causes), causes or {"safe": "nothing"}

            return without

        table = [(test, order, forgetful(asked) if test is of else asked) for test, order, asked in TESTS]
        patch.setattr(shared_experts, "TESTS", tuple(table))

    return plant


def _setting(**changes):
    return _with_question(lambda question: replace(question, setting=replace(question.setting, **changes)))


FAULTS = {
    "EPLB is taken for safe beside every all-to-all": (_without_cause("eplb_all_to_all"), {"SHARED-03", "SHARED-04"}),
    "two-sided NVLink is taken for safe": (_without_cause("two_sided_nvlink"), {"SHARED-03", "SHARED-04"}),
    "fully sharded LoRA is taken for safe": (_without_cause("fully_sharded_lora"), {"SHARED-03", "SHARED-04"}),
    "the declared all-to-all is forgotten": (
        lambda patch: patch.setattr(shared_experts, "SAFE_BESIDE_EPLB", frozenset()),
        {"SHARED-04"},
    ),
    "EPLB counts without an all-to-all": (
        _with_question(
            lambda q: replace(q, setting=replace(q.setting, all_to_all=q.setting.all_to_all or "deepep_low_latency"))
        ),
        {"SHARED-04", "SHARED-10"},
    ),
    "LoRA is asked of nobody": (_setting(fully_sharded_lora=False), {"SHARED-03"}),
    "the threshold excludes itself": (
        _with_question(lambda q: replace(q, num_tokens=q.num_tokens + 1)),
        {"SHARED-06", "SHARED-07"},
    ),
    "the threshold is one too high": (
        _with_question(lambda q: replace(q, threshold=q.threshold + 1)),
        {"SHARED-07"},
    ),
    "the threshold is not read": (_with_question(lambda q: replace(q, threshold=256)), {"SHARED-07"}),
    "the switch is not read": (_with_question(lambda q: replace(q, is_disabled=False)), {"SHARED-07"}),
    "the switch takes more than the stream away": (
        _with_question(
            lambda q: replace(q, setting=replace(q.setting, uses_external_experts=False)) if q.is_disabled else q
        ),
        {"SHARED-08", "SHARED-10"},
    ),
    "a stream is taken for granted": (_with_question(lambda q: replace(q, has_auxiliary_stream=True)), {"SHARED-07"}),
    "CUDA alone has streams": (
        lambda patch: patch.setattr(Platform, "is_cuda_alike", property(lambda p: p.vendor.value == "cuda")),
        {"SHARED-07"},
    ),
    "every platform has streams": (
        lambda patch: patch.setattr(Platform, "is_cuda_alike", property(lambda p: True)),
        {"SHARED-07"},
    ),
    "the device's name decides": (
        _with_question(lambda q: replace(q, has_auxiliary_stream=q.has_auxiliary_stream and not q.platform.name)),
        {"SHARED-12"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_a_named_property(fault, monkeypatch):
    plant, expected = FAULTS[fault]
    plant(monkeypatch)
    assert expected <= _violated(relations_every=11)


def test_a_variable_that_is_not_understood_is_caught_where_it_passes(monkeypatch):
    monkeypatch.setattr(shared_experts, "stream_token_threshold", lambda environment: 256)
    result = enumerate_orders(MoegateSharedOrder(), unreadable())
    assert set(result.violated()) == {"SHARED-01"}


# --- the call's own way in ---------------------------------------------------------------------------------------


def test_a_call_reads_the_environment_of_its_process_anew(monkeypatch):
    monkeypatch.delenv(SWITCH_VARIABLE, raising=False)
    monkeypatch.delenv(THRESHOLD_VARIABLE, raising=False)

    def order(tokens=64):
        return order_of_call(SharedExpertsSetting(), HOPPER, True, tokens).order

    assert order() is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
    monkeypatch.setenv(THRESHOLD_VARIABLE, "63")
    assert order() is SharedExpertsOrder.NO_OVERLAP
    assert order(63) is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
    monkeypatch.setenv(SWITCH_VARIABLE, "1")
    assert order(63) is SharedExpertsOrder.NO_OVERLAP


def test_asking_records_nothing():
    with record_path() as record:
        order_of_call(SharedExpertsSetting(), HOPPER, True, 1)
    assert record.facts == []


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: SharedExpertsSetting(uses_eplb=1), TypeError, "uses_eplb: expected a bool, got int"),
        (lambda: SharedExpertsSetting(all_to_all="carrier pigeon"), ValueError, "all_to_all: expected None or one of"),
        (
            lambda: shared_experts_order(None, HOPPER, has_auxiliary_stream=True, num_tokens=1),
            TypeError,
            "setting: expected a SharedExpertsSetting, got NoneType",
        ),
        (
            lambda: shared_experts_order(SharedExpertsSetting(), "cuda", has_auxiliary_stream=True, num_tokens=1),
            TypeError,
            "platform: expected a Platform, got str",
        ),
        (
            lambda: shared_experts_order(SharedExpertsSetting(), HOPPER, has_auxiliary_stream=None, num_tokens=1),
            TypeError,
            "has_auxiliary_stream: expected a bool",
        ),
        (
            lambda: shared_experts_order(SharedExpertsSetting(), HOPPER, has_auxiliary_stream=True, num_tokens=-1),
            ValueError,
            "num_tokens: expected at least 0, got -1",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, named):
    with pytest.raises(error, match=named):
        call()


def test_a_question_reads_back_from_its_line():
    question = SharedOrderSpec(all_to_all="deepep_low_latency", threshold="64")
    answer = MoegateSharedOrder().ask(question)
    assert answer.order == "multi_stream_overlapped"

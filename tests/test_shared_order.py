"""The order of shared experts: its question space enumerated, and its tests swapped and dropped, each seen by name."""

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
    decision = shared_experts_order(setting, HOPPER, has_auxiliary_stream=True, num_tokens=2048)
    assert decision.order is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
    beyond = shared_experts_order(setting, HOPPER, has_auxiliary_stream=True, num_tokens=2049)
    assert beyond.order is SharedExpertsOrder.EXTERNAL
    assert "2049 tokens are more than the threshold of 2048" in str(beyond)


# --- its tests in another order ---------------------------------------------------------------------------------

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

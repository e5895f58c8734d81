"""The oracle's proof: its question space enumerated. Faults of its rules are in the catalogue of `moegate faults`."""

import time
from itertools import chain, islice

import pytest
from hypothesis import HealthCheck, given, settings

from moegate.conformance.judge import PROPERTIES
from moegate.conformance.oracle import (
    KERNELS,
    availabilities,
    configurations,
    covering,
    enumerate_oracle,
    judge_question,
    judge_relations,
    oracle_specs,
    requests,
)
from moegate.conformance.subjects.moegate_oracle import MoegateOracle
from moegate.impl.experts.readiness import State
from moegate.impl.oracle.backends import UnquantizedMoeBackend as Backend

ORACLE_PROPERTIES = {id for id in PROPERTIES if id.startswith("ORACLE-")}
SPACES = {"configurations": configurations, "requests": requests, "availabilities": availabilities}


@pytest.mark.parametrize("space", SPACES)
def test_every_property_holds_on_every_point_of_the_space(space, capsys):
    started = time.perf_counter()
    result = enumerate_oracle(MoegateOracle(), SPACES[space](), relations_every=97)
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(f"\n{space}: {result.points} points in {seconds:.1f} s, decisions {dict(result.decisions)}")
    assert result.violated() == {}
    assert result.points > 100_000


def test_every_property_is_judged_many_times_in_the_three_spaces():
    result = enumerate_oracle(
        MoegateOracle(), chain(*(islice(space(), 0, None, 61) for space in SPACES.values())), relations_every=10
    )
    assert result.violated() == {}
    assert {prop.id for prop in result.counts} == ORACLE_PROPERTIES
    assert {prop.id: count.cases for prop, count in result.counts.items() if count.cases < 100} == {}
    assert set(result.decisions) == {*(backend.value for backend in Backend), "refused"}


@settings(deadline=None, max_examples=400, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(oracle_specs())
def test_every_property_holds_in_a_larger_space_than_the_one_enumerated(question):
    facet = MoegateOracle()
    answer = facet.ask(question)
    for prop, violation in [*judge_question(facet, question, answer), *judge_relations(facet, question, answer)]:
        assert not violation, f"{prop.id}: {prop.sentence}\n{violation}"


def test_the_environment_of_the_process_changes_no_answer(monkeypatch):
    facet = MoegateOracle()
    questions = list(islice(requests(), 0, None, 499))
    before = [facet.ask(question) for question in questions]
    monkeypatch.setenv("MOEGATE_BACKEND", "aiter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert [facet.ask(question) for question in questions] == before


def test_the_points_that_faults_are_judged_on_are_clean_without_one():
    result = enumerate_oracle(MoegateOracle(), covering(), relations_every=7)
    assert result.violated() == {}


def test_the_three_states_of_a_kernel_are_all_asked_about():
    states = {State.READY: 0, State.ON_REQUEST: 0, State.ABSENT: 0}
    for question in islice(availabilities(), 0, None, 17):
        states[State.ABSENT] += bool(question.absent)
        states[State.ON_REQUEST] += bool(question.on_request)
        states[State.READY] += len(question.absent) < len(KERNELS)
    assert all(count > 20 for count in states.values()), states

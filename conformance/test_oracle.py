from itertools import chain, islice

import pytest

from moegate.conformance.judge import Tally
from moegate.conformance.oracle import (
    availabilities,
    configurations,
    covering,
    enumerate_oracle,
    judge_question,
    judge_relations,
    oracle_specs,
    requests,
)
from moegate.conformance.selection import SELECTION

pytestmark = pytest.mark.moegate_facets("oracle")

SPACES = {"configurations": configurations, "requests": requests, "availabilities": availabilities}
# The gate asks the points on which every rule meets every kind of platform, and every 13th of the whole space; the
# other profiles, and the project's own tests, ask all of it.
GATE_STRIDE = 13


@pytest.fixture
def oracle(moegate_session):
    subject = moegate_session.subject
    if "oracle" not in subject.facets(subject.variants[0]):
        reason = f"{subject.name} does not define oracle"
        moegate_session.ledger.skipped[reason] += 1
        pytest.skip(reason)
    return subject.oracle()


@pytest.mark.parametrize("space", SPACES)
def test_the_oracle_keeps_its_rules_on_the_space_of_questions(moegate_session, oracle, space):
    ledger = moegate_session.ledger
    stride = GATE_STRIDE if SELECTION.profile == "gate" else 1
    questions = chain(covering() if space == "configurations" else (), islice(SPACES[space](), 0, None, stride))
    result = enumerate_oracle(oracle, questions, relations_every=7 * stride // GATE_STRIDE or 97)
    ledger.executions["oracle"] += result.points
    for prop, count in result.counts.items():
        found = count.first is not None
        ledger.tallies.setdefault(prop.id, Tally()).add(Tally(count.cases - found, max(count.violated - 1, 0)))
    for prop, count in result.counts.items():
        if count.first is not None:
            violation, question = count.first
            moegate_session.settle([prop.verdict(False, violation)], question)


def test_the_oracle_keeps_its_rules_in_a_larger_space(moegate_session, oracle):
    def judge(question):
        answer = oracle.ask(question)
        found = [*judge_question(oracle, question, answer), *judge_relations(oracle, question, answer)]
        return [prop.verdict(not violation, violation) for prop, violation in found]

    moegate_session.explore(oracle_specs(), judge, name="ORACLE", variant="oracle", examples=300)

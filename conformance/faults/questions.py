"""The rules of the oracle and of the order of shared experts, one question after the other until one is broken.

Their tests enumerate whole spaces and report at the end; a search for one violation stops at the first. Questions
come shuffled by a fixed seed, so that neighbours, which say much the same, are far apart.
"""

import random
from functools import cache
from itertools import chain, islice
from typing import Any

import pytest

from .. import oracle, shared_order
from ..selection import SELECTION
from ..spec import parse_spec

# Relations ask several neighbours each, so that a question in so many has them.
RELATED = 5


def _shuffled(questions: Any) -> list[Any]:
    found = list(questions)
    random.Random(2026).shuffle(found)
    return found


@cache
def oracle_questions() -> list[oracle.OracleSpec]:
    """Points on which every rule meets every kind of platform, and some of the whole space."""
    some = (islice(space(), 0, None, 61) for space in (oracle.configurations, oracle.availabilities))
    return _shuffled(chain(oracle.covering(), *some))


@cache
def order_questions() -> list[shared_order.SharedOrderSpec]:
    """Each question that cannot be read, and a share of those that can."""
    return _shuffled(chain(shared_order.unreadable(), islice(shared_order.orders(), 0, None, 7)))


def _ask(session: Any, facet: Any, rules: Any, judge: Any, questions: list[Any]) -> None:
    if SELECTION.spec is not None:
        questions = [parse_spec(SELECTION.spec)]
    for index, question in enumerate(questions[: session.most_questions]):
        answer = facet.ask(question)
        found = judge(question, answer)
        if index % RELATED == 0:
            found += rules.judge_relations(facet, question, answer)
        session.judged([prop.verdict(not violation, violation) for prop, violation in found], question)


@pytest.mark.moegate_facets("oracle")
def test_oracle(moegate_session: Any) -> None:
    """Every question of the oracle."""
    facet = moegate_session.subject.oracle()
    _ask(moegate_session, facet, oracle, lambda q, a: oracle.judge_question(facet, q, a), oracle_questions())


@pytest.mark.moegate_facets("shared_order")
def test_order(moegate_session: Any) -> None:
    """Every question of the order of shared experts."""
    facet = moegate_session.subject.shared_order()
    _ask(moegate_session, facet, shared_order, shared_order.judge_order, order_questions())

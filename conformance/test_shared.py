from itertools import chain

import pytest

from moegate.conformance.judge import Tally
from moegate.conformance.selection import SELECTION
from moegate.conformance.shared_order import enumerate_orders, orders, unreadable
from moegate.conformance.spec import parse_spec


@pytest.mark.moegate_facets("shared_order")
def test_the_order_of_shared_experts_keeps_its_rules_on_the_space_of_questions(moegate_session):
    ledger, subject = moegate_session.ledger, moegate_session.subject
    if "shared_order" not in subject.facets(subject.variants[0]):
        reason = f"{subject.name} does not define shared_order"
        ledger.skipped[reason] += 1
        pytest.skip(reason)
    # The whole space is asked: it takes two seconds.
    questions = chain(unreadable(), orders()) if SELECTION.spec is None else [parse_spec(SELECTION.spec)]
    result = enumerate_orders(subject.shared_order(), questions, relations_every=11)
    ledger.executions["shared_order"] += result.points
    for prop, count in result.counts.items():
        found = count.first is not None
        ledger.tallies.setdefault(prop.id, Tally()).add(Tally(count.cases - found, max(count.violated - 1, 0)))
    for prop, count in result.counts.items():
        if count.first is not None:
            violation, question = count.first
            ledger.settle([prop.verdict(False, violation)], question, moegate_session.replay(question))

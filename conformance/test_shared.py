from itertools import chain, combinations

import pytest
import torch

from moegate.conformance.judge import Tally
from moegate.conformance.properties.hygiene import poisoned_allocations
from moegate.conformance.properties.shared import (
    HAND_OVERS,
    OVERLAP,
    judge_again,
    judge_element,
    judge_memory,
    judge_overlap,
    judge_unscaled,
    truth_of,
)
from moegate.conformance.selection import SELECTION
from moegate.conformance.shared_cases import build_shared, pinned_shared, shared_specs
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


EXAMPLES, RUNS = 12, 4  # poisoned, again, and with two factors
# On a GPU: no delay, each one, and each two, of about 50 us, as long as a small layer takes.
DELAYS = ((), *((place,) for place in HAND_OVERS), *combinations(HAND_OVERS, 2))
DELAY_CYCLES = 100_000


@pytest.mark.moegate_facets("shared")
@pytest.mark.moegate_executions(EXAMPLES, RUNS)
def test_shared_experts_stay_within_budget_beside_the_routed_ones(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject

    def run(case):
        return subject.shared(case, variant, overlapped=False, hold=None)

    def judge(spec):
        case = build_shared(spec, session.device)
        truth = truth_of(case, subject.numerics)  # before the subject can write into its inputs
        with poisoned_allocations():
            output = run(case)
        verdicts = [judge_memory(case, output), *judge_element(output, truth), *judge_unscaled(case, run)]
        return [*verdicts, judge_again(output, run(case))] if subject.numerics.repeatable else verdicts

    session.explore(
        shared_specs(session.device, subject.capabilities),
        judge,
        name=f"SHARED/{variant}",
        variant=variant,
        examples=EXAMPLES,
        pinned=pinned_shared(session.device, subject.capabilities),
        runs=RUNS,
    )


@pytest.mark.moegate_facets("shared")
@pytest.mark.moegate_executions(EXAMPLES, 1 + len(DELAYS))
def test_two_streams_give_the_bits_of_one(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    if session.device not in OVERLAP.devices or not OVERLAP.needs(subject.capabilities):
        pytest.skip("streams overlap on a GPU alone, where the subject declares it")

    def judge(spec):
        case = build_shared(spec, session.device)
        serial = subject.shared(case, variant, overlapped=False, hold=None)
        x, verdicts = case.hidden_states, []
        held = x.clone()
        for delays in DELAYS:

            def hold(place, delays=delays):
                if place in delays:
                    torch.cuda._sleep(DELAY_CYCLES)

            # The input is there at the last moment, and gone right after the call: nobody may read it outside of it.
            x.fill_(torch.nan)
            torch.cuda._sleep(DELAY_CYCLES)
            x.copy_(held)
            overlapped = subject.shared(case, variant, overlapped=True, hold=hold)
            x.fill_(torch.nan)
            verdicts.append(judge_overlap(serial, overlapped, delays))
        return verdicts

    session.explore(
        shared_specs(session.device, subject.capabilities),
        judge,
        name=f"OVERLAP/{variant}",
        variant=variant,
        examples=EXAMPLES,
        runs=1 + len(DELAYS),
    )

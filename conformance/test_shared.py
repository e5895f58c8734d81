from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch

from moegate.conformance.judge import Tally
from moegate.conformance.properties.hygiene import poisoned_allocations
from moegate.conformance.properties.shared import (
    OVERLAP,
    PLACES,
    judge_again,
    judge_callers,
    judge_element,
    judge_held,
    judge_memory,
    judge_overlap,
    judge_unscaled,
    truth_of,
)
from moegate.conformance.selection import SELECTION
from moegate.conformance.shared_cases import build_shared, pinned_shared, shared_specs
from moegate.conformance.shared_order import enumerate_orders, orders, unreadable
from moegate.conformance.spec import parse_spec
from moegate.conformance.streams import Delays, late_and_gone, while_default_stream_is_held


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
            moegate_session.settle([prop.verdict(False, violation)], question)


EXAMPLES, RUNS = 12, 4  # poisoned, again, and with two factors
# On a GPU: no delay, each one, and each two.
DELAYS = ((), *((place,) for place in PLACES), *combinations(PLACES, 2))
TURNS = 6


def _explore(session, variant, judge, name, runs, pinned=()):
    session.explore(
        shared_specs(session.device, session.subject.capabilities),
        judge,
        name=f"{name}/{variant}",
        variant=variant,
        examples=EXAMPLES,
        pinned=pinned,
        runs=runs,
    )


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

    pinned = pinned_shared(session.device, subject.capabilities)
    _explore(session, variant, judge, "SHARED", RUNS, pinned=pinned)


def _skip_without_streams(session):
    if session.device not in OVERLAP.devices or not OVERLAP.needs(session.subject.capabilities):
        pytest.skip("streams overlap on a GPU alone, where the subject declares it")


@pytest.mark.moegate_facets("shared")
@pytest.mark.moegate_executions(EXAMPLES, 1 + len(DELAYS))
def test_two_streams_give_the_bits_of_one(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    _skip_without_streams(session)

    def judge(spec):
        case = build_shared(spec, session.device)
        serial = subject.shared(case, variant, overlapped=False, hold=None)
        x, held, verdicts = case.hidden_states, case.hidden_states.clone(), []
        for places in DELAYS:
            delays = Delays(places)

            def run(delays=delays):
                return subject.shared(case, variant, overlapped=True, hold=delays)

            verdicts.append(judge_overlap(serial, late_and_gone(run, x, held, delays), places))
        return verdicts

    _explore(session, variant, judge, "OVERLAP", 1 + len(DELAYS))


@pytest.mark.moegate_facets("shared")
@pytest.mark.moegate_executions(EXAMPLES, 2 + TURNS)
def test_two_callers_give_the_bits_of_one(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    _skip_without_streams(session)

    def judge(spec):
        cases = [build_shared(replace(spec, seed=(spec.seed + own) % 256), session.device) for own in range(2)]
        serial = [subject.shared(case, variant, overlapped=False, hold=None) for case in cases]
        held = [case.hidden_states.clone() for case in cases]
        callers = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        outputs = []
        for turn in range(TURNS):
            which = turn % 2
            # One caller's sum is held up, while the other's shared experts take what memory there is.
            delays = Delays(("after_routed",) if which == 0 else ())

            def run(case=cases[which], delays=delays):
                return subject.shared(case, variant, overlapped=True, hold=delays)

            with torch.cuda.stream(callers[which]):
                outputs.append(late_and_gone(run, cases[which].hidden_states, held[which], delays))
        torch.cuda.synchronize()
        return [judge_callers(serial[turn % 2], output, turn) for turn, output in enumerate(outputs)]

    _explore(session, variant, judge, "CALLERS", 2 + TURNS)


@pytest.mark.moegate_facets("shared")
@pytest.mark.moegate_executions(EXAMPLES, 3)
def test_two_streams_wait_for_no_third(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    _skip_without_streams(session)

    def judge(spec):
        case = build_shared(spec, session.device)
        serial = subject.shared(case, variant, overlapped=False, hold=None)

        def run():
            return subject.shared(case, variant, overlapped=True, hold=None)

        return [judge_held(serial, *while_default_stream_is_held(run))]

    _explore(session, variant, judge, "HELD", 3)

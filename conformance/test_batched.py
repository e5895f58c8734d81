from contextlib import nullcontext

import pytest

from moegate.conformance.cases import build_batched
from moegate.conformance.properties.batched import (
    judge_form,
    judge_launches,
    judge_memory,
    judge_rows,
    memory_around,
    reference_of_batched,
)
from moegate.conformance.properties.hygiene import poisoned_allocations
from moegate.conformance.spec import BatchedSpec
from moegate.conformance.strategies import POOLS, batched_specs

EXAMPLES, RUNS = 80, 2  # into a tensor that is given; then, with poisoned allocations, into the subject's own
pytestmark = [pytest.mark.moegate_facets("batched"), pytest.mark.moegate_executions(EXAMPLES, RUNS)]


def test_each_token_goes_through_its_expert_and_no_other_row_is_touched(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    traced = "trace" in subject.facets(variant)

    def judge(spec):
        case = build_batched(spec, session.device)
        routed = case.routed()
        trace = reference_of_batched(case, routed)  # before the subject can write into its inputs
        around = memory_around(case)
        with subject.trace() if traced else nullcontext() as record:
            output = subject.batched(case, variant, case.out)
        with poisoned_allocations():
            own = subject.batched(case, variant, None)
        verdicts = [judge_form(case, output, case.out), judge_form(case, own, None)]
        if not all(verdict.holds for verdict in verdicts):
            return verdicts
        if traced:
            verdicts += judge_launches(case, record, subject.launches.get(variant, {}))
        verdicts += judge_memory(case, around, own, subject.numerics)
        return verdicts + judge_rows(case, routed, own, trace, subject.numerics)

    session.explore(
        batched_specs(session.device, subject.capabilities),
        judge,
        name=f"BATCHED/{variant}",
        variant=variant,
        examples=EXAMPLES,
        pinned=pinned(session.device) if subject.capabilities.empty else (),
        runs=RUNS,
    )


def pinned(device):
    """Always run: slabs without a row, and the largest slabs without a token."""
    hidden, intermediate = POOLS[device].shapes[0]
    return tuple(
        BatchedSpec(max_tokens=rows, H=hidden, I=intermediate, E=3, counts="zero")
        for rows in (0, POOLS[device].slabs[-1])
    )

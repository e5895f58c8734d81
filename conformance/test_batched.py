from contextlib import nullcontext

import pytest

from moegate.conformance.cases import build_batched
from moegate.conformance.coverage import pinned_slabs
from moegate.conformance.properties.batched import (
    judge_form,
    judge_memory,
    judge_path,
    judge_rows,
    memory_around,
    reference_of_batched,
)
from moegate.conformance.properties.hygiene import poisoned_allocations
from moegate.conformance.session import other_order
from moegate.conformance.spec import BatchedSpec
from moegate.conformance.strategies import batched_specs, pools_of

EXAMPLES, RUNS = 80, 2  # into a tensor that is given; then, with poisoned allocations, into the subject's own
pytestmark = [pytest.mark.moegate_facets("batched"), pytest.mark.moegate_executions(EXAMPLES, RUNS)]


PARTS = 4  # of the pinned specs, which xdist's workers share


def judge_of(session, variant):
    """Runs the subject on a spec as every test here does, and gives its verdicts."""
    subject = session.subject
    traced = "trace" in subject.facets(variant)

    def judge(spec):
        case = build_batched(spec, session.device)
        routed = case.routed()
        trace = reference_of_batched(case, routed)  # before the subject can write into its inputs
        around = memory_around(case)
        case = session.prepared(case, variant)
        with subject.trace() if traced else nullcontext() as record:
            output = subject.batched(case, variant, case.out)
        with poisoned_allocations(), other_order():
            own = subject.batched(case, variant, None)
        verdicts = [judge_form(case, output, case.out), judge_form(case, own, None)]
        if not all(verdict.holds for verdict in verdicts):
            return verdicts
        if traced:
            verdicts += judge_path(case, record, variant, subject.launches.get(variant), subject.numerics)
        verdicts += judge_memory(case, around, own, subject.numerics)
        return verdicts + judge_rows(case, routed, own, trace, subject.numerics)

    return judge


def test_each_token_goes_through_its_expert_and_no_other_row_is_touched(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    session.explore(
        batched_specs(session.device, subject.capabilities),
        judge_of(session, variant),
        name=f"BATCHED/{variant}",
        variant=variant,
        examples=EXAMPLES,
        is_value=True,
        pinned=pinned(session.device, subject.capabilities) if subject.capabilities.empty else (),
        runs=RUNS,
    )


@pytest.mark.moegate_executions(24, RUNS)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_declared_features_is_run_in_slabs(moegate_session, moegate_variant, part):
    session, variant, capabilities = moegate_session, moegate_variant, moegate_session.subject.capabilities
    session.explore(
        batched_specs(session.device, capabilities),
        judge_of(session, variant),
        name=f"BATCHED-PAIRS/{variant}/{part}",
        variant=variant,
        examples=1,
        pinned=pinned_slabs(session.device, capabilities)[part::PARTS],
        runs=RUNS,
    )


def pinned(device, capabilities):
    """Always run: slabs without a row, and the largest slabs without a token."""
    pools = pools_of(device, capabilities)
    hidden, intermediate = pools.shapes[0]
    return tuple(
        BatchedSpec(max_tokens=rows, H=hidden, I=intermediate, E=3, counts="zero") for rows in (0, pools.slabs[-1])
    )

from dataclasses import replace
from functools import partial

import pytest

from moegate.conformance.cases import build_experts
from moegate.conformance.properties.meta import LAWS
from moegate.conformance.properties.num import budget_of, reference_of
from moegate.conformance.session import form_as_verdict
from moegate.conformance.strategies import MEAN_ROWS, POOLS, experts_specs

pytestmark = pytest.mark.moegate_facets("experts")


def of_one_size(pools, spec):
    """The spec with the pools' first shape, and with so few tokens that implementations have one size of blocks."""
    hidden, intermediate = pools.shapes[0]
    return replace(spec, H=hidden, I=intermediate, M=min(spec.M, max(1, MEAN_ROWS * spec.E // spec.top_k)))


@pytest.mark.parametrize(
    "law",
    [
        pytest.param(law, id=law.property.id, marks=pytest.mark.moegate_executions(law.examples, law.runs))
        for law in LAWS
    ],
)
def test_two_calls_are_related_as_the_law_says(moegate_session, moegate_variant, law):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    if not law.property.needs(subject.capabilities):
        pytest.skip(f"{subject.name} does not declare what {law.property.id} needs")

    def run(case):
        return session.run_experts(session.prepared(case, variant), variant)

    def judge(spec):
        spec = law.adapt(spec)  # drawn ones are adapted already, but a replayed one may be another law's
        if not law.applies(spec):
            pytest.skip(f"{law.property.id} says nothing of {spec!r}")
        case = build_experts(spec, session.device)
        trace = reference_of(case)  # before the subject can write into its inputs
        with form_as_verdict() as verdicts:
            output = run(case).clone()
            budget = budget_of(case, trace, subject.numerics)
            verdict = law.judge(case, output, trace, budget, subject.numerics, run)
            verdicts.append(verdict)
        return verdicts

    can, pools = subject.capabilities, POOLS[session.device]
    drawn = experts_specs(session.device, can)
    if law.is_of_ids and pools.is_compiled:
        routings = tuple(routing for routing in can.routings if not routing.startswith("tile")) or can.routings
        can = replace(can, schemes=can.schemes[:1], activations=can.activations[:1], routings=routings)
        drawn = experts_specs(session.device, can, dtypes=can.dtypes[:1]).map(partial(of_one_size, pools))
    session.explore(
        drawn.map(law.adapt).filter(law.applies),
        judge,
        name=f"{law.property.id}/{variant}",
        variant=variant,
        examples=law.examples,
        is_value=True,
        runs=law.runs,
    )

from dataclasses import replace

import pytest

from moegate.conformance.cases import build_experts
from moegate.conformance.properties.meta import LAWS
from moegate.conformance.properties.num import budget_of, reference_of
from moegate.conformance.session import form_as_verdict
from moegate.conformance.strategies import POOLS, experts_specs

pytestmark = pytest.mark.moegate_facets("experts")


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

    can, dtypes = subject.capabilities, None
    if law.is_of_ids and POOLS[session.device].is_compiled:
        can, dtypes = replace(can, schemes=can.schemes[:1], activations=can.activations[:1]), can.dtypes[:1]
    session.explore(
        experts_specs(session.device, can, dtypes=dtypes).map(law.adapt).filter(law.applies),
        judge,
        name=f"{law.property.id}/{variant}",
        variant=variant,
        examples=law.examples,
        is_value=True,
        runs=law.runs,
    )

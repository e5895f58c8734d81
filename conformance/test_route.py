import pytest

from moegate.conformance.cases import build_routing
from moegate.conformance.properties.hygiene import judge_inputs, poisoned_allocations
from moegate.conformance.properties.route import judge_routing
from moegate.conformance.properties.route_laws import LAWS
from moegate.conformance.strategies import pinned_routings, routing_specs

EXAMPLES = 240
LAW_EXAMPLES = 60
pytestmark = pytest.mark.moegate_facets("route")


@pytest.mark.moegate_executions(EXAMPLES, 1)
def test_routing_chooses_the_top_experts_with_their_weights(moegate_session, moegate_variant):
    session, variant, capabilities = moegate_session, moegate_variant, moegate_session.subject.capabilities

    def judge(spec):
        case = build_routing(spec, session.device)
        with poisoned_allocations():
            weights, ids = session.subject.route(case, variant)
        return [*judge_routing(case, weights, ids), judge_inputs(case.arena, "route")]

    session.explore(
        routing_specs(session.device, capabilities),
        judge,
        name=f"ROUTE/{variant}",
        variant=variant,
        examples=EXAMPLES,
        pinned=pinned_routings(session.device, capabilities),
    )


@pytest.mark.parametrize(
    "law",
    [pytest.param(law, id=law.property.id, marks=pytest.mark.moegate_executions(LAW_EXAMPLES, 2)) for law in LAWS],
)
def test_two_routings_that_say_the_same_give_the_same(moegate_session, moegate_variant, law):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    if not law.property.needs(subject.capabilities):
        pytest.skip(f"{subject.name} does not declare what {law.property.id} needs")

    def adapted(spec):
        return law.adapt(spec, subject.capabilities)

    def run(case):
        with poisoned_allocations():
            return subject.route(case, variant)

    def judge(spec):
        spec = adapted(spec)  # drawn ones are adapted already, but a replayed one may be another law's
        if not law.applies(spec):
            pytest.skip(f"{law.property.id} says nothing of {spec!r}")
        return [law.judge(build_routing(spec, session.device), spec, subject.capabilities, run)]

    session.explore(
        routing_specs(session.device, subject.capabilities).map(adapted).filter(law.applies),
        judge,
        name=f"{law.property.id}/{variant}",
        variant=variant,
        examples=LAW_EXAMPLES,
        runs=2,
    )

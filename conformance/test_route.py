import pytest

from moegate.conformance.cases import build_routing
from moegate.conformance.properties.hygiene import judge_inputs, poisoned_allocations
from moegate.conformance.properties.route import judge_routing
from moegate.conformance.strategies import routing_specs

EXAMPLES = 200
pytestmark = [pytest.mark.moegate_facets("route"), pytest.mark.moegate_executions(EXAMPLES, 1)]


def test_routing_chooses_the_top_experts_with_their_softmax_weights(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant

    def judge(spec):
        case = build_routing(spec, session.device)
        with poisoned_allocations():
            weights, ids = session.subject.route(case, variant)
        return [*judge_routing(case, weights, ids), judge_inputs(case.arena, "route")]

    session.explore(
        routing_specs(session.device, session.subject.capabilities),
        judge,
        name=f"ROUTE/{variant}",
        variant=variant,
        examples=EXAMPLES,
    )

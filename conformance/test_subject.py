from dataclasses import replace

import pytest

from moegate.conformance.cases import build_experts
from moegate.conformance.properties.num import budget_of, reference_of
from moegate.conformance.properties.subject import judge_state
from moegate.conformance.session import form_as_verdict
from moegate.conformance.strategies import experts_specs

EXAMPLES, RUNS = 10, 4
pytestmark = [pytest.mark.moegate_facets("experts"), pytest.mark.moegate_executions(EXAMPLES, RUNS)]


def test_a_call_keeps_nothing_for_the_next(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant

    def judge(spec):
        case = build_experts(spec, session.device)
        budget = budget_of(case, reference_of(case), session.subject.numerics)
        with form_as_verdict() as verdicts:
            used = session.fresh()
            for other in (101, 102):
                before = build_experts(replace(spec, seed=(spec.seed + other) % 256), session.device)
                used.run_experts(used.prepared(before, variant), variant)
            output = used.run_experts(used.prepared(case, variant), variant).clone()
            alone = session.fresh()
            untouched = build_experts(spec, session.device)  # the operands, too
            fresh = alone.run_experts(alone.prepared(untouched, variant), variant)
            verdicts.append(judge_state(output, fresh, budget, session.subject.numerics))
        return verdicts

    session.explore(
        # A layer that is called again and again, as models call theirs.
        experts_specs(session.device, session.subject.capabilities).filter(lambda spec: spec.M > 0),
        judge,
        name=f"STATE/{variant}",
        variant=variant,
        examples=EXAMPLES,
        runs=RUNS,
    )

import pytest

from moegate.conformance.cases import build_align
from moegate.conformance.properties.align import judge_alignment
from moegate.conformance.properties.hygiene import judge_inputs, poisoned_allocations
from moegate.conformance.strategies import align_specs, pinned_aligns

EXAMPLES = 150
pytestmark = [pytest.mark.moegate_facets("align"), pytest.mark.moegate_executions(EXAMPLES, 1)]


def test_alignment_puts_every_routed_pair_into_one_block_of_its_expert(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant

    def judge(spec):
        case = build_align(spec, session.device)
        with poisoned_allocations():
            results = session.subject.align(case, variant)
        return [*judge_alignment(case, *results), judge_inputs(case.arena, "align")]

    session.explore(
        align_specs(session.device, session.subject.capabilities),
        judge,
        name=f"ALIGN/{variant}",
        variant=variant,
        examples=EXAMPLES,
        pinned=pinned_aligns(session.device, session.subject.capabilities),
    )

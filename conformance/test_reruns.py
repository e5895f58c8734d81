import pytest

from moegate.conformance.cases import build_batched, build_experts, build_routing
from moegate.conformance.reruns import CASES, fixed_cases, judge_reruns, reruns_asked

PARTS = 4  # of the experts' cases, which xdist's workers share


def rerun(session, variant, facet, call, part=0, parts=1):
    """Judge the fixed cases of a facet; `call(spec)` gives what makes the call and returns its tensors."""
    subject, times = session.subject, reruns_asked()
    if not subject.numerics.repeatable:
        pytest.skip(f"{subject.name} does not declare that the same call gives the same bits")
    session.explore(
        None,
        lambda spec: [judge_reruns(call(spec), times, session.ledger.facts)],
        name=f"RERUNS/{facet}",
        variant=variant,
        examples=0,
        pinned=fixed_cases(facet, session.device, subject.capabilities)[part::parts],
        runs=times + 1,
    )


@pytest.mark.moegate_facets("experts")
@pytest.mark.moegate_reruns(CASES["experts"] // PARTS)
@pytest.mark.parametrize("part", range(PARTS))
def test_experts_give_the_same_bits_every_time(moegate_session, moegate_variant, part):
    session, variant = moegate_session, moegate_variant

    def call(spec):
        case = session.prepared(build_experts(spec, session.device), variant)
        return lambda: (session.subject.experts(case, variant),)

    rerun(session, variant, "experts", call, part, PARTS)


@pytest.mark.moegate_facets("batched")
@pytest.mark.moegate_reruns(CASES["batched"])
def test_slabs_give_the_same_bits_every_time(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant

    def call(spec):
        case = session.prepared(build_batched(spec, session.device), variant)
        return lambda: (session.subject.batched(case, variant, None)[case.is_token],)

    rerun(session, variant, "batched", call)


@pytest.mark.moegate_facets("route")
@pytest.mark.moegate_reruns(CASES["route"])
def test_routing_gives_the_same_bits_every_time(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant

    def call(spec):
        case = build_routing(spec, session.device)
        return lambda: session.subject.route(case, variant)

    rerun(session, variant, "route", call)

"""A suite that accepts a kernel that computes nothing is worth nothing: every value property rejects each of them."""

import random

import pytest

from moegate.conformance.calibrate import drawn_spec
from moegate.conformance.calibration import KINDS
from moegate.conformance.cases import build_experts, build_routing
from moegate.conformance.judge import PROPERTIES
from moegate.conformance.properties.meta import LAWS
from moegate.conformance.properties.num import budget_of, judge_values, reference_of
from moegate.conformance.properties.route import judge_routing
from moegate.conformance.spec import RoutingSpec
from moegate.conformance.statistics import statistics
from moegate.conformance.subjects.null import NULL_KERNELS, MeanOfExperts, Zeros

CASES = 120


def _specs():
    rng = random.Random(2026)
    return [drawn_spec(rng, kind=KINDS[number % 2], devices=("cpu",)) for number in range(CASES)]


def _is_the_answer(null_kernel, case, output, trace, budget):
    """Whether the null kernel is right: all is zero within the plain budget, or the mean is that of a single expert."""
    if null_kernel is MeanOfExperts and case.w13.shape[0] == 1:
        return True
    measured = statistics(output, trace, budget, case.operands().w2)
    return bool((measured.elementwise <= 1).all() and (measured.row_rms <= 1).all())


@pytest.mark.parametrize("null_kernel", NULL_KERNELS, ids=lambda cls: cls.name)
def test_every_value_property_of_the_experts_rejects_a_null_kernel_on_every_case(null_kernel):
    subject = null_kernel()
    value_properties = {"NUM-01", "NUM-02", "NUM-03", "NUM-04"}
    judged = dict.fromkeys(value_properties, 0)
    for spec in _specs():
        case = build_experts(spec)
        output = subject.experts(case, "default")
        trace = reference_of(case)
        budget = budget_of(case, trace, subject.numerics)
        if _is_the_answer(null_kernel, case, output, trace, budget):
            continue
        for verdict in judge_values(case, output, trace, budget):
            if verdict.property.id in value_properties:
                judged[verdict.property.id] += 1
                assert not verdict.holds, f"{verdict.property.id} accepts {null_kernel.name} on {spec!r}"
    assert min(judged.values()) > CASES / 2


def test_the_value_properties_judged_here_are_all_that_there_are():
    laws = {law.property.id for law in LAWS if law.property.is_value}
    assert {p.id for p in PROPERTIES.values() if p.is_value} == {
        "NUM-01",
        "NUM-02",
        "NUM-03",
        "NUM-04",
        "ROUTE-06",
        "ROUTE-08",
        *laws,
    }


@pytest.mark.parametrize("logits", ["unit", "wide", "ties", "negative"])
def test_routing_without_weights_is_rejected_by_both_properties_of_weights(logits):
    for seed in range(20):
        case = build_routing(RoutingSpec(M=3, E=16, top_k=4, logits=logits, seed=seed))
        weights, ids = Zeros().route(case, "default")
        ids = case.router_logits.sort(dim=-1, descending=True, stable=True).indices[:, :4].int()
        holds = {v.property.id: v.holds for v in judge_routing(case, weights, ids)}
        assert not holds["ROUTE-06"]
        assert not holds["ROUTE-08"]


@pytest.mark.parametrize("law", [law for law in LAWS if law.property.is_value], ids=lambda law: law.property.id)
@pytest.mark.parametrize("null_kernel", [c for c in NULL_KERNELS if c is not Zeros], ids=lambda cls: cls.name)
def test_laws_about_values_reject_null_kernels_that_are_not_zero(law, null_kernel):
    subject = null_kernel()
    judged = 0
    for spec in map(law.adapt, _specs()[:60]):
        if not law.applies(spec):
            continue
        case = build_experts(spec)
        trace = reference_of(case)
        budget = budget_of(case, trace, subject.numerics)
        output = subject.experts(case, "default")
        if _is_the_answer(null_kernel, case, output, trace, budget):
            continue
        verdict = law.judge(case, output, trace, budget, subject.numerics, lambda c: subject.experts(c, "default"))
        judged += 1
        assert not verdict.holds, f"{law.property.id} accepts {null_kernel.name} on {spec!r}"
    assert judged > 10

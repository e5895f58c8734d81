"""A suite that accepts a kernel that computes nothing is worth nothing: every value property rejects each of them."""

import random
from collections import Counter

import pytest

from moegate.conformance.calibrate import drawn_spec
from moegate.conformance.calibration import KINDS
from moegate.conformance.cases import build_experts, build_routing
from moegate.conformance.catalogue import PROPERTIES
from moegate.conformance.properties.meta import LAWS
from moegate.conformance.properties.num import budget_of, judge_values, reference_of
from moegate.conformance.properties.route import allowed_weight_error, judge_routing, truth_of
from moegate.conformance.properties.route_laws import LAWS as ROUTING_LAWS
from moegate.conformance.statistics import statistics
from moegate.conformance.strategies import pinned_routings
from moegate.conformance.subject import ROUTING_METHODS, Capabilities
from moegate.conformance.subjects.null import NULL_KERNELS, MeanOfExperts, Zeros
from moegate.reference.routing import route

CASES = 120
EVERY_ROUTING = Capabilities(**ROUTING_METHODS)


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
    # The mean is the answer, and no fault, wherever a rank holds one expert: about half of what is drawn.
    assert min(judged.values()) > 0.4 * CASES


def test_the_value_properties_judged_here_are_all_that_there_are():
    laws = {law.property.id for law in LAWS if law.property.is_value}
    assert {p.id for p in PROPERTIES.values() if p.is_value} == {
        "NUM-01",
        "NUM-02",
        "NUM-03",
        "NUM-04",
        "ROUTE-06",
        "ROUTE-08",
        "ROUTE-11",
        "SHARED-13",  # test_shared_values.py rejects null kernels by these
        "SHARED-14",
        "GRAPH-04",  # so does test_graph_properties.py
        "LORA-02",  # and test_lora.py
        "EP-01",  # test_parallel_values.py by these
        "EP-02",
        "EP-12",
        "EP-15",
        "EP-16",
        *(law.property.id for law in ROUTING_LAWS),
        *laws,
    }


def _routings():
    """Specs with an answer that is not zero, and the case of each."""
    for spec in pinned_routings("cpu", EVERY_ROUTING):
        if spec.padding != "all_tokens" and spec.logits not in ("nan_rows", "infinite_rows"):
            yield spec, build_routing(spec)


def test_routing_without_weights_is_rejected_by_every_property_of_weights():
    judged = Counter()
    for spec, case in _routings():
        weights, ids = Zeros().route(case, "default")
        if case.custom_answer is not None:
            ids = case.custom_answer[1].clone()
        else:
            method = {name: value for name, value in case.method().items() if value is not None}
            ids = route(case.router_logits, case.top_k, **method)[1]
        ids[case.num_real_tokens :] = -1
        holds = {v.property.id: v.holds for v in judge_routing(case, weights, ids)}
        for id in ("ROUTE-06", "ROUTE-08", "ROUTE-11"):
            judged[id] += id in holds
            # A weight that underflows in float32 is zero within its budget.
            assert not holds.get(id, False) or _is_zero_within_budget(case, ids), f"{id} accepts no weights on {spec!r}"
    assert min(judged[id] for id in ("ROUTE-06", "ROUTE-08", "ROUTE-11")) > 5


def _is_zero_within_budget(case, ids):
    real = ids[: case.num_real_tokens].long()
    weights = route(case.router_logits, case.top_k, **{k: v for k, v in case.method().items() if v is not None})[0]
    allowed = allowed_weight_error(case, truth_of(case), real)
    return bool((weights[: case.num_real_tokens] <= allowed).all())


@pytest.mark.parametrize("law", ROUTING_LAWS, ids=lambda law: law.property.id)
def test_laws_of_routing_reject_routing_without_weights(law):
    judged = 0
    for spec, _ in _routings():
        spec = law.adapt(spec, EVERY_ROUTING)
        if not law.applies(spec):
            continue
        case = build_routing(spec)
        verdict = law.judge(case, spec, EVERY_ROUTING, lambda c: Zeros().route(c, "default"))
        judged += 1
        assert not verdict.holds, f"{law.property.id} accepts {Zeros.name} on {spec!r}"
    assert judged > 10


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

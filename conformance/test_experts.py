from dataclasses import replace

import pytest

from moegate.conformance.cases import build_experts
from moegate.conformance.coverage import pinned_experts
from moegate.conformance.properties.hygiene import judge_form, judge_hygiene
from moegate.conformance.properties.num import budget_of, judge_values, reference_of
from moegate.conformance.properties.path import judge_path
from moegate.conformance.session import form_as_verdict, other_order
from moegate.conformance.spec import DTYPES, ExpertsSpec
from moegate.conformance.strategies import WIDE, experts_specs, is_declared, pools_of

EXAMPLES, RUNS = 60, 2  # each case runs twice: with poisoned allocations and without
PARTS = 6  # of the pinned specs, which xdist's workers share
pytestmark = [pytest.mark.moegate_facets("experts"), pytest.mark.moegate_executions(EXAMPLES, RUNS)]


def pinned(device, capabilities, low_latency, dtype):
    """Always run, whatever is drawn: the smallest case, no token, each way for a token to have no expert."""
    pools = pools_of(device, capabilities)
    hidden, intermediate = pools.shapes[0]
    experts = pools.many_experts[-1 if device == "cpu" else 0]
    base = ExpertsSpec(M=1, H=hidden, I=intermediate, E=experts, top_k=min(pools.top_k, experts // 4), dtype=dtype)
    # A softmax over one choice is 1, which shows nothing.
    uneven = next((name for name in capabilities.weights if name in ("spread", "scaled")), base.weights)
    weighted = replace(base, top_k=1, weights=uneven, weight_on_input=True)
    if low_latency:
        # Two numbers of tokens: a subject may have several kernels for few pairs, and tell them apart by it.
        on_input = (replace(weighted, M=tokens) for tokens in (2, 3))
        return (base, replace(base, routing="all_invalid"), *(spec for spec in on_input if 4 * spec.M <= spec.E))
    # Rows wider than any kernel's block, whose scale is found in several steps, in either of which the largest may lie.
    wide = replace(base, M=9, H=40, I=WIDE + WIDE // 2, E=2, top_k=1, scheme="fp8_channel_token", values="spread")
    static = replace(wide, M=1, I=WIDE, scheme="fp8_tensor_static", values="unit")
    # Blocks so narrow that a step of them is shorter than the tensor cores' for bytes.
    narrow = replace(base, M=17, H=96, I=48, E=4, top_k=2, scheme="fp8_block", block_n=16, block_k=16)
    # So many choices that adding them up in fewer bits than float32 shows.
    many = replace(base, M=4, E=40, top_k=32)
    return (
        *((wide, static, narrow, many) if dtype == "bfloat16" else ()),
        replace(base, M=base.E // (4 * base.top_k) + 1),  # just over the threshold of naive blocks
        replace(base, M=0, E=8, top_k=2),
        replace(base, expert_map="linear"),
        replace(base, M=17, E=5, top_k=3, expert_map="owns_nothing"),
        replace(weighted, M=33, E=2, routing="tile_plus_1"),
    )


def judge_of(session, variant):
    """Runs the subject on a spec as every test here does, and gives its verdicts."""
    subject = session.subject
    traced = "trace" in subject.facets(variant)

    def judge(spec):
        case = build_experts(spec, session.device)
        trace = reference_of(case)  # before the subject can write into its inputs
        case = session.prepared(case, variant)
        with form_as_verdict() as verdicts:
            if traced:
                with subject.trace() as record:
                    output = session.run_experts(case, variant)
                verdicts += judge_path(case, record, variant, subject.launches.get(variant), subject.numerics)
            else:
                output = session.run_experts(case, variant)
            verdicts.append(judge_form(case, output))
            verdicts += judge_values(case, output.clone(), trace, budget_of(case, trace, subject.numerics))
            if session.suffices(verdicts):
                return verdicts
            with other_order():
                again = subject.experts(case, variant)
            verdicts += judge_hygiene(case, output, again, subject.numerics)
        return verdicts

    return judge


@pytest.mark.parametrize("low_latency", [True, False], ids=["few_pairs", "many_pairs"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_stay_within_budget_on_the_path_of_the_table(moegate_session, moegate_variant, dtype, low_latency):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    if dtype not in subject.capabilities.dtypes:
        pytest.skip(f"{subject.name} does not declare {dtype}")
    session.explore(
        experts_specs(session.device, subject.capabilities, dtypes=(dtype,), low_latency=low_latency),
        judge_of(session, variant),
        name=f"NUM/{variant}/{dtype}/{low_latency}",
        variant=variant,
        examples=EXAMPLES,
        is_value=True,
        pinned=tuple(
            spec
            for spec in pinned(session.device, subject.capabilities, low_latency, dtype)
            if is_declared(spec, subject.capabilities)
        ),
        runs=RUNS,
    )


@pytest.mark.moegate_executions(24, RUNS)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_declared_features_is_run(moegate_session, moegate_variant, part):
    session, variant, capabilities = moegate_session, moegate_variant, moegate_session.subject.capabilities
    session.explore(
        experts_specs(session.device, capabilities),
        judge_of(session, variant),
        name=f"PAIRS/{variant}/{part}",
        variant=variant,
        examples=1,
        pinned=pinned_experts(session.device, capabilities)[part::PARTS],
        runs=RUNS,
    )

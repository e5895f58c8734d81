"""What EP judges of numbers rejects ranks that compute nothing, one of them alone too."""

from dataclasses import replace

import pytest
import torch

from moegate.conformance.loading import load_subject
from moegate.conformance.parallel_cases import build_parallel, pinned_parallel
from moegate.conformance.properties.ep import judge_shared, judge_travel, judge_values
from moegate.conformance.simulated_ranks import run_simulated
from moegate.conformance.subjects.null import NULL_KERNELS

SUBJECT = load_subject("moegate")
SPECS = [
    spec
    for spec in pinned_parallel("cpu", SUBJECT.capabilities, batched=False)[::9]
    if spec.M and spec.routing == "uniform"
]


def results_of(case):
    outcomes = run_simulated(case.spec.world_size, lambda rank, links: SUBJECT.parallel(case, links, "cpu", fails=None))
    return [outcome.result for outcome in outcomes]


def verdicts_of(case, results):
    summed = SUBJECT.partial_sums[case.spec.exchange]
    return {v.property.id: v.holds for v in judge_values(case, results, SUBJECT.numerics, summed)}


@pytest.fixture(scope="module")
def honest():
    return [(build_parallel(spec), results_of(build_parallel(spec))) for spec in SPECS]


@pytest.mark.parametrize("null_kernel", NULL_KERNELS, ids=lambda cls: cls.name)
def test_ranks_that_compute_nothing_are_rejected_on_every_case(null_kernel, honest):
    subject, judged = null_kernel(), 0
    for case, results in honest:
        subject.experts(build_parallel(replace(case.spec, seed=case.spec.seed + 1)).routed, "default")
        nothing = subject.experts(case.routed, "default")
        if subject.name == "null:mean" and case.spec.E == 1:
            continue
        outputs = []
        for rank, result in enumerate(results):
            tokens = case.spec.tokens_of(rank)
            outputs.append(replace(result, output=nothing[tokens.start : tokens.stop]))
        assert not verdicts_of(case, outputs)["EP-01"], case.spec
        judged += 1
        if case.shared is not None:
            assert not any(v.holds for v in judge_shared(case, outputs, SUBJECT.numerics)), case.spec
    assert judged > 5


@pytest.mark.parametrize("factor", [0.0, 1.03, -1.0, 2.0])
def test_one_rank_that_is_off_cannot_hide_behind_the_others(factor, honest):
    judged = 0
    for case, results in honest:
        assert all(verdicts_of(case, results).values())
        # Of activations in few bits 3 % lie within the roundings, and of few pairs.
        if factor == 1.03 and case.spec.scheme != "none":
            continue
        for rank, result in enumerate(results):
            if int((result.local_ids >= 0).sum()) < 8:
                continue
            off = [*results]
            off[rank] = replace(result, partial=(result.partial.float() * factor).to(result.partial.dtype))
            assert not verdicts_of(case, off)["EP-02"], (case.spec, rank)
            judged += 1
    assert judged > 10


def test_shared_experts_that_are_counted_twice_are_rejected(honest):
    judged = 0
    for case, _ in honest:
        if case.shared is None:
            continue
        zeroed = replace(case, routed=replace(case.routed, topk_weights=torch.zeros_like(case.routed.topk_weights)))
        results = results_of(zeroed)
        assert all(v.holds for v in judge_shared(zeroed, results, SUBJECT.numerics))
        twice = [replace(result, output=2 * result.output) for result in results]
        assert not any(v.holds for v in judge_shared(zeroed, twice, SUBJECT.numerics))
        judged += 1
    assert judged > 3


def test_a_pair_that_nobody_or_everybody_computes_is_rejected(honest):
    for case, results in honest[:10]:
        rank = next(r for r, result in enumerate(results) if bool((result.local_ids >= 0).any()))
        row, slot = (results[rank].local_ids >= 0).nonzero()[0].tolist()
        lost = results[rank].local_ids.clone()
        lost[row, slot] = -1
        changed = [*results]
        changed[rank] = replace(results[rank], local_ids=lost)
        holds = {v.property.id: v.holds for v in judge_travel(case, changed)}
        assert not holds["EP-03"]
        assert all(v.holds for v in judge_travel(case, results))

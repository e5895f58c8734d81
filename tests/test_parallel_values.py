"""What EP judges of numbers rejects ranks that compute nothing, one of them alone too."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moegate.conformance import test_ep
from moegate.conformance.loading import load_subject
from moegate.conformance.parallel_cases import build_parallel, is_possible, parallel_specs, pinned_parallel
from moegate.conformance.properties.ep import judge_base, judge_shared, judge_travel, judge_values
from moegate.conformance.simulated_ranks import run_simulated
from moegate.conformance.strategies import MEAN_ROWS
from moegate.conformance.subjects import moegate_parallel
from moegate.conformance.subjects.null import NULL_KERNELS
from moegate.impl.lora.table import AdapterTable

SUBJECT = load_subject("moegate")
SPECS = [
    spec
    for spec in pinned_parallel("cpu", SUBJECT.capabilities, batched=False)[::9]
    if spec.M and spec.routing == "uniform"
]


def specs_of(world_size):
    return parallel_specs("cuda", SUBJECT.capabilities, batched=True, world_size=world_size)


def results_of(case):
    outcomes = run_simulated(case.spec.world_size, lambda rank, links: SUBJECT.parallel(case, links, "cpu", fails=None))
    return [outcome.result for outcome in outcomes]


def of_whole(case):
    return "EP-15" if case.spec.fully_sharded else "EP-01"


def of_part(case):
    return "EP-16" if case.spec.fully_sharded else "EP-02"


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
        assert not verdicts_of(case, outputs)[of_whole(case)], case.spec
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
            assert not verdicts_of(case, off)[of_part(case)], (case.spec, rank)
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


ADAPTED = [
    spec
    for spec in pinned_parallel("cpu", SUBJECT.capabilities, batched=False)
    if spec.adapters == "mixed" and spec.tokens == "mixed" and spec.placement in ("linear", "copies")
]


def load_for_the_next_expert(table, adapter, slot=None):
    def moved(part):
        return {(expert + 1) % table.num_experts: low_rank for expert, low_rank in part.items()}

    parts = {name: moved(getattr(adapter, name)) for name in ("gate", "up", "gate_up", "down")}
    return AdapterTable.load(table, replace(adapter, **parts), slot)


@pytest.mark.parametrize("spec", ADAPTED, ids=lambda spec: f"{spec.exchange}-{spec.scheme}")
def test_what_is_wrong_with_adapters_on_ranks_is_rejected(spec, monkeypatch):
    case = build_parallel(spec)
    results = results_of(case)
    assert all(verdicts_of(case, results).values())
    bare = results_of(build_parallel(replace(spec, adapters="none")))
    assert judge_base(case, results, bare).holds
    # Adapters that reach nobody, those of another expert, and those of a token's neighbour.
    without = [replace(result, partial=base.partial) for result, base in zip(results, bare, strict=True)]
    assert not verdicts_of(case, without)["EP-02"]
    assert not verdicts_of(case, [replace(r, output=base.output) for r, base in zip(results, bare, strict=True)])[
        "EP-01"
    ]
    with monkeypatch.context() as planted:
        planted.setattr(
            moegate_parallel, "AdapterTable", type("Planted", (AdapterTable,), {"load": load_for_the_next_expert})
        )
        assert not verdicts_of(case, results_of(case))["EP-02"]
    rolled = [replace(r, lora_ids=r.lora_ids.roll(1)) for r in results]
    assert not {v.property.id: v.holds for v in judge_travel(case, rolled)}["EP-04"]
    # A token without an adapter that gets a bit of one.
    stray = [replace(r, output=r.output * 1.01) for r in results]
    assert not judge_base(case, stray, bare).holds


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


def test_processes_are_started_by_the_tests_that_bear_the_marker_of_ranks():
    marks = {name: getattr(test, "pytestmark", ()) for name, test in vars(test_ep).items() if name.startswith("test_")}
    marked = [name for name, of_test in marks.items() if "moegate_ranks" in [mark.name for mark in of_test]]
    assert marked == ["test_processes_make_the_layer_of_one"]


@pytest.mark.parametrize(("gpus", "sizes"), [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 3, 4, 8])])
def test_on_gpus_there_are_ranks_of_every_size_up_to_four_and_of_all_gpus(monkeypatch, gpus, sizes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert test_ep.groups("cuda") == [("nccl", size) for size in sizes]


@given(st.sampled_from((2, 3, 4, 5, 6, 8)).flatmap(lambda n: st.tuples(st.just(n), specs_of(n))))
@settings(max_examples=60, deadline=None, database=None)
def test_cases_are_drawn_for_any_number_of_ranks(drawn):
    size, spec = drawn
    assert spec.world_size == size
    assert is_possible(spec)


def test_adapters_on_ranks_meet_one_size_of_blocks_on_a_gpu_and_no_mesh_placement_or_split_is_lost():
    def of(device):
        return [s for s in pinned_parallel(device, SUBJECT.capabilities, batched=True) if s.adapters != "none"]

    on_gpu = of("cuda")
    for spec in on_gpu:
        assert spec.M <= 1 or spec.dp * spec.max_tokens * spec.top_k <= MEAN_ROWS * spec.E, spec
    for name in ("exchange", "placement", "split", "adapted", "tokens", "fully_sharded"):
        assert {getattr(spec, name) for spec in on_gpu} == {getattr(spec, name) for spec in of("cpu")}, name
    assert {(s.tp, s.dp, s.ep) for s in on_gpu} == {(s.tp, s.dp, s.ep) for s in of("cpu")}

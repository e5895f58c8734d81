from dataclasses import replace

import pytest
import torch

from moegate.conformance.parallel_cases import build_parallel, parallel_specs, pinned_parallel
from moegate.conformance.properties.ep import (
    judge_again,
    judge_base,
    judge_meeting,
    judge_memory,
    judge_raised,
    judge_shared,
    judge_slices,
    judge_small_products,
    judge_travel,
    judge_values,
)
from moegate.conformance.properties.hygiene import poisoned_allocations
from moegate.conformance.real_ranks import rank_processes
from moegate.conformance.selection import SELECTION
from moegate.conformance.simulated_ranks import run_simulated

# Exchanges are the same whatever computes the experts, so the fastest variant has most of the cases.
EXAMPLES, FEWER, RUNS = 240, 20, 3  # each poisoned, again, and without routed weights or adapters
ON_A_GPU = 80  # every size of a rank's part is a kernel to compile
pytestmark = pytest.mark.moegate_facets("parallel")


def without_routed_weights(case):
    """The same call, of which the shared output alone is left."""
    return replace(case, routed=replace(case.routed, topk_weights=torch.zeros_like(case.routed.topk_weights)))


def judge_of(session, run):
    """Verdicts on a spec, of which `run(case)` gives the ranks' outcomes; they are judged on the CPU."""
    subject = session.subject

    def judge(spec):
        verdicts = []

        def results_of(case):
            """What the ranks make of it; none where a rank raises, which is a verdict."""
            outcomes = run(case)
            raised = any(outcome.error is not None for outcome in outcomes)
            verdicts.extend(judge_meeting(outcomes) if raised else [])
            return None if raised else [outcome.result.on_cpu() for outcome in outcomes]

        case, judged = build_parallel(spec, session.device), build_parallel(spec)
        with poisoned_allocations():
            outcomes = run(case)
        verdicts += judge_meeting(outcomes)
        if any(outcome.error is not None for outcome in outcomes):
            return verdicts
        results = [outcome.result.on_cpu() for outcome in outcomes]
        verdicts += judge_small_products(judged, outcomes)
        verdicts += [judge_memory(case, results), *judge_travel(judged, results), *judge_slices(judged, results)]
        verdicts += judge_values(judged, results, subject.numerics, subject.partial_sums[spec.exchange])
        if session.suffices(verdicts):
            return verdicts
        if subject.numerics.repeatable and (again := results_of(case)):
            verdicts.append(judge_again(results, again))
        plain = replace(spec, adapters="none")
        if spec != plain and (base := results_of(build_parallel(plain, session.device))):
            verdicts.append(judge_base(judged, results, base))
        if spec.shared != "none" and (shared := results_of(without_routed_weights(case))):
            verdicts += judge_shared(judged, shared, subject.numerics)
        return verdicts

    return judge


@pytest.mark.moegate_executions(EXAMPLES, RUNS)
def test_simulated_ranks_make_the_layer_of_one(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    batched = "batched" in subject.facets(variant)
    is_last = variant == [v for v in subject.variants if not subject.unavailable(v, session.device)][-1]

    def run(case):
        return run_simulated(
            case.spec.world_size, lambda rank, links: subject.parallel(case, links, variant, fails=None)
        )

    pinned = pinned_parallel(session.device, subject.capabilities, batched=batched)
    if not is_last:  # of adapters, few pairs are another way of kernels; so are many choices of what travels
        few = [spec for spec in pinned if (spec.fully_sharded and spec.M == 2) or spec.top_k > 8]
        pinned = (*pinned[::6], *few)
    session.explore(
        parallel_specs(session.device, subject.capabilities, batched=batched),
        judge_of(session, run),
        name=f"EP/{variant}",
        variant=variant,
        examples=(ON_A_GPU if session.device == "cuda" else EXAMPLES) if is_last else FEWER,
        pinned=pinned,
        runs=RUNS,
    )


@pytest.mark.moegate_executions(10, 1)
def test_where_one_simulated_rank_raises_every_rank_raises(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject

    pinned = pinned_parallel(session.device, subject.capabilities, batched=False)

    def judge(spec):
        case = build_parallel(spec, session.device)
        failing, step = spec.seed % spec.world_size, ("routing", "experts")[spec.seed // 4 % 2]

        def body(rank, links):
            return subject.parallel(case, links, variant, fails=(failing, step))

        outcomes = run_simulated(spec.world_size, body)
        return [judge_raised(outcomes, f"made to raise in {step} on rank {failing}")]

    session.explore(
        parallel_specs(session.device, subject.capabilities, batched=False),
        judge,
        name=f"EP-RAISE/{variant}",
        variant=variant,
        examples=10,
        # Ranks that meet in the midst of their experts, and fail there.
        pinned=tuple(spec for spec in pinned if spec.fully_sharded and spec.seed // 4 % 2)[:2],
    )


def groups(device):
    """(backend, ranks) of the process groups that this machine can start: NCCL wants a GPU for each rank."""
    if device == "cuda":
        most = torch.cuda.device_count()
        return [("nccl", size) for size in sorted({2, 3, 4, most}) if 2 <= size <= most]
    return [("gloo", 4), ("gloo", 2)]


REAL_EXAMPLES = 12


@pytest.mark.moegate_ranks
@pytest.mark.moegate_executions(2 * REAL_EXAMPLES, 2)
def test_processes_make_the_layer_of_one(moegate_session, moegate_variant):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    backends = groups(session.device)
    if not backends:
        pytest.skip("one GPU: process groups of several ranks want one for each")
    if variant == "triton" and session.device == "cpu":
        pytest.skip("the processes and their collectives are the same whatever computes the experts")
    capabilities = subject.capabilities
    pinned = pinned_parallel(session.device, capabilities, batched=False)
    for backend, size in backends:
        with rank_processes(size, backend) as processes:

            def run(case, fails=None, processes=processes):
                spec = case.spec
                return processes.run(
                    "moegate.conformance.rank_body:run_case",
                    SELECTION.subject,
                    variant,
                    repr(spec),
                    session.device,
                    fails,
                )

            def judge(spec, run=run):
                case = build_parallel(spec)
                outcomes = run(case)
                verdicts = judge_meeting(outcomes)
                if any(outcome.error is not None for outcome in outcomes):
                    return verdicts
                results = [outcome.result for outcome in outcomes]
                verdicts += judge_small_products(case, outcomes)
                verdicts += [*judge_travel(case, results), *judge_slices(case, results)]
                verdicts += judge_values(case, results, subject.numerics, subject.partial_sums[spec.exchange])
                if spec.seed % 4 == 0:
                    failing = (spec.seed // 4 % spec.world_size, ("routing", "experts")[spec.seed // 16 % 2])
                    raised = run(case, failing)
                    verdicts.append(judge_raised(raised, f"made to raise in {failing[1]} on rank {failing[0]}"))
                return verdicts

            of_size = [spec for spec in pinned if spec.world_size == size]
            session.explore(
                parallel_specs(session.device, capabilities, batched=False, world_size=size),
                judge,
                name=f"EP-REAL/{variant}/{backend}/{size}",
                variant=variant,
                examples=REAL_EXAMPLES,
                pinned=tuple(spec for number, spec in enumerate(of_size) if number % 3 == 0 or spec.fully_sharded),
                runs=1,
            )

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test

from moegate.conformance.lora_cases import LoraSpec, build_lora, lora_specs, pinned_lora
from moegate.conformance.lora_history import history_of, spec_of
from moegate.conformance.oracle import OracleSpec
from moegate.conformance.profiles import profile, seeded
from moegate.conformance.properties.hygiene import poisoned_allocations
from moegate.conformance.properties.lora import (
    DECISION,
    REPLAYED,
    differing_rows,
    judge_base,
    judge_element,
    judge_memory,
    judge_others,
    judge_reloaded,
    judge_shards,
    judge_slots,
    judge_tokens,
    judge_zero,
    loaded,
    truth_of,
)
from moegate.conformance.properties.lora_api import BAD_ADAPTERS, BAD_IDS, judge_bad_adapter, judge_bad_ids
from moegate.conformance.selection import SELECTION

EXAMPLES, RUNS = 18, 8
PARTS = 4
pytestmark = pytest.mark.moegate_facets("lora")


def judge_of(session, variant):
    """Runs the subject on a spec as every test here does, and gives its verdicts."""
    subject, numerics = session.subject, session.subject.numerics

    def judge(spec):
        case = build_lora(spec, session.device)
        truth = truth_of(case, numerics)  # before the subject can write into its inputs
        make = partial(subject.lora, variant=variant)
        layer = loaded(make, case)
        with poisoned_allocations():
            output = layer.run(case.lora_ids)
        verdicts = judge_element(case, output, truth)
        # Laws of several tables take turns: each of them runs the layer several times.
        laws = (
            lambda: judge_others(case, layer, output),
            lambda: judge_slots(case, make, output),
            lambda: judge_tokens(case, make, truth),
            lambda: judge_shards(case, make, numerics),
            lambda: judge_reloaded(case, make, output),
        )
        of_one_table = (
            lambda: judge_memory(case, output, layer.run(case.lora_ids), numerics),
            lambda: judge_base(case, layer, output),
            lambda: judge_zero(case, layer, output),
        )
        turns = laws if spec.is_batched else (laws[spec.seed % 5], laws[(spec.seed + 2) % 5])
        for law in (*of_one_table, *turns):
            if session.suffices(verdicts):
                break
            verdicts += law()
        return verdicts

    return judge


def _fits(session, variant, spec):
    return not spec.is_batched or "batched" in session.subject.facets(variant)


@pytest.mark.moegate_executions(EXAMPLES, RUNS)
def test_a_row_has_its_own_adapter_and_nothing_else(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant
    session.explore(
        lora_specs(session.device, session.subject.capabilities).filter(partial(_fits, session, variant)),
        judge_of(session, variant),
        name=f"LORA/{variant}",
        variant=variant,
        examples=EXAMPLES,
        is_value=True,
        runs=RUNS,
    )


@pytest.mark.moegate_executions(12, RUNS)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_kind_of_adapter_is_run(moegate_session, moegate_variant, part):
    session, variant = moegate_session, moegate_variant
    specs = pinned_lora(session.device, session.subject.capabilities)
    session.explore(
        lora_specs(session.device, session.subject.capabilities).filter(partial(_fits, session, variant)),
        judge_of(session, variant),
        name=f"LORA-PINNED/{variant}/{part}",
        variant=variant,
        examples=1,
        pinned=tuple(spec for spec in specs if _fits(session, variant, spec))[part::PARTS],
        runs=RUNS,
    )


@pytest.mark.moegate_executions(6, 10)
def test_any_history_of_a_table_ends_in_a_fresh_ones_bits(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant
    if SELECTION.spec is not None:
        pytest.skip("a history is no single case")
    spec = spec_of(session.device)
    case = build_lora(spec, session.device)

    def settle(verdicts):
        session.ledger.executions[variant] += 2
        session.settle(verdicts, spec, session.command())

    machine = seeded(history_of(case, partial(session.subject.lora, variant=variant), settle), "lora history")
    # Steps of a history are drawn one by one: no database keeps them, no blob replays them.
    changes = {"stateful_step_count": 12, "database": None, "print_blob": False}
    run_state_machine_as_test(machine, settings=profile(max_examples=session.examples(6), **changes))


@pytest.mark.parametrize("bad", BAD_ADAPTERS, ids=str)
def test_a_bad_adapter_is_refused_and_the_table_is_as_it_was(moegate_session, moegate_variant, bad):
    session, variant = moegate_session, moegate_variant
    spec = spec_of(session.device)
    case = build_lora(spec, session.device)
    verdicts = judge_bad_adapter(bad, case, partial(session.subject.lora, variant=variant))
    session.settle(verdicts, spec, f"{session.command()} --select '{bad}'")


@pytest.mark.parametrize("bad", BAD_IDS)
def test_an_id_that_is_no_slot_is_refused(moegate_session, moegate_variant, bad):
    session, variant = moegate_session, moegate_variant
    spec = spec_of(session.device)
    case = build_lora(spec, session.device)
    verdicts = judge_bad_ids(bad, case, partial(session.subject.lora, variant=variant))
    session.settle(verdicts, spec, session.command())


@pytest.mark.moegate_facets("lora", "oracle")
@pytest.mark.parametrize("scheme", ["none", "fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16"])
def test_the_oracle_takes_triton_for_adapters(moegate_session, moegate_variant, scheme):
    session = moegate_session
    block = (0, 128) if scheme == "int4_w4a16" else None
    oracle = session.subject.oracle()
    for platform in ("cuda:8.0", "cuda:9.0", "cuda:10.0", "rocm:gfx942"):
        for batched in (False, True):
            question = OracleSpec(platform, scheme=scheme, block_shape=block, is_batched=batched, is_lora_enabled=True)
            answer = oracle.ask(question)
            if answer.refusal is not None:
                continue  # ORACLE-12 and 15 say which refusals are right
            verdict = DECISION.verdict(answer.backend == question.triton, f"{question!r}: got {answer.backend}")
            session.settle([verdict], LoraSpec(1, 16, 16, 1, 1, scheme="none"), session.replay(question))


@pytest.mark.moegate_executions(4, 3)
def test_a_graph_replayed_with_other_adapters_equals_the_eager_call(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant
    if session.device not in REPLAYED.devices:
        pytest.skip("graphs are captured on a GPU")
    for is_batched in (False, True):
        spec = replace(spec_of(session.device), is_batched=is_batched)
        case = build_lora(spec, session.device)
        make = partial(session.subject.lora, variant=variant)
        layer, ids = loaded(make, case), case.lora_ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer.run(ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer.run(ids)
        verdicts = []
        for turn in range(len(case.adapters)):
            order = case.adapters[turn:] + case.adapters[:turn]
            for slot, adapter in enumerate(order):
                layer.load(slot, adapter)
            ids.copy_(torch.where(case.lora_ids >= 0, (case.lora_ids + turn) % len(order), case.lora_ids))
            output.fill_(torch.nan)
            graph.replay()
            eager = layer.run(ids)
            stray = differing_rows(case, output, eager)
            verdicts.append(REPLAYED.verdict(not stray, f"{stray} rows differ after {turn + 1} replays"))
        session.settle(verdicts, spec, session.replay(spec))

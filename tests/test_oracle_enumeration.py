"""The oracle's proof: its question space enumerated; faults planted in its rules, each caught by a named property."""

import time
from dataclasses import replace
from itertools import chain, islice

import pytest
from hypothesis import HealthCheck, given, settings

from moegate.conformance.judge import PROPERTIES
from moegate.conformance.oracle import (
    KERNELS,
    availabilities,
    configurations,
    covering,
    enumerate_oracle,
    judge_question,
    judge_relations,
    oracle_specs,
    requests,
)
from moegate.conformance.subjects.moegate_oracle import MoegateOracle
from moegate.impl.config import QuantScheme
from moegate.impl.experts.batched_triton import BatchedTritonExperts
from moegate.impl.experts.flashinfer_cutlass import FlashInferCutlassExperts
from moegate.impl.experts.flashinfer_trtllm import FlashInferTrtllmExperts
from moegate.impl.experts.readiness import READY, State
from moegate.impl.experts.triton import TritonExperts
from moegate.impl.oracle import rules, select
from moegate.impl.oracle.backends import UnquantizedMoeBackend as Backend
from moegate.impl.oracle.decision import BackendRefusedError, Decision
from moegate.impl.platform import Platform, Vendor

ORACLE_PROPERTIES = {id for id in PROPERTIES if id.startswith("ORACLE-")}
SPACES = {"configurations": configurations, "requests": requests, "availabilities": availabilities}


@pytest.mark.parametrize("space", SPACES)
def test_every_property_holds_on_every_point_of_the_space(space, capsys):
    started = time.perf_counter()
    result = enumerate_oracle(MoegateOracle(), SPACES[space](), relations_every=97)
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(f"\n{space}: {result.points} points in {seconds:.1f} s, decisions {dict(result.decisions)}")
    assert result.violated() == {}
    assert result.points > 100_000


def test_every_property_is_judged_many_times_in_the_three_spaces():
    result = enumerate_oracle(
        MoegateOracle(), chain(*(islice(space(), 0, None, 61) for space in SPACES.values())), relations_every=10
    )
    assert result.violated() == {}
    assert {prop.id for prop in result.counts} == ORACLE_PROPERTIES
    assert {prop.id: count.cases for prop, count in result.counts.items() if count.cases < 100} == {}
    assert set(result.decisions) == {*(backend.value for backend in Backend), "refused"}


@settings(deadline=None, max_examples=400, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(oracle_specs())
def test_every_property_holds_in_a_larger_space_than_the_one_enumerated(question):
    facet = MoegateOracle()
    answer = facet.ask(question)
    for prop, violation in [*judge_question(facet, question, answer), *judge_relations(facet, question, answer)]:
        assert not violation, f"{prop.id}: {prop.sentence}\n{violation}"


def test_the_environment_of_the_process_changes_no_answer(monkeypatch):
    facet = MoegateOracle()
    questions = list(islice(requests(), 0, None, 499))
    before = [facet.ask(question) for question in questions]
    monkeypatch.setenv("MOEGATE_BACKEND", "aiter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert [facet.ask(question) for question in questions] == before


# --- planted faults: each names the properties that must catch it -------------------------------------------------

_HOPPER, _DATA_PARALLEL, _SWIGLUOAI = rules.DEMOTIONS
_SELECT = select.select_backend


def _demotions(*changed):
    return lambda patch: patch.setattr(rules, "DEMOTIONS", changed)


def _hopper_if(predicate):
    return lambda patch: patch.setattr(Platform, "is_hopper", property(predicate))


def _lora_vendors(*vendors):
    return lambda patch: patch.setattr(select, "LORA_VENDORS", frozenset(vendors))


def _unquantised_nvidia(*line):
    def plant(patch):
        table = {**rules.PRIORITIES[QuantScheme.NONE], Vendor.NVIDIA: line}
        patch.setattr(rules, "PRIORITIES", {**rules.PRIORITIES, QuantScheme.NONE: table})

    return plant


def _without_refusal(cls, *fragments):
    """The predicate forgets the refusals whose words contain a fragment."""

    def plant(patch):
        original = cls.refusal.__func__

        def refusal(owner, config, platform):
            words = original(owner, config, platform)
            return None if words is not None and any(fragment in words for fragment in fragments) else words

        patch.setattr(cls, "refusal", classmethod(refusal))

    return plant


def _select_instead(wrapper):
    def plant(patch):
        patch.setattr("moegate.conformance.subjects.moegate_oracle.select_backend", wrapper)

    return plant


def _lora_forgotten_for_quantised(config, platform, available, request, environment):
    if config.scheme is not QuantScheme.NONE and config.is_lora_enabled:
        config = replace(config, is_lora_enabled=False)
    return _SELECT(config, platform, available, request, environment)


def _replaces_in_silence(config, platform, available, request, environment):
    try:
        return _SELECT(config, platform, available, request, environment)
    except BackendRefusedError:
        return _SELECT(config, platform, available, "auto", environment)


def _falls_back_from_lora(config, platform, available, request, environment):
    try:
        return _SELECT(config, platform, available, request, environment)
    except BackendRefusedError:
        return _SELECT(replace(config, is_lora_enabled=False), platform, available, request, environment)


def _remembers_the_platform(memory):
    def wrapper(config, platform, available, request, environment):
        key = (platform, request)
        if key not in memory:
            memory[key] = _SELECT(config, platform, available, request, environment)
        return memory[key]

    return wrapper


def _variable_over_argument(config, platform, available, request, environment):
    return _SELECT(config, platform, available, None if environment else request, environment)


def _stops_at_the_first(config, platform, available, request, environment):
    decision = _SELECT(config, platform, available, request, environment)
    taken = next(i for i, reason in enumerate(decision.reasons) if reason.taken)
    return replace(decision, reasons=decision.reasons[: taken + 1])


def _own_platforms_ignore_lora(config, platform, available, request, environment):
    if platform.vendor in (Vendor.TPU, Vendor.OUT_OF_TREE):
        config = replace(config, is_lora_enabled=False)
    return _SELECT(config, platform, available, request, environment)


def _warns_never(config, platform, available, request, environment):
    return replace(_SELECT(config, platform, available, request, environment), warnings=())


def _cpu_lora_is_triton(config, platform, available, request, environment):
    decision = _SELECT(config, platform, available, request, environment)
    if platform.vendor is Vendor.CPU and config.is_lora_enabled:
        return Decision(Backend.TRITON, TritonExperts, decision.reasons, decision.demotions)
    return decision


def _obstacle(changed):
    def plant(patch):
        original = select._Question.obstacle

        def obstacle(self, backend, *, asked_for):
            return changed(original, self, backend, asked_for)

        patch.setattr(select._Question, "obstacle", obstacle)

    return plant


def _request_counts_as_ready(original, question, backend, asked_for):
    return original(question, backend, asked_for=True)


def _requests_are_trusted(original, question, backend, asked_for):
    return None if asked_for else original(question, backend, asked_for=asked_for)


def _kernels_are_trusted(original, question, backend, asked_for):
    question.available = dict.fromkeys(Backend, READY)
    return original(question, backend, asked_for=asked_for)


FAULTS = {
    "the Hopper rule is dropped": (_demotions(_DATA_PARALLEL, _SWIGLUOAI), {"ORACLE-04", "ORACLE-05", "ORACLE-10"}),
    "the Hopper move of flashinfer_trtllm is dropped": (
        _demotions(replace(_HOPPER, backends=(Backend.FLASHINFER_CUTLASS,)), _DATA_PARALLEL, _SWIGLUOAI),
        {"ORACLE-04", "ORACLE-05"},
    ),
    "the Hopper move of flashinfer_cutlass is dropped": (
        _demotions(replace(_HOPPER, backends=(Backend.FLASHINFER_TRTLLM,)), _DATA_PARALLEL, _SWIGLUOAI),
        {"ORACLE-04", "ORACLE-05"},
    ),
    "the data-parallel rule is dropped": (_demotions(_HOPPER, _SWIGLUOAI), {"ORACLE-06", "ORACLE-05", "ORACLE-10"}),
    "the SwigluOAI rule is dropped": (_demotions(_HOPPER, _DATA_PARALLEL), {"ORACLE-07", "ORACLE-05", "ORACLE-10"}),
    "the SwigluOAI rule moves one backend alone": (
        _demotions(_HOPPER, _DATA_PARALLEL, replace(_SWIGLUOAI, backends=(Backend.FLASHINFER_CUTLASS,))),
        {"ORACLE-07"},
    ),
    "the demotions change their order": (_demotions(_DATA_PARALLEL, _HOPPER, _SWIGLUOAI), {"ORACLE-10"}),
    "the two Hopper moves change their order": (
        _demotions(
            replace(_HOPPER, backends=(Backend.FLASHINFER_CUTLASS, Backend.FLASHINFER_TRTLLM)),
            _DATA_PARALLEL,
            _SWIGLUOAI,
        ),
        {"ORACLE-05"},
    ),
    "Hopper is every family from 90": (
        _hopper_if(lambda p: p.vendor is Vendor.NVIDIA and p.family >= 90),
        {"ORACLE-05", "ORACLE-10"},
    ),
    "Hopper is asked of no vendor": (_hopper_if(lambda p: p.family == 90), {"ORACLE-10"}),
    "Hopper is capability 9.x of any vendor but NVIDIA": (
        _hopper_if(lambda p: p.vendor is Vendor.AMD and p.family == 90),
        {"ORACLE-04", "ORACLE-10"},
    ),
    "data parallelism counts from 1": (
        _demotions(_HOPPER, replace(_DATA_PARALLEL, applies=lambda c, p: c.parallel.dp_size >= 1), _SWIGLUOAI),
        {"ORACLE-05", "ORACLE-10"},
    ),
    "data parallelism is 2 alone": (
        _demotions(_HOPPER, replace(_DATA_PARALLEL, applies=lambda c, p: c.parallel.dp_size == 2), _SWIGLUOAI),
        {"ORACLE-18"},
    ),
    "expert parallelism passes for data parallelism": (
        _demotions(_HOPPER, replace(_DATA_PARALLEL, applies=lambda c, p: c.parallel.ep_size > 1), _SWIGLUOAI),
        {"ORACLE-06", "ORACLE-10"},
    ),
    "the rank's number counts": (
        _demotions(_HOPPER, replace(_DATA_PARALLEL, applies=lambda c, p: c.parallel.dp_rank > 0), _SWIGLUOAI),
        {"ORACLE-06", "ORACLE-18"},
    ),
    "LoRA returns nothing of its own": (_lora_vendors(), {"ORACLE-03"}),
    "LoRA is for CUDA alone": (_lora_vendors(Vendor.NVIDIA), {"ORACLE-03"}),
    "LoRA forgets XPU": (_lora_vendors(Vendor.NVIDIA, Vendor.AMD), {"ORACLE-03"}),
    "LoRA is forgotten in the quantised tables": (_select_instead(_lora_forgotten_for_quantised), {"ORACLE-03"}),
    "LoRA breaks the batched format": (
        lambda patch: patch.setattr(select._Question, "triton", property(lambda self: Backend.TRITON)),
        {"ORACLE-03", "ORACLE-08"},
    ),
    "LoRA falls back where Triton refuses": (_select_instead(_falls_back_from_lora), {"ORACLE-03", "ORACLE-12"}),
    "LoRA overrides a request without a word": (_select_instead(_warns_never), {"ORACLE-08"}),
    "LoRA on a CPU is sent to Triton": (_select_instead(_cpu_lora_is_triton), {"ORACLE-13", "ORACLE-09"}),
    "FlashInfer's predicates forget LoRA, and so does the oracle": (
        lambda patch: (
            _lora_vendors()(patch),
            _without_refusal(FlashInferCutlassExperts, "LoRA")(patch),
        ),
        {"ORACLE-03", "ORACLE-15"},
    ),
    "the first two of the line are swapped": (
        _unquantised_nvidia(
            Backend.FLASHINFER_CUTLASS, Backend.FLASHINFER_TRTLLM, Backend.TRITON, Backend.BATCHED_TRITON
        ),
        {"ORACLE-05", "ORACLE-11"},
    ),
    "the last resort is taken out of the line": (
        _unquantised_nvidia(Backend.FLASHINFER_TRTLLM, Backend.FLASHINFER_CUTLASS),
        {"ORACLE-05", "ORACLE-09", "ORACLE-11"},
    ),
    "flashinfer_trtllm is for every capability from 10.0": (
        _without_refusal(FlashInferTrtllmExperts, "not cuda:11", "not cuda:12"),
        {"ORACLE-15"},
    ),
    "a forced backend skips the predicate": (_obstacle(_requests_are_trusted), {"ORACLE-02"}),
    "missing kernels are not looked for": (_obstacle(_kernels_are_trusted), {"ORACLE-02"}),
    "a kernel that must be compiled is taken unasked": (
        _obstacle(_request_counts_as_ready),
        {"ORACLE-02", "ORACLE-11"},
    ),
    "a refused request is replaced in silence": (_select_instead(_replaces_in_silence), {"ORACLE-08"}),
    "weights on the input are left out of a predicate": (
        _without_refusal(FlashInferCutlassExperts, "routing weights"),
        {"ORACLE-15"},
    ),
    "the alignment is left out of a predicate": (_without_refusal(FlashInferCutlassExperts, "that 128"), {"ORACLE-15"}),
    "the bit width is left out of a predicate": (
        _without_refusal(FlashInferCutlassExperts, "unquantised"),
        {"ORACLE-15"},
    ),
    "the batched predicate forgets its format": (_without_refusal(BatchedTritonExperts, "batched"), {"ORACLE-15"}),
    "fp8 is taken for a type of every device": (
        lambda patch: patch.setattr(Platform, "has_fp8_e4m3", property(lambda self: True)),
        {"ORACLE-15"},
    ),
    "TPU and out-of-tree platforms take LoRA": (_select_instead(_own_platforms_ignore_lora), {"ORACLE-12"}),
    "the reasons end with the candidate taken": (_select_instead(_stops_at_the_first), {"ORACLE-05", "ORACLE-09"}),
    "the answer is remembered by platform and request": (
        _select_instead(_remembers_the_platform({})),
        {"ORACLE-05"},
    ),
    "the variable wins over the argument": (_select_instead(_variable_over_argument), {"ORACLE-16"}),
}


def _violated(expected):
    """The properties that the covering points violate, asked until all the expected ones are among them."""
    points, violated = covering(), set()
    while not expected <= violated and (some := list(islice(points, 300))):
        violated |= set(enumerate_oracle(MoegateOracle(), some, relations_every=7).violated())
    return violated


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_a_named_property(fault, monkeypatch):
    plant, expected = FAULTS[fault]
    plant(monkeypatch)
    violated = _violated(expected)
    assert expected <= violated, f"caught by {sorted(violated)} alone"


def test_the_points_that_faults_are_judged_on_are_clean_without_one():
    result = enumerate_oracle(MoegateOracle(), covering(), relations_every=7)
    assert result.violated() == {}


def test_the_three_states_of_a_kernel_are_all_asked_about():
    states = {State.READY: 0, State.ON_REQUEST: 0, State.ABSENT: 0}
    for question in islice(availabilities(), 0, None, 17):
        states[State.ABSENT] += bool(question.absent)
        states[State.ON_REQUEST] += bool(question.on_request)
        states[State.READY] += len(question.absent) < len(KERNELS)
    assert all(count > 20 for count in states.values()), states

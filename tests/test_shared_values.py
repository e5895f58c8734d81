"""The judge of shared experts' values: two references agree, and layers that are wrong are caught by name."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from moegate.conformance.judge import first_violated
from moegate.conformance.numerics import Numerics
from moegate.conformance.properties.shared import (
    judge_again,
    judge_element,
    judge_memory,
    judge_overlap,
    judge_unscaled,
    truth_of,
)
from moegate.conformance.shared_cases import SharedSpec, build_shared, pinned_shared, shared_specs
from moegate.conformance.spec import SCHEMES, parse_spec
from moegate.conformance.subject import Capabilities
from moegate.conformance.subjects.eager import EagerSubject
from moegate.conformance.subjects.moegate import MoegateSubject
from moegate.reference.shared import shared_experts

SPEC = SharedSpec(M=7, H=64, I=32, E=8, top_k=2, shared_size=48, gated=True, scaling="above_one")
SPECS = [
    replace(SPEC, dtype=dtype, gated=gated, seed=seed)
    for seed, (dtype, gated) in enumerate(
        (dtype, gated) for dtype in ("bfloat16", "float16", "float32") for gated in (False, True)
    )
]
NUMERICS = Numerics()
HONEST = MoegateSubject()


def _run(case):
    return HONEST.shared(case, "cpu", overlapped=False, hold=None)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_the_dense_formula_is_one_expert_for_every_token(spec):
    case = build_shared(spec)
    w13, w2 = case.shared.w13[0], case.shared.w2[0]
    dense = shared_experts(case.hidden_states, w13, w2, case.gate)
    torch.testing.assert_close(dense, case.operands()[1].trace().output)


@pytest.mark.parametrize("subject", [MoegateSubject(), EagerSubject()], ids=lambda subject: subject.name)
def test_honest_layers_stay_within_budget(subject):
    used = []
    for spec in pinned_shared("cpu", replace(subject.capabilities, schemes=("none", "fp8_channel_token"))):
        case = build_shared(spec)
        output = subject.shared(case, "cpu", overlapped=False, hold=None)
        verdicts = judge_element(output, truth_of(case, subject.numerics))
        assert first_violated(verdicts) is None, verdicts
        used += [verdict.budget_used for verdict in verdicts]
    assert max(used) > 0.2, "a budget that nobody comes near judges nothing"


# What each wrong layer computes instead.
WRONG = {
    "zeros": lambda case: torch.zeros_like(case.hidden_states),
    "the input": lambda case: case.hidden_states.clone(),
    "no shared experts": lambda case: _parts(case)[0],
    "no routed experts": lambda case: _parts(case)[1],
    "shared experts twice": lambda case: _parts(case)[0] + 2 * _parts(case)[1],
    "shared experts scaled with the routed ones": lambda case: (
        _parts(case)[0] + case.routed_scaling_factor * _parts(case)[1]
    ),
    "the scaling factor applied to everything twice": lambda case: (
        case.routed_scaling_factor * _parts(case)[0] + _parts(case)[1]
    ),
    "another token's shared output": lambda case: _parts(case)[0] + _parts(case)[1].roll(1, 0),
}


def _parts(case):
    """Routed and shared output apart."""
    routed = replace(case, shared=replace(case.shared, w2=torch.zeros_like(case.shared.w2)))
    shared = replace(case, routed=replace(case.routed, topk_weights=torch.zeros_like(case.routed.topk_weights)))
    return _run(routed), _run(shared)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_layer_that_computes_something_else_is_rejected_on_every_case(wrong):
    for spec in SPECS:
        case = build_shared(spec)
        (verdict,) = judge_element(WRONG[wrong](case), truth_of(case, NUMERICS))
        assert not verdict.holds, f"SHARED-13 accepts {wrong} on {spec!r}"


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.gated], ids=repr)
def test_a_gate_that_is_forgotten_or_applied_twice_is_rejected(spec):
    case = build_shared(spec)
    truth = truth_of(case, NUMERICS)
    assert case.gate is not None
    (forgotten,) = judge_element(_run(replace(case, gate=None)), truth)
    (off,) = judge_element(_run(replace(case, gate=case.gate * 1.5)), truth)
    assert not forgotten.holds
    assert not off.holds


def test_three_percent_on_the_shared_output_are_seen():
    for spec in SPECS:
        case = build_shared(replace(spec, M=33))
        routed, shared = (part.float() for part in _parts(case))
        (verdict,) = judge_element((routed + 1.03 * shared).to(case.hidden_states.dtype), truth_of(case, NUMERICS))
        # In bfloat16 three percent are four roundings: they show where the shared output dominates.
        assert spec.dtype == "bfloat16" or not verdict.holds


def test_a_factor_on_the_shared_output_is_caught_by_its_name():
    for spec in SPECS:
        case = build_shared(spec)
        (honest,) = judge_unscaled(case, _run)
        (scaled,) = judge_unscaled(case, lambda c: _run(c) * c.routed_scaling_factor)
        (nothing,) = judge_unscaled(case, lambda c: torch.zeros_like(c.hidden_states))
        assert (honest.holds, scaled.holds, nothing.holds) == (True, False, False)


@pytest.mark.parametrize("operand", ["hidden_states", "topk_weights", "w13", "shared_w13", "shared_w2", "shared_gate"])
def test_a_written_operand_is_caught_by_its_name(operand):
    case = build_shared(SPEC)
    output = _run(case)
    assert judge_memory(case, output).holds
    case.tensors()[operand].view(-1)[0] += 1
    verdict = judge_memory(case, output)
    assert not verdict.holds
    assert operand.removeprefix("shared_") in verdict.detail


def test_a_result_in_an_operand_s_memory_is_caught():
    case = build_shared(SPEC)
    assert not judge_memory(case, case.hidden_states).holds


def test_bits_that_differ_are_counted():
    case = build_shared(SPEC)
    output = _run(case)
    other = output.clone()
    assert judge_again(output, other).holds
    assert judge_overlap(output, other, ("before_shared",)).holds
    other[3, 5] += 1
    assert not judge_again(output, other).holds
    verdict = judge_overlap(output, other, ("before_shared",))
    assert not verdict.holds
    assert "before_shared" in verdict.detail


def test_an_overlap_that_does_not_happen_is_an_error():
    with pytest.raises(ValueError, match="overlapped: expected a second stream, got no_overlap"):
        HONEST.shared(build_shared(SPEC), "cpu", overlapped=True, hold=None)


def test_the_hand_overs_are_held_where_they_are_said_to_be():
    places = []
    HONEST.shared(build_shared(SPEC), "cpu", overlapped=False, hold=places.append)
    assert places == ["before_routed", "after_routed", "before_shared", "after_shared"]


def test_a_spec_reads_back_from_its_line():
    assert parse_spec(repr(SPEC)) == SPEC


def test_pinned_specs_hold_every_dtype_scheme_and_gate():
    everything = Capabilities(schemes=tuple(SCHEMES), scalings=("one", "above_one", "below_one"))
    seen = {(spec.dtype, spec.gated, spec.shared_scheme) for spec in pinned_shared("cpu", everything)}
    assert len(seen) == 14
    assert {spec.scaling for spec in pinned_shared("cpu", everything)} == {"one", "above_one", "below_one"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_specs_are_drawn_for_every_device(device):
    seen = []

    @settings(max_examples=20, database=None, deadline=None)
    @given(shared_specs(device, HONEST.capabilities))
    def draw(spec):
        seen.append((spec.dtype, spec.gated))

    draw()
    assert len(set(seen)) > 1

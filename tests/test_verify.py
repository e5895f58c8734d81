"""`verify_experts` judges any layer that the reference knows, a part of its tokens or all of them."""

import pytest
import torch

from moegate.conformance.cases import build_experts
from moegate.conformance.emulation import emulate
from moegate.conformance.lora_cases import LoraSpec, build_lora
from moegate.conformance.numerics import Numerics
from moegate.conformance.spec import ExpertsSpec
from moegate.conformance.verify import verify_experts

SPECS = [
    ExpertsSpec(M=40, H=72, I=56, E=4, top_k=2, activation="swigluoai", bias="both"),
    ExpertsSpec(M=40, H=72, I=56, E=4, top_k=2, scheme="fp8_block", block_n=32, block_k=32),
    ExpertsSpec(M=40, H=72, I=56, E=4, top_k=2, scheme="fp8_tensor", expert_map="round_robin"),
    ExpertsSpec(M=40, H=80, I=48, E=4, top_k=2, scheme="int4_group_zp", block_k=16, activation="gelu_no_mul"),
]


@pytest.mark.parametrize("max_tokens", [None, 5])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.scheme} {spec.activation}")
def test_an_honest_output_holds_and_a_scaled_one_does_not(spec, max_tokens):
    case = build_experts(spec)
    operands = vars(case.operands())
    output = emulate(case, Numerics(), 3)
    assert verify_experts(output, **operands, max_tokens=max_tokens).holds
    # A single flip of the largest of few hidden elements is worth a few percent of a small layer.
    off = 1.03 if case.activation_scale == "none" else 1.1
    verdict = verify_experts((output.float() * off).to(output.dtype), **operands, max_tokens=max_tokens)
    assert not verdict.holds
    assert verdict.budget_used > 1
    assert verdict.detail.startswith("NUM-")


def test_an_output_of_another_form_does_not_hold():
    case = build_experts(SPECS[0])
    output = torch.zeros(case.hidden_states.shape)
    assert not verify_experts(output, **vars(case.operands())).holds


def test_an_output_with_adapters_is_judged_with_them():
    case = build_lora(LoraSpec(16, 64, 48, 4, 2, tokens="all"))
    operands = case.operands()
    output = operands.trace().output.to(case.layer.hidden_states.dtype)
    assert verify_experts(output, **vars(operands)).holds
    assert not verify_experts(output, **(vars(operands) | {"adapters": None})).holds

"""The bad calls of the API: each starts from a call that is right, so that only its one change can be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moegate.conformance.properties.api import BAD_CALLS, BadCall, good_arguments, judge_bad_call
from moegate.conformance.properties.api_quantization import BASES
from moegate.impl.batched import batched_experts
from moegate.impl.checks import debug_checks
from moegate.impl.fused_moe import fused_experts
from moegate.impl.quantization import ExpertsQuantization
from moegate.impl.weights import expect_experts_weights

FUNCTIONS = {
    "fused_experts": fused_experts,
    "batched_experts": batched_experts,
    "debug_checks": debug_checks,
    "ExpertsQuantization": ExpertsQuantization,
}


def good(base: str) -> dict[str, Any]:
    arguments = good_arguments("fused_experts", "cpu", base)
    return arguments | ({"quant": ExpertsQuantization(**arguments["quant"])} if "quant" in arguments else {})


@pytest.mark.parametrize("base", ["", *BASES])
def test_what_a_bad_call_starts_from_is_accepted(base: str) -> None:
    with debug_checks():
        out = fused_experts(**good(base), backend="cpu")
    assert out.isfinite().all()
    assert out.any()


def test_every_bad_call_has_a_name_of_its_own_and_there_are_many() -> None:
    names = [str(call) for call in BAD_CALLS]
    assert sorted(names) == sorted(set(names))
    assert len([call for call in BAD_CALLS if call.function == "fused_experts"]) > 400


def test_a_call_that_is_accepted_is_a_finding() -> None:
    verdicts = judge_bad_call(BadCall("fused_experts", "quant", "is right", dict, base="int4_zeros"), FUNCTIONS, "cpu")
    assert [verdict.holds for verdict in verdicts] == [False, True]
    assert "accepted" in verdicts[0].detail


def test_a_call_that_writes_a_scale_before_it_refuses_is_a_finding() -> None:
    def writes(**arguments: Any) -> None:
        arguments["quant"].w2_scale.zero_()
        raise ValueError("quant: expected another one, got this")

    functions = FUNCTIONS | {"fused_experts": writes}
    verdicts = judge_bad_call(BadCall("fused_experts", "quant", "is right", dict, base="fp8_block"), functions, "cpu")
    assert [verdict.holds for verdict in verdicts] == [True, False]
    assert "w2_scale" in verdicts[1].detail


def test_weights_that_were_checked_say_what_they_are() -> None:
    from moegate.impl.checks import expect_activation

    arguments = good("int4_zeros")
    function = expect_activation("silu", 1.702, 7.0, False)
    weights = expect_experts_weights(
        arguments["hidden_states"], "E", arguments["w13"], arguments["w2"], None, None, arguments["quant"], function
    )
    assert (weights.num_local_experts, weights.hidden_size, weights.intermediate_size) == (4, 32, 16)
    assert (weights.scheme, weights.block_shape, weights.has_bias) == ("int4_w4a16", (0, 16), False)
    assert {name for name, tensor in weights.tensors().items() if tensor is not None} == {
        *("w13", "w2", "w13_scale", "w2_scale", "w13_zero_point", "w2_zero_point")
    }


def test_a_quantisation_can_be_written_in_plain_words() -> None:
    scale = torch.ones(2, 2, 2)
    quant = ExpertsQuantization("fp8_w8a8", scale, scale, block_shape=[16, 16])
    assert quant.block_shape == (16, 16)
    assert (quant.weight_scale, quant.activation_scale) == ("block", "group")


@pytest.mark.parametrize(("missing", "given"), [("w13", "w2"), ("w2", "w13")])
def test_one_zero_point_without_the_other_is_refused_by_the_missing_one(missing: str, given: str) -> None:
    fields = good_arguments("fused_experts", "cpu", "int4_zeros")["quant"] | {f"{missing}_zero_point": None}
    said = f"{missing}_zero_point: expected one as {given}_zero_point is there, got None"
    with pytest.raises(ValueError, match=f"^{said}"):
        ExpertsQuantization(**fields)

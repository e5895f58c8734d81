"""Workloads of quantised and biased layers: their bytes, their tensors, and the judges that they pass first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moegate.bench.floor import H200_PUBLISHED, expert_bytes, floor, measure_ceilings
from moegate.bench.formats import FORMATS
from moegate.bench.operands import Operands, WeightBank, make_operands
from moegate.bench.plain import plain_experts
from moegate.bench.session import LayerBench
from moegate.bench.verification import verify_by_budget, verify_rows
from moegate.bench.workloads import MODELS, Model, Workload
from moegate.conformance.words import reference_arguments
from moegate.impl.fused_moe import fused_experts
from moegate.reference.experts import experts as reference_experts

CPU = torch.device("cpu")
# H and I that 128 divides, and few enough to compute; a rank of two; no multiple of anything, with biases.
GATED = Model("gated", 4, 2, 256, 128, "none")
SHARD = Model("shard", 8, 2, 128, 128, "none", num_local_experts=4)
BIASED = Model("biased", 4, 2, 96, 64, "none", activation="swigluoai", has_bias=True, interleaved=True)
RELU2 = Model("relu2", 4, 2, 128, 256, "none", activation="relu2_no_mul")
ODD = Model("odd", 4, 2, 180, 116, "none", has_bias=True)
GROUPED = [name for name in FORMATS if "-g" in name]
CASES = [
    *((model, name) for model in (GATED, SHARD, RELU2) for name in FORMATS),
    *((ODD, name) for name in FORMATS if name not in GROUPED),
    (BIASED, "bf16"),
    (BIASED, "fp8-token"),
    (BIASED, "int4-g32"),
]
every_case = pytest.mark.parametrize(
    ("model", "name"), CASES, ids=lambda case: case.name if isinstance(case, Model) else case
)


def operands_of(model: Model, name: str, tokens: int = 20) -> Operands:
    workload = Workload(model, tokens, dtype=name)
    return make_operands(workload, WeightBank(model, FORMATS[name], CPU), 0, 0)


@every_case
def test_the_floor_counts_every_byte_of_the_weights(model: Model, name: str) -> None:
    weights = WeightBank(model, FORMATS[name], CPU).copy(0)
    tensors = [weights.w13, weights.w2, weights.w13_bias, weights.w2_bias]
    if weights.quant is not None:
        tensors += weights.quant.tensors().values()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    assert stored == expert_bytes(Workload(model, 1, dtype=name)) * model.local_experts


@every_case
def test_moegate_is_right_and_what_is_a_little_wrong_is_not_timed(model: Model, name: str) -> None:
    operands = operands_of(model, name)
    for verify in (verify_by_budget, verify_rows):
        verdict = verify(fused_experts, operands)
        assert verdict.holds, verdict
        assert not verify(lambda *args, **options: torch.zeros_like(args[0]), operands).holds

    def loses_an_expert(*args: Any, **options: Any) -> torch.Tensor:
        return fused_experts(*args[:3], args[3].index_fill(1, torch.tensor([0]), 0.0), *args[4:], **options)

    assert not verify_rows(loses_an_expert, operands).holds

    # Steps of quantised activations are errors of several percent themselves, and these are few rows.
    factor = 1.03 if FORMATS[name].is_weight_only or not FORMATS[name].is_quantized else 1.12

    def scales(*args: Any, **options: Any) -> torch.Tensor:
        return fused_experts(*args, **options) * factor

    assert not verify_by_budget(scales, operands).holds


@every_case
def test_the_plain_layer_is_the_references(model: Model, name: str) -> None:
    operands = operands_of(model, name)
    words = reference_arguments(
        operands.w13,
        operands.w2,
        w13_bias=operands.w13_bias,
        w2_bias=operands.w2_bias,
        quant=operands.quant,
        activation=operands.activation,
        interleaved=operands.interleaved,
    )
    right = reference_experts(
        operands.hidden_states,
        topk_weights=operands.topk_weights,
        topk_ids=operands.topk_ids,
        expert_map=operands.expert_map,
        **words,
    )
    assert isinstance(right, torch.Tensor)
    plain = plain_experts(operands).double()
    # Hidden rows that are quantised were rounded to storage first, which moves some of them a step.
    allowed = 0.06 if "quantize_hidden" in words else 1e-5
    assert ((plain - right).norm(dim=1) <= allowed * right.norm(dim=1)).all()


@pytest.mark.parametrize(
    ("model", "name", "tokens", "microseconds", "bound"),
    [
        # 8 experts x (3 x 7168 x 256 + 4 x (4 x 56 + 56 x 2)) B + 2 x 7168 x 2 B over 4.3 TB/s.
        ("deepseek-v3-tp8", "fp8-block", 1, 10.251, "memory"),
        # 8 experts x 3 x 2048 x 768 x (0.5 + 2 / 128) B + 2 x 2048 x 2 B over 4.3 TB/s.
        ("qwen3-30b-a3b", "int4-g128", 1, 4.528, "memory"),
        # 2 x 16384 x 8 x 3 x 2048 x 768 operations over 1580 TFLOP/s of fp8, over 790 of the bf16 that int4 becomes.
        ("qwen3-30b-a3b", "fp8-block", 16384, 782.88, "compute"),
        ("qwen3-30b-a3b", "int4-g128", 16384, 1565.76, "compute"),
        # 4 experts x (3 x 2880 x 2880 + 3 x 2880) x 2 B + 2 x 2880 x 2 B over 4.3 TB/s.
        ("gpt-oss-120b", "bf16", 1, 46.315, "memory"),
    ],
)
def test_floors_are_those_worked_out_by_hand(
    model: str, name: str, tokens: int, microseconds: float, bound: str
) -> None:
    least = floor(Workload(MODELS[model], tokens, dtype=name), H200_PUBLISHED)
    assert least.seconds * 1e6 == pytest.approx(microseconds, abs=0.006)
    assert least.bound == bound


def test_a_cpu_multiplies_what_8_bits_mean() -> None:
    ceilings = measure_ceilings("cpu", ["fp8", "int8"])
    assert set(ceilings.peak) == {"fp8", "int8"}
    floor(Workload(GATED, 1, dtype="fp8-block"), ceilings)


def test_formats_of_one_peak_share_the_measured_ceilings() -> None:
    bench = LayerBench(CPU)
    assert bench.ceilings("int4-g128") is bench.ceilings("bf16")
    assert "fp8" in bench.ceilings("fp8-block").peak


def test_weights_are_kept_for_one_format_of_one_model() -> None:
    workload = Workload(GATED, 1, dtype="fp8-block")
    bank = WeightBank(GATED, FORMATS["fp8-block"], CPU)
    assert bank.serves(workload, CPU)
    assert not bank.serves(replace(workload, dtype="fp8-token"), CPU)
    assert not bank.serves(replace(workload, dtype="bf16"), CPU)
    first, second = bank.copy(0), bank.copy(1)
    assert not torch.equal(first.w13.view(torch.uint8), second.w13.view(torch.uint8))


def test_a_contender_that_knows_no_scales_is_asked_about_plain_layers_alone() -> None:
    asked = []

    def theirs(*args: Any, activation: str, expert_map: Any, global_num_experts: int) -> torch.Tensor:
        asked.append(activation)
        return fused_experts(*args, activation=activation, expert_map=expert_map, global_num_experts=global_num_experts)

    assert verify_rows(theirs, operands_of(GATED, "bf16")).holds
    with pytest.raises(TypeError, match="quant"):
        operands_of(GATED, "fp8-block").pass_to(theirs)
    assert asked == ["silu"]

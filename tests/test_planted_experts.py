"""Faults of quantised experts, activations and biases, planted one at a time: each is caught by its property."""

import pytest
from planted import Fault, expect_caught

ACTIVATION = "kernels/activation.py"
TILE = "kernels/tile.py"
GROUPED_GEMM = "kernels/grouped_gemm.py"
BATCHED_GEMM = "kernels/batched_gemm.py"
QUANTIZE = "kernels/quantize.py"
STAGES = "experts/stages.py"
EXPERTS = ("test_experts.py",)
BATCHED = ("test_batched.py",)
QUANT = ("test_quant.py",)

FAULTS = (
    Fault(
        "alpha-ignored",
        ACTIVATION,
        "tl.exp(-alpha * g)",
        "tl.exp(-1.702 * g)",
        EXPERTS,
        ("NUM-01", "NUM-03", "NUM-04"),
    ),
    Fault(
        "gate-clamped-on-both-sides",
        ACTIVATION,
        "g = tl.where(gate > limit, limit, gate)",
        "g = tl.where(gate > limit, limit, tl.where(gate < -limit, -limit, gate))",
        EXPERTS,
        ("NUM-01",),
    ),
    Fault(
        "gate-up-halves-swapped",
        ACTIVATION,
        "            gate = tl.load(row_ptrs + columns[None, :], mask=mask, "
        "other=0.0).to(tl.float32)\n"
        "            up = tl.load(row_ptrs + size + columns[None, :], mask=mask, "
        "other=0.0).to(tl.float32)\n",
        "            up = tl.load(row_ptrs + columns[None, :], mask=mask, other=0.0).to(tl.float32)\n"
        "            gate = tl.load(row_ptrs + size + columns[None, :], mask=mask, "
        "other=0.0).to(tl.float32)\n",
        EXPERTS,
        ("NUM-01",),
    ),
    Fault(
        "w2-bias-after-routing-weight",
        GROUPED_GEMM,
        "    if has_bias:\n"
        "        bias_ptrs = bias_ptr + expert.to(tl.int64) * stride_bias + columns\n"
        "        acc += tl.load(bias_ptrs, mask=columns < N, other=0.0).to(tl.float32)[None, :]\n"
        "    if mul_weight == ON_OUTPUT:\n"
        "        acc *= tl.load(weight_ptrs, mask=real, other=0.0)[:, None]\n",
        "    if mul_weight == ON_OUTPUT:\n"
        "        acc *= tl.load(weight_ptrs, mask=real, other=0.0)[:, None]\n"
        "    if has_bias:\n"
        "        bias_ptrs = bias_ptr + expert.to(tl.int64) * stride_bias + columns\n"
        "        acc += tl.load(bias_ptrs, mask=columns < N, other=0.0).to(tl.float32)[None, :]\n",
        EXPERTS,
        ("NUM-01", "NUM-03"),
    ),
    Fault(
        "batched-bias-of-expert-0-for-all",
        BATCHED_GEMM,
        "bias_ptr + expert.to(tl.int64) * stride_bias",
        "bias_ptr + expert.to(tl.int64) * 0",
        BATCHED,
        ("NUM-01",),
    ),
    Fault(
        "tensor-scale-of-expert-0",
        TILE,
        "        result *= tl.load(b_scale_ptr + expert)",
        "        result *= tl.load(b_scale_ptr + expert * 0)",
        EXPERTS,
        ("NUM-01", "NUM-04"),
    ),
    Fault(
        "scale-of-the-first-k-block-for-all",
        TILE,
        "            step = k // SCALE_K\n",
        "            step = 0\n",
        EXPERTS,
        ("NUM-01",),
    ),
    Fault(
        "zero-point-nibbles-swapped",
        TILE,
        "((columns % 2) * 4)",
        "((1 - columns % 2) * 4)",
        EXPERTS,
        ("NUM-01",),
    ),
    Fault(
        "int4-halves-instead-of-pairs",
        TILE,
        "tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))",
        "tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BLOCK_N, BLOCK_K))",
        EXPERTS,
        ("NUM-01",),
    ),
    Fault(
        "a2-scale-indexed-by-token",
        GROUPED_GEMM,
        "        a_scale_ptr,\n        a_index,\n        real,",
        "        a_scale_ptr,\n        pairs // top_k,\n        real,",
        EXPERTS,
        ("NUM-01",),
    ),
    Fault(
        "static-scale-ignored",
        STAGES,
        "(hidden_states, dtype, quant.activation_scale, quant.group, quant.a13_scale, rows=rows)",
        "(hidden_states, dtype, ActivationScale.TENSOR if quant.activation_scale is "
        "ActivationScale.STATIC else quant.activation_scale, quant.group, None, rows=rows)",
        EXPERTS,
        ("PATH-03",),
    ),
    Fault(
        "amax-over-240",
        QUANTIZE,
        "tl.full(amax.shape, LARGEST, tl.float32)",
        "tl.full(amax.shape, 240.0 if LARGEST == 448.0 else LARGEST, tl.float32)",
        QUANT,
        ("QUANT-02",),
    ),
    Fault(
        "int8-rounds-half-up",
        QUANTIZE,
        "q = ((v + 12582912.0) - 12582912.0).to(tl.int8)",
        "q = tl.floor(v + 0.5).to(tl.int8)",
        QUANT,
        ("QUANT-05",),
    ),
    Fault(
        "batched-a-scale-without-the-slab",
        BATCHED_GEMM,
        "        expert.to(tl.int64) * max_tokens + rows,\n        real,",
        "        expert.to(tl.int64) * 0 + rows,\n        real,",
        BATCHED,
        ("NUM-01", "BATCHED-05"),
    ),
    Fault(
        "dequantised-fallback-for-w8a8",
        "fused_moe.py",
        '    weights = expect_experts_weights(like, "E_local", w13, w2, w13_bias, w2_bias, quant, function)',
        "    import dataclasses; quant_ = quant if quant is None or str(quant.scheme) != 'int8_w8a8' "
        "else dataclasses.replace(quant, scheme='int8_w8a16', per_act_token_quant=False); weights = "
        'expect_experts_weights(like, "E_local", w13, w2, w13_bias, w2_bias, quant_, '
        "function)",
        EXPERTS,
        ("PATH-03",),
    ),
    Fault(
        "last-global-expert-left-out",
        "kernels/pairs.py",
        "(expert >= 0) & (expert < num_experts)",
        "(expert >= 0) & (expert < num_experts - 1)",
        ("test_align.py",),
        ("ALIGN-02",),
    ),
    Fault(
        "align-last-block-of-experts-unscanned",
        "kernels/align.py",
        "    block_e = max(_LEAST_BLOCK_E, min(_BLOCK_E, next_power_of_2(num_local_experts)))",
        "    num_local_experts = min(num_local_experts, _BLOCK_E); block_e = max(_LEAST_BLOCK_E, "
        "min(_BLOCK_E, next_power_of_2(num_local_experts)))",
        ("test_align.py",),
        ("ALIGN-02",),
    ),
    Fault(
        "naive-rows-of-one-block-all-written",
        GROUPED_GEMM,
        "pairs = tl.where(lane_m == 0, pid_m, num_pairs)",
        "pairs = tl.where(lane_m <= 1, pid_m + lane_m, num_pairs)",
        EXPERTS,
        ("HYGIENE-04",),
    ),
    Fault(
        "quantiser-takes-slabs-for-dense",
        QUANTIZE,
        "    return (x.stride(0) if x.ndim == 3 else rows.max_tokens * x.stride(0)), x.stride(-2)",
        "    return rows.max_tokens * x.stride(-2), x.stride(-2)",
        BATCHED,
        ("NUM-01",),
    ),
    Fault(
        "amax-of-the-first-block-alone",
        QUANTIZE,
        "        for start in range(first, end, BLOCK):\n"
        "            columns = start + tl.arange(0, BLOCK)\n"
        "            mask = real[:, None] & (columns < end)[None, :]\n"
        "            x = tl.load(x_ptr + offsets[:, None] + columns[None, :], mask=mask, "
        "other=0.0).to(tl.float32)\n"
        "            amax",
        "        for start in range(first, tl.minimum(first + BLOCK, end), BLOCK):\n"
        "            columns = start + tl.arange(0, BLOCK)\n"
        "            mask = real[:, None] & (columns < end)[None, :]\n"
        "            x = tl.load(x_ptr + offsets[:, None] + columns[None, :], mask=mask, "
        "other=0.0).to(tl.float32)\n"
        "            amax",
        QUANT,
        ("QUANT-02",),
    ),
    Fault(
        "fp8-loses-naive-blocks",
        "align.py",
        "    return not has_expert_map and num",
        "    return scheme is not QuantScheme.FP8_W8A8 and not has_expert_map and num",
        EXPERTS,
        ("PATH-01",),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_of_the_experts_is_caught_by_its_property(fault, tmp_path):
    expect_caught(fault, tmp_path)

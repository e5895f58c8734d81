"""Which form of its kernels a layer takes, why, and that each form computes the same layer."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from closeness import assert_same_rounding

from moegate.impl.checks import expect_activation
from moegate.impl.config import QuantScheme
from moegate.impl.experts.base import ExpertsCall
from moegate.impl.experts.kernel_form import (
    FormChoice,
    FormQuestion,
    KernelForm,
    form_choice,
    kernel_form,
    lies_on_copy_grid,
    use_kernel_forms,
)
from moegate.impl.experts.triton_forms import form_of_call
from moegate.impl.fused_moe import fused_experts
from moegate.impl.path import record_path
from moegate.impl.platform import Platform, Vendor
from moegate.impl.quantization import ExpertsQuantization
from moegate.impl.tuning.kernel_config import KernelConfig, use_kernel_configs
from moegate.impl.weights import ExpertsWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = Platform(Vendor.NVIDIA, (9, 0), "NVIDIA H200", 132, 232_448)
INTERPRETED = Platform(Vendor.CPU, interpreted=True)
# Qwen3-30B-A3B at M = 8,192.
PREFILL = FormQuestion(
    8192 * 8, 8, 128, 128, 2048, 768, True, torch.bfloat16, QuantScheme.NONE, False, False, True, H200
)
DECODE = replace(PREFILL, num_pairs=8, is_naive=True)
# MiniMax-M2.5 on one of 4 ranks at M = 1,024: 32 rows an expert.
SCALED = replace(
    PREFILL,
    num_pairs=1024 * 8,
    num_experts=256,
    num_local_experts=64,
    hidden_size=3072,
    intermediate_size=1536,
    scheme=QuantScheme.FP8_W8A8,
    scale_block=128,
)


def decide(question, choice=FormChoice.MEASURED, **changes):
    return kernel_form(replace(question, **changes), choice)


def test_without_being_asked_a_layer_takes_the_form_that_was_measured_to_be_faster():
    assert form_choice({}) is FormChoice.MEASURED


def test_where_general_kernels_are_asked_for_no_layer_takes_another_form():
    for question in (PREFILL, DECODE):
        assert decide(question, FormChoice.GENERAL).form is KernelForm.GENERAL


def test_on_hopper_prefill_is_sorted_and_decode_is_streamed_only_where_forms_are_taken_everywhere():
    assert decide(PREFILL).form is KernelForm.SORTED
    assert decide(DECODE).why == "not streamed: in whole layers they took longer than the general kernels"
    assert decide(DECODE, FormChoice.EVERYWHERE).form is KernelForm.STREAMED


# What was measured: Qwen3-30B-A3B from 2,048 tokens on and Mixtral-8x7B at 8,192 gained, Mixtral at 512 lost.
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "form"),
    [
        (2048, 8, 128, 2048, "sorted"),
        (256, 8, 128, 2048, "general"),
        (8192, 2, 8, 4096, "sorted"),
        (512, 2, 8, 4096, "general"),
    ],
)
def test_rows_are_sorted_where_that_was_measured_to_be_faster(tokens, top_k, experts, hidden, form):
    sizes = {"num_pairs": tokens * top_k, "top_k": top_k, "num_experts": experts, "num_local_experts": experts}
    assert decide(PREFILL, hidden_size=hidden, **sizes).form == form


@pytest.mark.parametrize(
    ("question", "changes", "why"),
    [
        (DECODE, {"scheme": QuantScheme.FP8_W8A8}, "not streamed: weights are fp8_w8a8"),
        (PREFILL, {"dtype": torch.float32}, "not sorted: dtype is float32"),
        (PREFILL, {"scheme": QuantScheme.FP8_W8A8}, "not sorted: weights are fp8_w8a8"),
        (PREFILL, {"scheme": QuantScheme.INT4_W4A16}, "not sorted: weights are int4_w4a16"),
        (SCALED, {"has_adapters": True}, "not sorted: tokens may have adapters"),
        (SCALED, {"on_copy_grid": False}, "not sorted: rows of weights do not start on 16 bytes"),
        (SCALED, {"is_gated": False}, "not sorted: fp8 needs an activation with a gate"),
        (SCALED, {"scale_block": 48}, "not sorted: blocks of scales are 48 wide, not 32 or 64 or 128"),
        (SCALED, {"is_naive": True}, "not streamed: weights are fp8_w8a8"),
        (PREFILL, {"has_adapters": True}, "not sorted: tokens may have adapters"),
        (PREFILL, {"on_copy_grid": False}, "not sorted: rows of weights do not start on 16 bytes"),
        (DECODE, {"top_k": 33}, "not streamed: top_k is 33, over 32"),
        (PREFILL, {"platform": Platform.parse("cuda:8.0")}, "not sorted: cuda:8.0 has no copy engine"),
        (PREFILL, {"platform": Platform.parse("rocm:gfx942")}, "not sorted: rocm:gfx942 has no copy engine"),
    ],
)
def test_a_layer_that_no_other_form_fits_takes_the_general_one_and_says_why(question, changes, why):
    for choice in (FormChoice.MEASURED, FormChoice.EVERYWHERE):
        decision = decide(question, choice, **changes)
        assert decision.form is KernelForm.GENERAL
        assert decision.why.startswith(why)


def test_what_was_never_measured_is_taken_everywhere_alone():
    blackwell = Platform.parse("cuda:10.0")
    for question in (DECODE, PREFILL):
        assert decide(question, platform=blackwell).why.endswith("never measured on cuda:10.0")
        assert decide(question, FormChoice.EVERYWHERE, platform=blackwell).form is not KernelForm.GENERAL
    assert decide(PREFILL, num_pairs=128 * 32).why == "not sorted: 32 rows an expert, under 128"
    assert decide(PREFILL, is_gated=False).why == "not sorted: an activation without a gate took longer"
    assert decide(PREFILL, intermediate_size=256).why == "not sorted: I is 256, under 512"
    assert decide(PREFILL, num_experts=2048).why == "not sorted: 32 rows an expert, under 128", (
        "a rank has its share of the pairs"
    )


def test_fp8_blocks_are_sorted_where_that_was_measured_to_be_faster():
    assert decide(SCALED).form is KernelForm.SORTED
    assert decide(SCALED, num_pairs=992 * 8).why == "not sorted: 31 rows an expert, under 32"
    assert decide(SCALED, intermediate_size=192).why == "not sorted: I is 192, under 256"
    assert decide(SCALED, hidden_size=1024).why == "not sorted: 5.8 waves of tiles, under 12"
    narrow = decide(SCALED, scale_block=64)
    assert narrow.why == "not sorted: blocks of scales are 64 wide: measured with 128 alone"
    assert decide(SCALED, FormChoice.EVERYWHERE, scale_block=64).form is KernelForm.SORTED


def test_where_tiles_are_named_the_kernels_run_whose_tiles_they_are():
    def of(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    call = ExpertsCall(
        hidden_states=of(8192, 2048),
        weights=ExpertsWeights(of(128, 1536, 2048), of(128, 2048, 768)),
        topk_weights=of(8192, 8, dtype=torch.float32),
        topk_ids=of(8192, 8, dtype=torch.int32),
        activation=expect_activation("silu", 1.702, 7.0, False),
        apply_router_weight_on_input=False,
        expert_map=None,
        global_num_experts=128,
        allow_tf32=False,
    )
    with use_kernel_forms("measured"):
        assert form_of_call(call, torch.bfloat16, H200).form is KernelForm.SORTED
        with use_kernel_configs(KernelConfig(16, 16, 16), KernelConfig(16, 16, 16)):
            decision = form_of_call(call, torch.bfloat16, H200)
    assert decision.form is KernelForm.GENERAL
    assert decision.why == "tiles of the general kernels are in force"


def test_weights_off_the_copy_engine_s_grid_are_seen():
    w = torch.empty(2, 16, 32, dtype=torch.bfloat16)
    assert lies_on_copy_grid(w, w[:, 8:])
    for other in (torch.empty(2, 16, 36, dtype=torch.bfloat16), w[:, :, :28], w.flatten()[4:-508].view(1, 16, 32)):
        assert not lies_on_copy_grid(w, other)


def test_a_choice_that_does_not_exist_is_refused_by_name():
    with (
        pytest.raises(ValueError, match=r"^choice: expected one of .*'everywhere'.*, got 'fast'"),
        use_kernel_forms("fast"),
    ):
        pass


CASES = {
    # M, E, top_k, H, I: naive blocks, then aligned ones; two steps and tiles with tails.
    "one token": (1, 16, 4, 72, 40),
    "few tokens": (3, 40, 3, 96, 24),
    "tails": (20, 4, 2, 136, 72),
    "a full block": (70, 3, 2, 64, 32),
    "a block of half rows": (40, 3, 1, 64, 40),
}


def layer(case, dtype=torch.bfloat16):
    m, e, top_k, h, i = CASES[case]
    generator = torch.Generator().manual_seed(7)

    def normal(*shape, std=1.0):
        return (torch.empty(shape).normal_(generator=generator) * std).to(dtype).to(DEVICE)

    ids = torch.stack([torch.randperm(e, generator=generator)[:top_k] for _ in range(m)]).int()
    weights = torch.rand(m, top_k, generator=generator)
    return {
        "hidden_states": normal(m, h),
        "w13": normal(e, 2 * i, h, std=h**-0.5),
        "w2": normal(e, h, i, std=i**-0.5),
        "topk_weights": weights.to(DEVICE),
        "topk_ids": ids.to(DEVICE),
        "backend": "triton",
    }


def in_form(choice, **arguments):
    with use_kernel_forms(choice), record_path() as record:
        return fused_experts(**arguments), record


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_form_computes_the_same_layer(case, dtype):
    arguments = layer(case, dtype)
    expected, record = in_form("general", **arguments)
    assert record.last("kernel_form")["form"] == "general"
    found, record = in_form("everywhere", **arguments)
    form = "streamed" if record.last("assignment") == "naive" else "sorted"
    assert record.last("kernel_form")["form"] == form
    kernels = {"streamed": {"gate_up_rows_kernel", "down_rows_kernel"}, "sorted": {"gated_gemm_kernel"}}[form]
    assert set(record.launches) >= kernels
    assert "grouped_gemm_kernel" not in record.launches
    assert_same_rounding(found, expected, form)


@pytest.mark.skipif(DEVICE == "cpu", reason="numpy's sums hang on the tile, a tensor core's do not")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("activation", "interleaved", "has_bias"),
    [
        ("silu", False, False),
        ("silu", False, True),
        ("gelu", False, False),
        ("gelu_tanh", True, False),
        ("swigluoai", True, True),
        ("swigluoai", False, True),
    ],
)
@pytest.mark.parametrize("sizes", [(1024, 4, 2, 512, 512), (777, 8, 4, 1032, 520), (2048, 4, 1, 2048, 768)])
def test_sorted_rows_have_the_bits_of_the_general_kernels(sizes, activation, interleaved, has_bias, dtype):
    # So a token without an adapter gets the same bits whether or not others have one, which no sorted kernel knows.
    num_tokens, num_experts, top_k, hidden_size, columns = sizes
    torch.manual_seed(3)

    def normal(*shape, std=1.0):
        return (torch.randn(shape, device=DEVICE) * std).to(dtype)

    arguments = {
        "hidden_states": normal(num_tokens, hidden_size),
        "w13": normal(num_experts, 2 * columns, hidden_size, std=hidden_size**-0.5),
        "w2": normal(num_experts, hidden_size, columns, std=columns**-0.5),
        "w13_bias": normal(num_experts, 2 * columns) if has_bias else None,
        "w2_bias": normal(num_experts, hidden_size) if has_bias else None,
        "topk_weights": torch.rand(num_tokens, top_k, device=DEVICE),
        "topk_ids": torch.rand(num_tokens, num_experts, device=DEVICE).argsort(dim=1)[:, :top_k].int().contiguous(),
        "activation": activation,
        "interleaved": interleaved,
        "backend": "triton",
    }
    expected, _ = in_form("general", **arguments)
    found, record = in_form("everywhere", **arguments)
    assert record.last("kernel_form")["form"] == "sorted"
    assert torch.equal(found, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="numpy's sums hang on the tile, a tensor core's do not")
@pytest.mark.parametrize(
    ("activation", "has_bias"),
    [("silu", False), ("silu", True), ("gelu", False), ("gelu_tanh", True), ("swigluoai", True)],
)
@pytest.mark.parametrize("sizes", [(1024, 4, 2, 512, 512), (777, 8, 4, 1040, 528), (2048, 4, 1, 2048, 768)])
def test_sorted_rows_of_fp8_blocks_have_the_bits_of_the_general_kernels(sizes, activation, has_bias):
    num_tokens, num_experts, top_k, hidden_size, columns = sizes
    torch.manual_seed(3)
    groups, steps = -(-columns // 128), -(-hidden_size // 128)

    def fp8(*shape):
        return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn)

    def scales(*shape, std):
        return torch.rand(shape, device=DEVICE).add(0.5).mul(std)

    quant = ExpertsQuantization(
        QuantScheme.FP8_W8A8,
        scales(num_experts, 2 * groups, steps, std=hidden_size**-0.5),
        scales(num_experts, steps, groups, std=columns**-0.5),
        block_shape=(128, 128),
    )
    arguments = {
        "hidden_states": torch.randn(num_tokens, hidden_size, device=DEVICE).bfloat16(),
        "w13": fp8(num_experts, 2 * columns, hidden_size),
        "w2": fp8(num_experts, hidden_size, columns),
        "w13_bias": torch.randn(num_experts, 2 * columns, device=DEVICE).bfloat16() if has_bias else None,
        "w2_bias": torch.randn(num_experts, hidden_size, device=DEVICE).bfloat16() if has_bias else None,
        "quant": quant,
        "topk_weights": torch.rand(num_tokens, top_k, device=DEVICE),
        "topk_ids": torch.rand(num_tokens, num_experts, device=DEVICE).argsort(dim=1)[:, :top_k].int().contiguous(),
        "activation": activation,
        "backend": "triton",
    }
    # Tiles whose rows of weights lie in one block of scales: then both multiply the two scales before the sums.
    with use_kernel_configs(KernelConfig(64, 16, 128)):
        expected, _ = in_form("general", **arguments)
    found, record = in_form("everywhere", **arguments)
    assert record.launches["scaled_sorted_gemm_kernel"] == 1
    assert torch.equal(found, expected)


def test_weights_that_no_tile_can_read_take_the_general_kernels():
    arguments = layer("tails")
    w2 = arguments["w2"]
    shifted = torch.empty(w2.numel() + 1, dtype=w2.dtype, device=w2.device)[1:].view(w2.shape)
    shifted.copy_(w2)
    expected, _ = in_form("general", **arguments)
    found, record = in_form("everywhere", **arguments | {"w2": shifted})
    assert record.last("kernel_form")["why"].startswith("not sorted: rows of weights")
    assert record.launches["grouped_gemm_kernel"] == 2
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", ["few tokens", "tails"])
def test_rows_of_another_rank_s_experts_add_nothing_in_any_form(case):
    arguments = layer(case)
    e = arguments["w13"].shape[0]
    expert_map = torch.full((e,), -1, dtype=torch.int32, device=DEVICE)
    held = range(0, e, 2)
    expert_map[list(held)] = torch.arange(len(held), dtype=torch.int32, device=DEVICE)
    arguments |= {name: arguments[name][::2].contiguous() for name in ("w13", "w2")} | {"expert_map": expert_map}
    arguments["topk_ids"][0] = 1  # of another rank alone
    expected, _ = in_form("general", **arguments)
    found, record = in_form("everywhere", **arguments)
    assert record.last("kernel_form")["form"] == "sorted"
    assert not found[0].any()
    assert_same_rounding(found, expected, "sorted")


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the whole gate of this subject")
def test_the_suite_holds_on_the_other_forms():
    command = ["-m", "moegate", "check", "--subject", "moegate:kernel_forms", "--device", "cpu", "-n", "1"]
    done = subprocess.run(
        [sys.executable, *command, "--scale", "0.1", "--select", "test_experts", "--json", "-"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    judged = {row["id"]: row["cases"] for row in json.loads(done.stdout)["properties"]}
    assert min(judged[name] for name in ("NUM-01", "NUM-05", "PATH-01", "PATH-03", "HYGIENE-04")) >= 30

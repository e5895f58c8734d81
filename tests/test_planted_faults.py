"""Faults of the kinds that have shipped in public engines, planted one at a time: each is caught, on the CPU."""

import pytest
from planted import Fault, expect_caught, plant, run_suite

FAULTS = (
    Fault(
        "align-fills-unused-blocks-with-expert-0",
        "kernels/align.py",
        "tl.full((BLOCK_BLOCKS,), -1, tl.int32), mask=unused)",
        "tl.full((BLOCK_BLOCKS,), 0, tl.int32), mask=unused)",
        ("test_align.py",),
        ("ALIGN-06",),
    ),
    Fault(
        "align-counts-a-pair-before-itself",
        "kernels/align.py",
        "(other_lane[None, :] < lane[:, None])",
        "(other_lane[None, :] <= lane[:, None])",
        ("test_align.py",),
        ("ALIGN-03", "ALIGN-04", "ALIGN-05"),
    ),
    Fault(
        "gemm-loses-the-tail-of-k",
        "kernels/tile.py",
        "for k in range(0, K, BLOCK_K):",
        "for k in range(0, K - BLOCK_K + 1, BLOCK_K):",
        ("test_experts.py",),
        ("NUM-01",),
    ),
    Fault(
        "gemm-reads-past-the-tail-of-k",
        "kernels/tile.py",
        '"EVEN_K": operands.k % config.block_size_k == 0,',
        '"EVEN_K": True,',
        ("test_experts.py",),
        ("NUM-01",),
    ),
    Fault(
        "gemm-takes-padding-for-a-token",
        "kernels/grouped_gemm.py",
        "    real = pairs < num_pairs\n",
        "    real = pairs < num_pairs + 1\n",
        ("test_experts.py",),
        ("NUM-01", "HYGIENE-02", "HYGIENE-04"),
    ),
    Fault(
        "gemm-never-multiplies-the-routing-weight",
        "kernels/grouped_gemm.py",
        "    if mul_weight == ON_OUTPUT:\n",
        "    if mul_weight > ON_OUTPUT:\n",
        ("test_experts.py",),
        ("NUM-01", "NUM-02", "NUM-03"),
    ),
    Fault(
        "routing-weight-is-applied-on-the-output-too",
        "experts/triton.py",
        "mul_weight=not call.apply_router_weight_on_input,",
        "mul_weight=True,",
        ("test_experts.py",),
        ("NUM-01", "NUM-02", "NUM-03"),
    ),
    Fault(
        "naive-path-reads-the-row-of-the-pair",
        "kernels/grouped_gemm.py",
        "    a_index = pairs // a_top_k\n",
        "    a_index = pairs // (1 if NAIVE else a_top_k)\n",
        ("test_experts.py",),
        ("NUM-01",),
    ),
    Fault(
        "naive-path-is-lost",
        "align.py",
        "return not has_expert_map and num_tokens * top_k * 4 <= global_num_experts and not grouped",
        "return not has_expert_map and num_tokens * top_k * 5 <= global_num_experts and not grouped",
        ("test_experts.py",),
        ("PATH-01", "PATH-03"),
    ),
    Fault(
        "naive-path-ignores-the-expert-map",
        "align.py",
        "return not has_expert_map and num_tokens * top_k * 4 <= global_num_experts and not grouped",
        "return num_tokens * top_k * 4 <= global_num_experts and not grouped",
        ("test_experts.py",),
        ("PATH-01", "NUM-01"),
    ),
    Fault(
        "combine-adds-rows-that-nobody-wrote",
        "kernels/combine.py",
        "mask = (expert >= 0)[:, None] & inside",
        "mask = (chosen | (expert >= 0))[:, None] & inside",
        ("test_experts.py",),
        ("NUM-01", "NUM-05"),
    ),
    Fault(
        "one-expert-is-three-percent-off",
        "kernels/combine.py",
        "total += row.to(tl.float32)",
        "total += row.to(tl.float32) * tl.where(expert == 1, 1.03, 1.0)[:, None]",
        ("test_experts.py",),
        ("NUM-01", "NUM-03", "NUM-04"),
    ),
    Fault(
        "batched-gemm-ignores-the-count",
        "kernels/batched_gemm.py",
        "    real = rows < num_tokens\n",
        "    real = rows < max_tokens\n",
        ("test_batched.py",),
        ("BATCHED-01", "BATCHED-02"),
    ),
    Fault(
        "batched-gemm-returns-at-one-block-too-few",
        "kernels/batched_gemm.py",
        "    if pid_m * BLOCK_M >= num_tokens:\n",
        "    if pid_m * BLOCK_M + BLOCK_M > num_tokens:\n",
        ("test_batched.py",),
        ("BATCHED-05", "NUM-01"),
    ),
    Fault(
        "batched-gemm-takes-slabs-for-dense",
        "kernels/batched_gemm.py",
        "a_ptr + expert.to(tl.int64) * stride_ae,",
        "a_ptr + expert.to(tl.int64) * max_tokens * K,",
        ("test_batched.py",),
        ("NUM-01",),
    ),
    Fault(
        "batched-gemm-writes-past-the-tail-of-n",
        "kernels/batched_gemm.py",
        "real[:, None] & (columns < N)[None, :]",
        "real[:, None] & (columns < N + 1)[None, :]",
        ("test_batched.py",),
        ("BATCHED-01", "NUM-01"),
    ),
    Fault(
        "batched-activation-stops-at-the-first-expert-s-count",
        "kernels/activation.py",
        "    first = tl.program_id(0) // num_i_blocks * BLOCK_ROWS\n"
        "    num_tokens = tokens_of_slab(expert_num_tokens_ptr, expert, max_tokens)",
        "    first = tl.program_id(0) // num_i_blocks * BLOCK_ROWS\n"
        "    num_tokens = tokens_of_slab(expert_num_tokens_ptr, expert * 0, max_tokens)",
        ("test_batched.py",),
        ("NUM-01",),
    ),
    Fault(
        "batched-result-is-not-zeroed",
        "batched.py",
        "out = torch.zeros(hidden_states.shape,",
        "out = torch.empty(hidden_states.shape,",
        ("test_batched.py",),
        ("BATCHED-02",),
    ),
    Fault(
        "batched-format-launches-a-kernel-twice",
        "experts/batched_triton.py",
        "        batched_gemm(gate_up, x, operands, counts, allow_tf32=allow_tf32, config=configs.w13, shrunk=shrunk)",
        "        [batched_gemm(gate_up, x, operands, counts, allow_tf32=allow_tf32, config=configs.w13, shrunk=shrunk)"
        " for _ in range(2)]",
        ("test_batched.py",),
        ("BATCHED-06",),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught_by_its_property(fault, tmp_path):
    expect_caught(fault, tmp_path)


def test_the_suite_is_quiet_on_an_unchanged_copy(tmp_path):
    nothing = Fault("nothing", "align.py", "from . import path\n", "from . import path\n", (), ())
    outcome = run_suite(plant(nothing, tmp_path), ("test_align.py", "test_experts.py"), tmp_path, scale=0.2)
    assert outcome.status == 0, outcome.output
    assert not outcome.violated

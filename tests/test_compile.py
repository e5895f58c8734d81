"""Every shipped kernel compiles for every platform that it is meant for, and fits it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moegate.impl.platform import Platform
from moegate.impl.tuning.lookup import SHIPPED
from moegate.impl.tuning.names import ConfigKey
from moegate.impl.tuning.schema import parse
from moegate.impl.whole_file import folder_locked, write_whole

PLATFORMS = ("cuda:8.0", "cuda:9.0", "cuda:10.0", "rocm:gfx942")
STREAMED = {"gate_up_rows_kernel", "down_rows_kernel"}
SORTED = {"gated_gemm_kernel", "sorted_gemm_kernel"}
SCALED = {"scaled_gated_gemm_kernel", "scaled_sorted_gemm_kernel"}
# Qwen3-30B-A3B's layer: M = 1 takes naive blocks, the others one tile size each; 64 adds an expert map.
QWEN3 = {"E": 128, "top_k": 8, "H": 2048, "I": 768, "dtype": "bfloat16"}
JOBS = [
    {"platform": platform, "M": m, "expert_map": m == 64} | QWEN3
    for platform, m in itertools.product(PLATFORMS, (1, 64, 128, 512, 4096))
]
# The batched format, a slab of M rows for each of 16 local experts, and where sizes and strides of 1 are constants.
JOBS += [
    {"platform": platform, "batched": True, "M": m, "E": 16} | {k: QWEN3[k] for k in ("top_k", "H", "I", "dtype")}
    for platform, m in itertools.product(PLATFORMS, (16, 64, 1024))
]
JOBS += [
    {"platform": "cuda:9.0", "batched": True, "M": m, "E": e, "top_k": 1, "H": h, "I": i, "dtype": dtype}
    for m, e, h, i, dtype in ((1, 1, 1, 1, "bfloat16"), (40, 4, 200, 72, "float16"), (40, 4, 200, 72, "float32"))
]
# Ragged H and I, the other dtypes, more experts than a block holds, more choices than the iterative top-k takes.
JOBS += [
    *(
        {"platform": "cuda:9.0", "M": m, "E": 8, "top_k": 2, "H": 200, "I": 72, "dtype": dtype}
        for m, dtype in itertools.product((8, 40, 100, 400), ("float16", "float32"))
    ),
    # Sizes and strides of 1 are constants to the compiler.
    {"platform": "cuda:9.0", "M": 1, "E": 1, "top_k": 1, "H": 1, "I": 1, "dtype": "bfloat16"},
    {"platform": "cuda:9.0", "M": 30, "E": 4, "top_k": 1, "H": 64, "I": 32, "dtype": "bfloat16", "ids": "int64"},
    {"platform": "cuda:9.0", "M": 64, "E": 128, "top_k": 4, "H": 2880, "I": 2880, "dtype": "bfloat16"},
    {"platform": "cuda:9.0", "M": 1000, "E": 2100, "top_k": 40, "H": 512, "I": 64, "dtype": "bfloat16"},
    {
        "platform": "cuda:9.0",
        "M": 64,
        "configs": [{"block_size_m": 16, "block_size_n": 64, "block_size_k": 128, "num_stages": 4, "swap_ab": True}],
    }
    | QWEN3,
]
# Quantised experts: every tile of every scheme on Hopper, one tile of each elsewhere; sm_80 has no fp8.
SCHEMES = (
    "fp8_tensor",
    "fp8_channel_token",
    "fp8_channel_static",
    "fp8_block",
    "int8_w8a8_channel_token",
    "int8_w8a16_channel",
    "int8_w8a16_group",
    "int4_w4a16_group",
    "int4_w4a16_group_zp",
)
STAGES = ["quantize_rows_kernel", "amax_kernel", "grouped_gemm_kernel", "batched_gemm_kernel"]
STAGES += ["activation_kernel", "quantized_activation_kernel"]
STAGES += ["batched_activation_kernel", "batched_quantized_activation_kernel"]
ONE_STAGE = {"group_size_m": 1, "num_warps": 4, "num_stages": 1}
JOBS += [
    {"platform": "cuda:9.0", "M": m, "scheme": scheme, "only": STAGES[:3]} | QWEN3
    for scheme in ("fp8_channel_token", "fp8_block", "int8_w8a16_channel", "int4_w4a16_group_zp")
    for m in (1, 256, 4096)
]
JOBS += [
    {"platform": platform, "M": 512, "scheme": scheme, "only": STAGES} | QWEN3
    for platform, scheme in itertools.product(PLATFORMS, SCHEMES)
    if not (platform == "cuda:8.0" and scheme.startswith("fp8"))
]
JOBS += [
    {"platform": platform, "batched": True, "M": 64, "E": 16, "scheme": scheme, "only": STAGES}
    | {k: QWEN3[k] for k in ("top_k", "H", "I", "dtype")}
    for platform, scheme in itertools.product(PLATFORMS[1:], ("fp8_tensor", "fp8_block"))
]
# Blocks that differ within a tile, ragged sizes, biases, and every activation in both of its kernels.
JOBS += [
    {"platform": "cuda:9.0", "M": 4096, "scheme": "fp8_block", "group": 64, "only": STAGES[:3]} | QWEN3,
    {"platform": "cuda:9.0", "M": 4096, "scheme": "fp8_block", "only": STAGES} | QWEN3 | {"I": 704},
    # Steps too short for the tensor cores' bytes: blocks of 16 columns, and a file that asks for them.
    *(
        {"platform": platform, "M": m, "scheme": "fp8_block", "group": 16, "only": STAGES[2:3]} | QWEN3
        for platform, m in itertools.product(PLATFORMS[1:], (1, 512))
    ),
    {"platform": "cuda:9.0", "batched": True, "M": 64, "E": 16, "scheme": "fp8_block", "group": 16, "only": STAGES[3:4]}
    | {k: QWEN3[k] for k in ("top_k", "H", "I", "dtype")},
    *(
        {"platform": "cuda:9.0", "M": 512, "scheme": scheme, "only": STAGES[2:3]}
        | QWEN3
        | {"configs": [{"block_size_m": 64, "block_size_n": 64, "block_size_k": 16, "swap_ab": swap} | ONE_STAGE]}
        for scheme, swap in itertools.product(("fp8_tensor", "int8_w8a8_channel_token"), (False, True))
    ),
    {"platform": "cuda:9.0", "M": 64, "E": 128, "top_k": 4, "H": 2880, "I": 2880, "dtype": "bfloat16"}
    | {"bias": True, "activation": "swigluoai", "interleaved": True, "only": STAGES},
    *(
        {"platform": "cuda:9.0", "M": 64, "activation": activation, "scheme": scheme, "only": STAGES[-4:]} | QWEN3
        for activation in ("gelu", "gelu_tanh", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul")
        for scheme in (None, "fp8_block")
    ),
]
# With adapters: every tile of Hopper at the ranks of either end, one of each elsewhere, both formats, rows of gate and
# up that meet in a tile, alternate, or are not there, and weights of few bits.
WITH_LORA = [
    "lora_shrink_kernel",
    "grouped_gemm_kernel",
    "batched_gemm_kernel",
    "quantized_activation_kernel",
    "batched_quantized_activation_kernel",
]
LORA = {"lora": [8, 16], "only": WITH_LORA} | QWEN3
JOBS += [LORA | {"platform": "cuda:9.0", "M": m, "expert_map": m == 64} for m in (1, 64, 512, 4096)]
JOBS += [LORA | {"platform": "cuda:9.0", "M": m, "lora": [64, 256]} for m in (512, 4096)]
JOBS += [LORA | {"platform": platform, "M": 512} for platform in PLATFORMS if platform != "cuda:9.0"]
JOBS += [
    LORA | {"platform": "cuda:9.0", "batched": True, "M": 1024, "E": 16},
    LORA | {"platform": "cuda:9.0", "batched": True, "M": 64, "E": 16, "scheme": "fp8_block"},
    LORA | {"platform": "cuda:9.0", "M": 512, "scheme": "fp8_block"},
    LORA | {"platform": "cuda:9.0", "M": 512, "scheme": "int4_w4a16_group_zp"},
    LORA | {"platform": "cuda:9.0", "M": 64, "I": 712, "dtype": "float16"},
    LORA | {"platform": "cuda:9.0", "M": 64, "H": 2880, "I": 2880, "activation": "swigluoai", "interleaved": True},
    LORA | {"platform": "cuda:9.0", "M": 64, "E": 8, "top_k": 2, "H": 200, "I": 72, "dtype": "float32"},
]
# Routing beyond softmax: DeepSeek-V3's groups and bias, DeepSeek-V4's scores, groups of one, more choices than the
# iterative top-k takes, E of 1,024.
ROUTINGS = [
    {
        "E": 256,
        "top_k": 8,
        "routing": {"scoring_func": "sigmoid", "bias": True, "num_expert_group": 8, "topk_group": 4},
    },
    {"E": 384, "top_k": 6, "routing": {"scoring_func": "sqrtsoftplus", "bias": True}},
]
JOBS += [
    {"platform": platform, "M": 64, "dtype": "bfloat16"} | routing
    for platform, routing in itertools.product(PLATFORMS, ROUTINGS)
]
JOBS += [
    {"platform": "cuda:9.0", "M": 64, "dtype": dtype, "E": e, "top_k": k, "routing": routing}
    for dtype, e, k, routing in (
        ("float32", 128, 8, {"num_expert_group": 128, "topk_group": 64}),
        ("float16", 1024, 8, {"scoring_func": "sigmoid"}),
        ("bfloat16", 1000, 40, {"scoring_func": "sigmoid", "num_expert_group": 4, "topk_group": 2}),
    )
]
# Tokens that travel: to a few ranks, with adapters, and to many.
JOBS += [
    {"platform": platform, "M": 64, "H": 2048, "dtype": "bfloat16", "E": 128, "top_k": 8, "ranks": ranks}
    for platform, ranks in itertools.product(PLATFORMS, (2, 64))
]
# The other forms of the kernels: rows streamed on every platform, rows sorted where tiles are copied by an engine.
FORMS = {"forms": True} | QWEN3
JOBS += [FORMS | {"platform": platform, "M": 1, "only": sorted(STREAMED)} for platform in PLATFORMS]
PLAIN_STREAMED = FORMS | {"platform": "cuda:9.0", "M": 1, "only": sorted(STREAMED)}
JOBS += [FORMS | {"platform": platform, "M": 4096, "only": list(SORTED)} for platform in ("cuda:9.0", "cuda:10.0")]
JOBS += [
    FORMS | {"platform": "cuda:9.0", "only": [*STREAMED, *SORTED]} | job
    for job in (
        # Whole blocks; ragged sizes; choices that fill the second streamed kernel's registers; one choice.
        {"M": 65536},
        {"M": 64, "E": 8, "top_k": 2, "H": 200, "I": 72, "dtype": "float16", "expert_map": True},
        {"M": 512, "H": 2880, "I": 2880, "top_k": 4, "activation": "swigluoai", "interleaved": True, "bias": True},
        {"M": 512, "activation": "relu2_no_mul", "bias": True},
        {"M": 1, "E": 1024, "top_k": 32, "bias": True},
        {"M": 1, "E": 16, "top_k": 1, "H": 200, "I": 72, "dtype": "float16"},
    )
]
# fp8 with scales of blocks on sorted rows: whole blocks, ragged sizes, narrower blocks.
PLAIN_SCALED = FORMS | {"platform": "cuda:9.0", "M": 4096, "scheme": "fp8_block", "only": sorted(SCALED)}
JOBS += [PLAIN_SCALED, PLAIN_SCALED | {"platform": "cuda:10.0"}]
JOBS += [
    PLAIN_SCALED | job
    for job in (
        {"M": 300, "E": 8, "top_k": 2, "H": 336, "I": 208, "dtype": "float16", "bias": True, "expert_map": True},
        {"I": 704, "activation": "swigluoai", "bias": True},
        {"group": 64, "activation": "gelu"},
        {"group": 32, "activation": "gelu_tanh"},
    )
]
KERNELS = {
    "topk_routing_kernel",
    "align_count_kernel",
    "align_place_kernel",
    "grouped_gemm_kernel",
    "activation_kernel",
    "combine_kernel",
    "batched_gemm_kernel",
    "batched_activation_kernel",
    "quantize_rows_kernel",
    "amax_kernel",
    "quantized_activation_kernel",
    "batched_quantized_activation_kernel",
    "lora_shrink_kernel",
    "plan_travel_kernel",
    "pack_rows_kernel",
    "sum_ranks_kernel",
}
# e4m3 is no type of sm_80: what only fp8 experts launch is not for it. int8 activations have a scale a token.
FP8_KERNELS = {"amax_kernel", "batched_quantized_activation_kernel"}


def compile_jobs(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ahead_of_time.py"))],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{jobs}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def of_shipped_files() -> Iterator[dict[str, Any]]:
    """The general GEMMs on every tile that ships, on the first layer and number of tokens that has both."""
    known = set()
    for path in sorted(SHIPPED.glob("*.json")):
        key = ConfigKey.parse(path.name)
        layer = {"E": key.num_experts, "top_k": key.top_k, "H": key.hidden_size, "I": key.intermediate_size}
        if key.dtype is not None:
            layer |= {"scheme": "fp8_block"}
        for num_tokens, tiles in parse(path, path.read_bytes()).entries.items():
            if (key.dtype, tiles) in known:
                continue
            known.add((key.dtype, tiles))
            configs = [asdict(tile) for tile in tiles]
            job = {"platform": "cuda:9.0", "M": num_tokens, "dtype": "bfloat16", "configs": configs}
            yield job | layer | {"only": ["grouped_gemm_kernel"]}


JOBS += of_shipped_files()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every job compiles to, made once for all of xdist's workers: it takes minutes where nothing is cached."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the run's, in which each worker has its own
    made = folder / "compiled.json"
    with folder_locked(folder):
        if not made.is_file():
            with ThreadPoolExecutor(2) as pool:
                parts = list(pool.map(compile_jobs, (JOBS[0::2], JOBS[1::2])))
            write_whole(made, json.dumps(list(itertools.chain(*parts))))
    return json.loads(made.read_text())


def describe(kernel: dict[str, Any]) -> str:
    return f"{kernel['platform']} {kernel['kernel']} {kernel['constants']}: {kernel}"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_kernel_compiles(compiled: list[dict[str, Any]], platform: str) -> None:
    expected = KERNELS | STREAMED
    if platform == "cuda:8.0":
        expected -= FP8_KERNELS
    if platform in ("cuda:9.0", "cuda:10.0"):
        expected |= SORTED | SCALED
    assert {kernel["kernel"] for kernel in compiled if kernel["platform"] == platform} == expected


def test_both_assignments_are_compiled(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["constants"].get("NAIVE") for kernel in compiled} >= {True, False}


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["shared_memory"] <= Platform.parse(kernel["platform"]).shared_memory, describe(kernel)


def test_nothing_spills_on_hopper(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        if kernel["platform"] == "cuda:9.0":
            assert kernel["spilled"] == 0, describe(kernel)


def test_resident_warps_on_hopper(compiled: list[dict[str, Any]]) -> None:
    """Registers of a program fit the 65,536 of a multiprocessor; where weights are streamed, three programs' do."""
    for kernel in compiled:
        if kernel["platform"] == "cuda:9.0":
            registers = kernel["registers"] * 32 * kernel["constants"]["num_warps"]
            streams = kernel["kernel"].endswith("gemm_kernel") and kernel["constants"]["BLOCK_M"] == 16
            assert registers * (3 if streams else 1) <= 65_536, describe(kernel)


def test_streamed_kernels_ask_for_most_weights_of_a_step_at_once(compiled: list[dict[str, Any]]) -> None:
    """8 loads of 16 bytes a thread and step. The compiler once waited for the first 4, and the layer took 45 % more."""
    streamed = [
        kernel
        for kernel in compiled
        if kernel["platform"] == "cuda:9.0" and kernel["kernel"] in STREAMED and kernel["job"] == PLAIN_STREAMED
    ]
    assert {kernel["kernel"] for kernel in streamed} == STREAMED
    for kernel in streamed:
        assert kernel["wide_loads"] >= 7, describe(kernel)


def test_a_multiprocessor_holds_two_and_three_programs_of_the_scaled_kernels(compiled: list[dict[str, Any]]) -> None:
    """One program fewer cost a tenth to a third of their speed: its barriers then leave the matrix units idle."""
    scaled = {kernel["kernel"]: kernel for kernel in compiled if kernel["job"] == PLAIN_SCALED}
    assert set(scaled) == SCALED
    for name, programs in (("scaled_gated_gemm_kernel", 2), ("scaled_sorted_gemm_kernel", 3)):
        kernel = scaled[name]
        # A warp's registers come in units of 256; a program's shared memory has 1 KiB of the system's beside it.
        registers = -(-kernel["registers"] // 8) * 256 * kernel["constants"]["num_warps"]
        assert programs * registers <= 65_536, describe(kernel)
        assert programs * (kernel["shared_memory"] + 1024) <= 228 << 10, describe(kernel)


def test_a_kernel_has_one_cache_key_whichever_kernel_came_before_it() -> None:
    """Triton hashes the global constants of a function that a kernel calls only where it met that function before."""
    code = """
import importlib, pkgutil
from triton.runtime.jit import JITFunction
import moegate.impl.kernels as kernels

functions = {}
for module in pkgutil.iter_modules(kernels.__path__):
    for name, found in vars(importlib.import_module(kernels.__name__ + "." + module.name)).items():
        if isinstance(found, JITFunction):
            functions[name] = found

def keys(names):
    for function in functions.values():
        function.hash, function.used_global_vals = None, {}
    return {name: functions[name].cache_key for name in names}

names = [name for name in functions if name.endswith("_kernel")]
alone = {name: keys([name])[name] for name in names}
for first in names:
    after = keys([first, *names])
    print(*(f"{name} behind {first}" for name in names if after[name] != alone[name]), sep=", ", end="")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == ""

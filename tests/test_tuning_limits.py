"""The estimate of shared memory against what Triton really gives the kernel, compiled ahead of time."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moegate.impl.config import QuantScheme
from moegate.impl.platform import Platform
from moegate.impl.tuning.kernel_config import KernelConfig, fit_block_k
from moegate.impl.tuning.limits import obstacle, shared_memory
from moegate.impl.tuning.schema import Tile
from moegate.impl.weights import STORAGE

# Every way in which operands are kept: copied for mma.sync, read in place by warp-group instructions, swapped.
CONFIGS = (
    KernelConfig(16, 64, 128, 1, 4, 4),
    KernelConfig(16, 64, 128, 1, 4, 4, swap_ab=True),
    KernelConfig(64, 128, 64, 1, 4, 4),
    KernelConfig(128, 64, 128, 1, 8, 2),
    KernelConfig(16, 64, 64, 1, 4, 1),
)
LAYER = {"M": 4096, "E": 128, "top_k": 8, "H": 2048, "I": 768}
PLATFORMS = ("cuda:8.0", "cuda:9.0", "cuda:10.0", "cuda:12.0", "rocm:gfx942")
# Steps of a block of scales, copied for mma.sync and read in place.
SCALED = (
    KernelConfig(16, 32, 128, 1, 4, 8),
    KernelConfig(16, 128, 128, 1, 8, 6, swap_ab=True),
    KernelConfig(64, 128, 128, 1, 8, 4),
)
SCHEMES = {"": QuantScheme.NONE, "fp8_block": QuantScheme.FP8_W8A8}
JOBS = [
    *((platform, "bfloat16", "", config) for platform in PLATFORMS for config in CONFIGS),
    ("cuda:9.0", "float32", "", KernelConfig(64, 64, 32, 8, 8, 3)),
    ("cuda:9.0", "float16", "", KernelConfig(128, 256, 64, 8, 8, 3)),
    *((platform, "bfloat16", "fp8_block", config) for platform in ("cuda:8.9", "cuda:9.0") for config in SCALED),
]


@pytest.fixture(scope="module")
def compiled():
    """What Triton says, in the order of `JOBS`; a process that interprets kernels cannot compile."""
    jobs = [
        {
            "platform": platform,
            "dtype": dtype,
            "scheme": scheme,
            "configs": [asdict(config)],
            "only": ["grouped_gemm_kernel"],
        }
        | LAYER
        for platform, dtype, scheme, config in JOBS
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ahead_of_time.py"))],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    results = json.loads(done.stdout)
    return [max(r["shared_memory"] for r in results if r["job"] == job) for job in jobs]


def test_the_estimate_is_what_triton_allocates(compiled):
    for (name, dtype, scheme, config), allocated in zip(JOBS, compiled, strict=True):
        estimate = shared_memory(config, getattr(torch, dtype), SCHEMES[scheme], Platform.parse(name))
        # Barriers and what a tile needs to change its layout come on top; too little is refused by the driver, too
        # much would refuse good files.
        # Without a pipeline AMD's small operand goes straight to registers.
        spared = (
            config.block_size_m * config.block_size_k * 2 if name == "rocm:gfx942" and config.num_stages == 1 else 0
        )
        assert allocated - 2048 <= estimate <= allocated + spared, (
            f"{name} {dtype} {scheme} {config}: {estimate}, allocated {allocated}"
        )


def test_the_tile_rules_own_bound_is_never_lower_than_the_estimate():
    for name, dtype, scheme, config in JOBS:
        stored = STORAGE.get(SCHEMES[scheme], getattr(torch, dtype))
        estimate = shared_memory(config, getattr(torch, dtype), SCHEMES[scheme], Platform.parse(name))
        assert estimate <= config.shared_memory(stored)


@pytest.mark.parametrize(
    ("block_shape", "step", "fitted"),
    [
        ((128, 128), 256, 128),
        ((128, 128), 64, 64),
        ((64, 96), 64, 32),
        ((0, 128), 256, 128),
        ((0, 32), 128, 32),
        (None, 256, 256),
    ],
)
def test_steps_divide_the_blocks_and_groups_of_scales(block_shape, step, fitted):
    assert fit_block_k(Tile(16, 64, step, 1, 4, 3), block_shape).block_size_k == fitted


def test_a_scale_block_that_no_step_divides_is_refused_by_name():
    with pytest.raises(ValueError, match="block_shape: expected a K that 16 divides"):
        fit_block_k(Tile(16, 64, 64, 1, 4, 3), (128, 24))


def test_threads_are_counted_in_the_devices_warps():
    config = KernelConfig(16, 64, 64, 1, 16, 1)
    assert obstacle(config, torch.bfloat16, QuantScheme.NONE, Platform.parse("cuda:9.0")) is None
    assert obstacle(config, torch.bfloat16, QuantScheme.NONE, Platform.parse("rocm:gfx942")) is None


def test_public_files_of_an_a100_that_fit_by_a_stage_are_not_refused():
    config = KernelConfig(128, 256, 64, 8, 8, 4)
    assert config.shared_memory(torch.bfloat16) > Platform.parse("cuda:8.0").shared_memory
    assert obstacle(config, torch.bfloat16, QuantScheme.NONE, Platform.parse("cuda:8.0")) is None
    assert obstacle(config, torch.bfloat16, QuantScheme.NONE, Platform.parse("cuda:12.0")) is not None

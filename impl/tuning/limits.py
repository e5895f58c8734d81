"""Whether a tile fits the kernel and the device."""

from __future__ import annotations

import torch

from ..config import QuantScheme
from ..platform import Platform, Vendor
from .kernel_config import KernelConfig
from .schema import Tile

# Threads of one block, on NVIDIA and AMD alike.
_MAX_THREADS = 1024
# Bytes of one activation and of one weight, where they are not the layer's dtype.
_ACTIVATION_BYTES = {QuantScheme.FP8_W8A8: 1.0, QuantScheme.INT8_W8A8: 1.0}
_WEIGHT_BYTES = {
    QuantScheme.FP8_W8A8: 1.0,
    QuantScheme.INT8_W8A8: 1.0,
    QuantScheme.INT8_W8A16: 1.0,
    QuantScheme.INT4_W4A16: 0.5,
}


def shared_memory(config: KernelConfig, dtype: torch.dtype, scheme: QuantScheme, platform: Platform) -> int:
    """Bytes of shared memory that Triton 3.6 gives the kernel's operands in flight.

    A step's operands lie there num_stages - 1 times; num_stages times where warp-group or tensor-memory instructions
    read them asynchronously (NVIDIA families 90, 100 and 110; rows of the matrix instruction in 64s; no float32,
    which is computed without them). Compared with what Triton compiles in `tests/test_tuning_limits.py`.
    """
    is_float32 = scheme is QuantScheme.NONE and dtype is torch.float32
    rows = config.block_size_n if config.swap_ab else config.block_size_m
    is_async = platform.vendor is Vendor.NVIDIA and platform.family in (90, 100, 110)
    buffers = config.num_stages if is_async and rows >= 64 and not is_float32 else max(1, config.num_stages - 1)
    activation = _ACTIVATION_BYTES.get(scheme, dtype.itemsize)
    weight = _WEIGHT_BYTES.get(scheme, dtype.itemsize)
    step = config.block_size_k * (config.block_size_m * activation + config.block_size_n * weight)
    return int(step * buffers)


def kernel_config(tile: Tile) -> KernelConfig:
    """The kernel's own form of a tile.

    Raises:
        ValueError: a value outside what the kernel takes.
    """
    return KernelConfig(
        tile.block_size_m,
        tile.block_size_n,
        tile.block_size_k,
        tile.group_size_m,
        tile.num_warps,
        tile.num_stages,
        tile.swap_ab,
    )


def obstacle(config: KernelConfig, dtype: torch.dtype, scheme: QuantScheme, platform: Platform) -> str | None:
    """Why a tile cannot run on the device, in words for the user; None where it can."""
    warp = 64 if platform.vendor is Vendor.AMD else 32
    if config.num_warps * warp > _MAX_THREADS:
        return f"num_warps {config.num_warps} is over the device's {_MAX_THREADS // warp}"
    limit = platform.shared_memory
    needed = shared_memory(config, dtype, scheme, platform)
    if limit and needed > limit:
        return f"it needs {needed} bytes of shared memory, the device has {limit}"
    return None

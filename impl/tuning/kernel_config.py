"""The grouped GEMM's tile choice: what may be chosen, and the rule that chooses where no tuned file speaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch

from ..checks import expect_dtype, expect_instance, expect_int, expect_one_of, shown
from ..config import QuantScheme
from ..platform import Platform, Vendor
from .schema import Tile

AnyTile = TypeVar("AnyTile", Tile, "KernelConfig")


@dataclass(frozen=True)
class KernelConfig:
    """One launch of the grouped GEMM.

    Attributes:
        block_size_m: pairs a block; the alignment pads each expert's run to it.
        block_size_n: weight rows a block.
        block_size_k: elements of the inner dimension a step.
        group_size_m: row blocks that share a sweep over the weight rows (L2 reuse); 1 sweeps block by block.
        num_warps: warps a program.
        num_stages: steps in flight.
        swap_ab: the weights are the matrix instruction's row operand: on Hopper that keeps blocks of 16 and 32 pairs
            on warp-group instructions, whose rows come in 64.

    Raises:
        TypeError: a field that is not an int (`swap_ab`: not a bool).
        ValueError: a field out of its range.
    """

    block_size_m: int
    block_size_n: int
    block_size_k: int
    group_size_m: int = 1
    num_warps: int = 4
    num_stages: int = 3
    swap_ab: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "block_size_m": (16, 256),
            "block_size_n": (16, 512),
            "block_size_k": (16, 512),
            "group_size_m": (1, 256),
            "num_warps": (1, 16),
            "num_stages": (1, 8),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value}")
            if name not in ("num_stages", "group_size_m") and value & (value - 1):
                raise ValueError(f"{name}: expected a power of two, got {value}")
        if not isinstance(self.swap_ab, bool):
            raise TypeError(f"swap_ab: expected a bool, got {type(self.swap_ab).__name__} {self.swap_ab!r}")

    def shared_memory(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory that the kernel needs at most: its operands in flight, or the tile on its way out."""
        operands = (self.block_size_m + self.block_size_n) * self.block_size_k * dtype.itemsize * self.num_stages
        return max(operands, self.block_size_m * self.block_size_n * 4)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as configuration files and path records hold it."""
        return asdict(self)


# The tile of each block_size_m. Bytes in flight decide below 64 rows, where the layer streams weights; operand reuse
# decides at 128, where it computes. Measured on an H200 (`moegate tune` on the models whose files are shipped); swapped
# operands keep 16 and 32 rows on Hopper's warp-group instructions.
_HOPPER = {
    16: KernelConfig(16, 64, 128, 1, 4, 4, swap_ab=True),
    32: KernelConfig(32, 128, 64, 1, 4, 3, swap_ab=True),
    64: KernelConfig(64, 128, 64, 1, 4, 3),
    128: KernelConfig(128, 256, 64, 8, 8, 4),
}
_BLACKWELL = {
    16: KernelConfig(16, 64, 128, 1, 4, 4),
    32: KernelConfig(32, 128, 128, 1, 4, 3),
    64: KernelConfig(64, 128, 64, 1, 4, 4),
    128: KernelConfig(128, 256, 64, 8, 8, 3),
}
_AMPERE = {
    16: KernelConfig(16, 64, 128, 1, 4, 4),
    32: KernelConfig(32, 64, 128, 1, 4, 3),
    64: KernelConfig(64, 128, 64, 1, 4, 3),
    128: KernelConfig(128, 128, 32, 8, 8, 3),
}
_AMD = {
    16: KernelConfig(16, 64, 128, 1, 4, 2),
    32: KernelConfig(32, 64, 128, 1, 4, 2),
    64: KernelConfig(64, 128, 64, 1, 4, 2),
    128: KernelConfig(128, 128, 64, 8, 8, 2),
}
# Operands of one byte. Below 64 rows fp8 reaches Hopper's tensor cores only with swapped operands; a step of 128 is
# what one block of scales covers.
_HOPPER_W8A8 = {
    16: KernelConfig(16, 128, 128, 1, 4, 4, swap_ab=True),
    32: KernelConfig(32, 128, 128, 1, 4, 3, swap_ab=True),
    64: KernelConfig(64, 128, 128, 1, 4, 3),
    128: KernelConfig(128, 128, 128, 8, 8, 3),
}
_W8A8 = {
    16: KernelConfig(16, 64, 128, 1, 4, 3),
    32: KernelConfig(32, 64, 128, 1, 4, 3),
    64: KernelConfig(64, 128, 128, 1, 4, 2),
    128: KernelConfig(128, 128, 64, 8, 8, 2),
}
# As for operands of two bytes, two steps in flight: at three, Triton 3.6's pass for AMD's buffer loads fails where a
# tile of 16 rows has several blocks of scales.
_AMD_W8A8 = {size: replace(tile, num_stages=2) for size, tile in _W8A8.items()}
# Weights that are unpacked in registers: swapped, they stay there as the matrix instruction's row operand.
_HOPPER_WEIGHT_ONLY = {
    16: KernelConfig(16, 64, 128, 1, 4, 4, swap_ab=True),
    64: KernelConfig(64, 128, 64, 1, 8, 3, swap_ab=True),
    128: KernelConfig(128, 64, 64, 8, 8, 3),
}
_WEIGHT_ONLY = {
    16: KernelConfig(16, 64, 64, 1, 4, 3),
    64: KernelConfig(64, 64, 64, 1, 4, 3),
    128: KernelConfig(128, 128, 32, 8, 8, 2),
}
# float32 is computed on the vector units: few registers, small tiles, nothing to gain from 128 rows.
_FLOAT32 = {
    16: KernelConfig(16, 64, 32, 1, 4, 3),
    64: KernelConfig(64, 64, 32, 8, 8, 3),
}
# Under the interpreter small shapes should meet several steps and tiles, with tails.
_INTERPRETER = {16: KernelConfig(16, 32, 32, 1, 4, 1)}


def _tiles(dtype: torch.dtype, platform: Platform, scheme: QuantScheme) -> dict[int, KernelConfig]:
    if platform.vendor is Vendor.CPU:
        return _INTERPRETER
    if scheme in (QuantScheme.FP8_W8A8, QuantScheme.INT8_W8A8):
        if platform.vendor is Vendor.AMD:
            return _AMD_W8A8
        return _HOPPER_W8A8 if platform.is_hopper else _W8A8
    if scheme is not QuantScheme.NONE:
        return _HOPPER_WEIGHT_ONLY if platform.is_hopper else _WEIGHT_ONLY
    if dtype.itemsize == 4:
        return _FLOAT32
    if platform.vendor is Vendor.AMD:
        return _AMD
    if platform.is_hopper:
        return _HOPPER
    if platform.vendor is Vendor.NVIDIA and platform.family == 100:
        return _BLACKWELL
    return _AMPERE


def fit_block_k(config: AnyTile, block_shape: tuple[int, int] | None) -> AnyTile:
    """The tile with a BLOCK_SIZE_K that divides the K of a scale block or group.

    One step of the kernel knows one scale: a longer step would apply the first block's scale to the next
    (https://github.com/vllm-project/vllm/pull/39183 and 43506, in whose review such values were seen to be overridden
    in silence).

    Raises:
        ValueError: no step that the kernel takes divides it.
    """
    k = block_shape[1] if block_shape is not None else 0
    size = config.block_size_k
    while k and k % size:
        size //= 2
    if size < 16:
        raise ValueError(f"block_shape: expected a K that 16 divides, got {block_shape}")
    return config if size == config.block_size_k else replace(config, block_size_k=size)


def _fit(config: KernelConfig, dtype: torch.dtype, platform: Platform) -> KernelConfig:
    limit = platform.shared_memory
    while limit and config.shared_memory(dtype) > limit:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_size_k > 32:
            config = replace(config, block_size_k=config.block_size_k // 2)
        elif config.block_size_n > 32:
            config = replace(config, block_size_n=config.block_size_n // 2)
        elif config.num_stages > 1:
            config = replace(config, num_stages=1)
        else:
            raise ValueError(f"platform: expected room for {config}, got {limit} bytes of shared memory")
    return config


def default_kernel_config(
    *,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    platform: Platform,
    scheme: QuantScheme = QuantScheme.NONE,
    block_shape: tuple[int, int] | None = None,
) -> KernelConfig:
    """The tile for one grouped GEMM where no tuned file has one.

    block_size_m is the smallest power of two that holds twice the mean rows of an expert: with fewer rows a block,
    experts above the mean read their weights again. It depends on nothing but the first three arguments, so both
    GEMMs of a layer get the same one, as they must: they share the alignment.

    Args:
        num_tokens: M.
        top_k: experts a token.
        num_experts: experts that the pairs are spread over (with an `expert_map`: the global ones).
        n: rows of one expert's weight: 2I for the first GEMM, H for the second.
        k: columns of it: H for the first GEMM, I for the second.
        dtype: of the activations.
        platform: where it runs.
        scheme: how weights and activations are quantised.
        block_shape: as `MoEConfig` has it.

    Raises:
        TypeError, ValueError: an argument of another type or range, by name; a platform with less shared memory than
            the smallest tile needs, or a block_shape whose K no step of the kernel divides.
    """
    sizes = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts, "n": n, "k": k}
    for name, size in sizes.items():
        expect_int(name, size, low=1)
    expect_dtype("dtype", dtype)
    expect_instance("platform", platform, Platform)
    expect_one_of("scheme", scheme, QuantScheme)
    expect_scales(block_shape)
    return _default(*sizes.values(), dtype, platform, QuantScheme(scheme), block_shape)


def expect_scales(block_shape: Any) -> None:
    """Check a block_shape that tiles are asked for: `fit_block_k` says which of them a kernel has steps for.

    Raises:
        ValueError: no two integers of at least 0.
    """
    is_pair = isinstance(block_shape, tuple) and [type(size) for size in block_shape] == [int, int]
    if block_shape is not None and not (is_pair and min(block_shape) >= 0):
        raise ValueError(f"block_shape: expected two integers of at least 0 or None, got {shown(block_shape)}")


@lru_cache(maxsize=4096)
def _default(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    platform: Platform,
    scheme: QuantScheme,
    block_shape: tuple[int, int] | None,
) -> KernelConfig:
    tiles = _tiles(dtype, platform, scheme)
    rows = 2 * num_tokens * top_k / num_experts
    block_size_m = next((size for size in tiles if size >= rows), max(tiles))
    config = tiles[block_size_m]
    # An expert narrower than the tile would only pad it.
    while config.block_size_n > 32 and config.block_size_n // 2 >= n:
        config = replace(config, block_size_n=config.block_size_n // 2)
    if scheme is not QuantScheme.NONE:
        # Scales that differ within a tile's rows of weights take registers, which a large tile has not.
        scale_n = block_shape[0] if block_shape is not None else 0
        if block_size_m == 128 and scale_n and (n % 256 or scale_n % config.block_size_n):
            config = replace(config, block_size_n=min(64, config.block_size_n))
        stored = torch.int8 if scheme in (QuantScheme.FP8_W8A8, QuantScheme.INT8_W8A8) else dtype
        return _fit(fit_block_k(config, block_shape), stored, platform)
    # A step that divides K needs no mask: H = 2880 takes half the step, with the same bytes in flight. Rows that no
    # step divides are not aligned either, and their loads go through registers, of which a small tile leaves some.
    if k % config.block_size_k and k % 64 == 0:
        config = replace(config, block_size_k=64, num_stages=min(6, 2 * config.num_stages))
    elif k % config.block_size_k and platform.vendor is not Vendor.CPU:
        block_size_n = min(128 // dtype.itemsize, config.block_size_n)
        config = replace(config, block_size_k=32, block_size_n=block_size_n)
    return _fit(config, dtype, platform)


_override: ContextVar[tuple[KernelConfig, KernelConfig] | None] = ContextVar("moegate_kernel_configs", default=None)


@contextmanager
def use_kernel_configs(w13: KernelConfig, w2: KernelConfig | None = None) -> Iterator[None]:
    """Run the layers inside this block with these tiles for the first and the second GEMM: how a search measures one.

    Args:
        w13: for the first GEMM.
        w2: for the second; None takes `w13` for both.

    Raises:
        TypeError: no tiles.
        ValueError: two different block_size_m, which one alignment cannot serve.
    """
    expect_instance("w13", w13, KernelConfig)
    expect_instance("w2", w2, KernelConfig, optional=True)
    w2 = w13 if w2 is None else w2
    if w13.block_size_m != w2.block_size_m:
        raise ValueError(
            f"w2: expected block_size_m {w13.block_size_m} as the first GEMM has it, got {w2.block_size_m}"
        )
    token = _override.set((w13, w2))
    try:
        yield
    finally:
        _override.reset(token)


def override_in_force() -> tuple[KernelConfig, KernelConfig] | None:
    """The tiles of the innermost `use_kernel_configs` block, None outside."""
    return _override.get()

"""Tensor values from an integer hash of (seed, tensor, indices), on the dtype's grid.

The same bits on every device and in every torch version, and a smaller tensor holds the values of the larger one's
corner: a failing spec replays anywhere, and stays the same case while it shrinks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

# splitmix64's constants (Steele, Lea, Flood 2014) as signed 64-bit numbers; torch's int64 products wrap.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

# Bits of a uniform integer mantissa that each dtype holds exactly (fp32: enough that TF32 must round it).
MANTISSA_BITS = {torch.bfloat16: 8, torch.float16: 10, torch.float32: 20}


def _shift(h: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (h >> bits) & ((1 << (64 - bits)) - 1)


def _mix(h: Tensor) -> Tensor:
    h = (h ^ _shift(h, 30)) * _MIX_1
    h = (h ^ _shift(h, 27)) * _MIX_2
    return h ^ _shift(h, 31)


def hashed(seed: int, tensor: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int64 hashes of every index of `shape`; a function of (seed, tensor, index) alone."""
    start = (seed * 1_000_003 + zlib.crc32(tensor.encode())) & 0x7FFF_FFFF_FFFF_FFFF
    h = torch.tensor(start, device=device).view([1] * len(shape))
    for axis, size in enumerate(shape):
        index = torch.arange(1, size + 1, device=device).view([-1] + [1] * (len(shape) - axis - 1))
        h = _mix(h + index * _GOLDEN)
    return h


def integers(
    seed: int, tensor: str, shape: Sequence[int], low: int, high: int, device: torch.device | str = "cpu"
) -> Tensor:
    """int64 in [low, high)."""
    return low + _shift(hashed(seed, tensor, shape, device), 11) % (high - low)


def on_grid(
    seed: int,
    tensor: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    exponent: int = 0,
    spread: int = 0,
) -> Tensor:
    """Values uniform in (-1, 1) * 2**exponent that `dtype` holds exactly.

    Args:
        seed: of the case.
        tensor: the tensor's name.
        shape: its shape.
        dtype: bfloat16, float16 or float32.
        device: where to make it.
        exponent: of the scale, a power of two.
        spread: each value is further divided by 2**s, s uniform in 0 .. spread (widely spread exponents).
    """
    bits = MANTISSA_BITS[dtype]
    h = hashed(seed, tensor, shape, device)
    mantissa = (_shift(h, 64 - bits - 1) - (1 << bits)).to(torch.float32)  # [-2**bits, 2**bits), exact in float32
    values = mantissa * 2.0 ** (exponent - bits)
    if spread:
        # A table of exact powers: no device's pow() is asked for them.
        powers = torch.tensor([2.0**-s for s in range(spread + 1)], device=device)
        values = values * powers[_shift(h, 3) % (spread + 1)]
    return values.to(dtype)

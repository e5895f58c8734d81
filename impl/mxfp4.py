"""MXFP4 as public checkpoints store it, back to plain numbers.

A block is 32 numbers of 4 bits (e2m1) with one power of two (e8m0), by the OCP Microscaling Formats specification 1.0:
bytes hold two numbers, the lower nibble first; a scale byte s means 2^(s - 127), and 255 is NaN.
"""

from __future__ import annotations

import torch

from .checks import expect_dtype, expect_instance, expect_tensor

BLOCK = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The sign is the highest of the four bits.
_E2M1 = (*_POSITIVE, *(-value for value in _POSITIVE))


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers, exact wherever `dtype` has their exponent: two bits of mantissa fit every one.

    Args:
        blocks: `[..., G, 16]` uint8.
        scales: `[..., G]` uint8.
        dtype: bfloat16, float16 or float32.

    Returns:
        `[..., 32 G]`.

    Raises:
        TypeError, ValueError: by name.
    """
    expect_dtype("dtype", dtype)
    leading = tuple(expect_instance("blocks", blocks, torch.Tensor).shape[:-1])
    expect_tensor("blocks", blocks, shape=(*leading, BLOCK // 2), dtypes=(torch.uint8,))
    expect_tensor("scales", scales, shape=leading, dtypes=(torch.uint8,), like=blocks)
    table = torch.tensor(_E2M1, dtype=torch.float32, device=blocks.device)
    numbers = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), dim=-1).flatten(-2)
    exponents = scales.int() - 127
    numbers = torch.ldexp(numbers, exponents[..., None])
    return numbers.masked_fill_((scales == 255)[..., None], torch.nan).to(dtype).flatten(-2)

"""Quantised operands: what stored numbers and scales mean, and how activations become few bits. Pure torch.

Weights: w ~ q * scale, with one scale for each expert, output channel, block, or group along K. Activations are
quantised before each GEMM:

    scale = amax / largest   (1 where amax is 0),   q = round(clamp(x / scale, -largest, largest))

with `largest` 448 for fp8 e4m3 and 127 for int8, and rounding to nearest, ties to even (Micikevicius et al. 2022,
arXiv 2209.05433; block scales as in DeepSeek-V3, arXiv 2412.19437; int4 groups as in GPTQ, arXiv 2210.17323, and AWQ,
arXiv 2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def grid_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far apart the numbers of `dtype` lie around each value: 1 for int8; e4m3 has 3 fraction bits from 2^-6 on."""
    if dtype == torch.int8:
        return torch.ones_like(values)
    exponent = torch.where(values == 0, -5, torch.frexp(values).exponent).clamp(min=-5)  # of 2^-6 it is -5
    return torch.ldexp(torch.ones_like(values), exponent - 4)


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of `dtype`, ties to even and clamped to its range, in the dtype of `values`.

    Not by a cast, which goes through float32 and rounds twice on the way.
    """
    step = grid_step(values, dtype)
    return ((values / step).round() * step).clamp(-LARGEST[dtype], LARGEST[dtype])


@dataclass(frozen=True)
class QuantizedWeight:
    """`[E, N, K]` weights in few bits.

    Attributes:
        values: `[E, N, K]` float8_e4m3fn or int8; `[E, N, K/2]` uint8 for int4, the even k in the low nibble.
        scale: `[E]` (one an expert), `[E, N]` (one a channel), `[E, N, K/g]` (groups along K), or `[E, blocks of
            rows, ceil(K / bk)]` (blocks).
        zero_point: int4 alone: `[E, N/2, K/g]` uint8, the even n in the low nibble; None means 8 everywhere.
        block_shape: (bn, bk) of blocks, (0, g) of groups, None otherwise.
        parts: the grid of blocks starts anew at each of this many equal parts of the rows: 2 for gate and up.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    block_shape: tuple[int, int] | None = None
    parts: int = 1

    @property
    def shape(self) -> torch.Size:
        """`[E, N, K]`, unpacked."""
        *rows, k = self.values.shape
        return torch.Size((*rows, 2 * k if self.values.dtype == torch.uint8 else k))

    def expert(self, e: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weight of expert `e` that the stored numbers mean, `[N, K]`."""
        _, n, k = self.shape
        values = self.values[e]
        if values.dtype == torch.uint8:
            values = torch.stack([values & 15, values >> 4], dim=-1).reshape(n, k).to(dtype) - self._zeros(e, dtype)
        return values.to(dtype) * self._scales(e, dtype)

    def _zeros(self, e: int, dtype: torch.dtype) -> Tensor:
        """int4's zero of every element, `[N, K]`, or 8."""
        if self.zero_point is None:
            return torch.tensor(8, dtype=dtype, device=self.values.device)
        pairs = self.zero_point[e]
        zeros = torch.stack([pairs & 15, pairs >> 4], dim=1).reshape(self.shape[1], -1)
        return zeros.repeat_interleave(self.shape[2] // zeros.shape[1], dim=1).to(dtype)

    def _scales(self, e: int, dtype: torch.dtype) -> Tensor:
        """What each element is multiplied by, `[N, K]` or a shape that broadcasts to it."""
        _, n, k = self.shape
        scale = self.scale[e].to(dtype)
        if scale.ndim == 0:
            return scale
        if scale.ndim == 1:
            return scale[:, None]
        bn, bk = self.block_shape or (0, 0)
        columns = scale.repeat_interleave(bk, dim=1)[:, :k]
        if bn == 0:
            return columns
        part = n // self.parts
        grids = columns.chunk(self.parts, dim=0)
        return torch.cat([grid.repeat_interleave(bn, dim=0)[:part] for grid in grids])


def expert_weight(weight: Tensor | QuantizedWeight, e: int, dtype: torch.dtype) -> Tensor:
    """The `[N, K]` weight of one expert, however it is stored."""
    return weight.expert(e, dtype) if isinstance(weight, QuantizedWeight) else weight[e].to(dtype)


@dataclass(frozen=True)
class ActivationQuantization:
    """How the rows that enter a GEMM are quantised.

    Attributes:
        dtype: float8_e4m3fn or int8.
        granularity: what shares a dynamic scale: the whole `tensor`, a `token`, or a `group` of a token's columns.
        group: columns of a group, the last of which may be narrower.
        static_scale: one fixed scale for the whole tensor, instead of a dynamic one.
    """

    dtype: torch.dtype
    granularity: Literal["tensor", "token", "group"] = "tensor"
    group: int = 0
    static_scale: float | None = None

    def scales(self, x: Tensor) -> Tensor:
        """The scale of every element of `x [rows, K]`, of that shape."""
        if self.static_scale is not None:
            return torch.full_like(x, self.static_scale)
        if x.numel() == 0:
            return torch.ones_like(x)
        if self.granularity == "tensor":
            amax = x.abs().amax().expand_as(x)
        elif self.granularity == "token":
            amax = x.abs().amax(dim=1, keepdim=True).expand_as(x)
        else:
            groups = [part.abs().amax(dim=1, keepdim=True).expand_as(part) for part in x.split(self.group, dim=1)]
            amax = torch.cat(groups, dim=1)
        return torch.where(amax == 0, 1.0, amax / LARGEST[self.dtype])

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [rows, K]` in few bits, `[rows, K]` of `dtype`, and the scale of every element, `[rows, K]`."""
        scales = self.scales(x)
        return nearest(x / scales, self.dtype).to(self.dtype), scales

    def rounded(self, x: Tensor) -> Tensor:
        """What the second reader of `x [rows, K]` sees: quantised and scaled back, in the dtype of `x`."""
        values, scales = self.quantize(x)
        return values.to(x.dtype) * scales

"""Experts' weights in few bits: the stored numbers, scales and zero points of a case, drawn on the formats' grids.

Nothing is quantised here. Every stored number is drawn as it is, so that the whole grid comes up and no quantiser's
habits do; scales have an exponent and a mantissa of their own for each expert, channel, block or group.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.activations import Activation
from ..reference.quantization import ActivationQuantization, QuantizedWeight
from .spec import SCHEMES, BatchedSpec, ExpertsSpec, Scheme
from .values import hashed, integers, on_grid

# log2 of the size of a format's drawn numbers, so that the weights are as large as plain ones are and float16 never
# overflows: what scales make up for.
_SIZE = {"fp8": 6, "int8": 7, "int4": 3}
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}


@dataclass(frozen=True)
class StoredExperts:
    """What belongs to the stored weights of a case; the formats are those of `reference.quantization`.

    Attributes:
        scheme: of the spec.
        w13_scale: float32, as `QuantizedWeight.scale`.
        w2_scale: the same of the second GEMM.
        w13_zero_point: int4 alone, or None.
        w2_zero_point: the same of the second GEMM.
        a13_scale: `[1]` float32, the static scale of the first GEMM's input, or None.
        a2_scale: the same of the second GEMM's.
        block_shape: (bn, bk) of blocks, (0, g) of groups, None otherwise.
    """

    scheme: Scheme
    w13_scale: Tensor
    w2_scale: Tensor
    w13_zero_point: Tensor | None = None
    w2_zero_point: Tensor | None = None
    a13_scale: Tensor | None = None
    a2_scale: Tensor | None = None
    block_shape: tuple[int, int] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def of_experts(self, which: Tensor) -> StoredExperts:
        """What belongs to some of the experts, `which` an index into them."""
        each = {name: t[which] for name, t in self.tensors().items() if name not in ("a13_scale", "a2_scale")}
        return replace(self, **each)

    def w13(self, values: Tensor, activation: Activation) -> QuantizedWeight:
        """The reference's weight of the first GEMM."""
        parts = 2 if activation.is_gated and self.scheme.weight_scale == "block" else 1
        return QuantizedWeight(values, self.w13_scale, self.w13_zero_point, self.block_shape, parts)

    def w2(self, values: Tensor) -> QuantizedWeight:
        """The reference's weight of the second GEMM."""
        return QuantizedWeight(values, self.w2_scale, self.w2_zero_point, self.block_shape)

    def activations(self, static: Tensor | None) -> ActivationQuantization | None:
        """How the reference quantises the rows that enter a GEMM."""
        scale = self.scheme.activation_scale
        if scale is None or self.scheme.weight is None:
            return None
        dtype = DTYPES[self.scheme.weight]
        if scale == "static":
            return ActivationQuantization(dtype, static_scale=None if static is None else float(static))
        return ActivationQuantization(dtype, scale, group=self.block_shape[1] if self.block_shape else 0)


def _numbers(seed: int, name: str, shape: tuple[int, ...], scheme: Scheme, device: Any) -> Tensor:
    """Stored numbers of every kind, `shape` (int4: the last axis halved)."""
    if scheme.weight == "int8":
        return integers(seed, name, shape, -127, 128, device).to(torch.int8)
    if scheme.weight == "int4":
        return _packed(integers(seed, name, shape, 0, 16, device), -1)
    h = hashed(seed, name, shape, device)
    # Mostly four exponents in the middle of the range; one in 32 any code but NaN, subnormals and 448 among them.
    usual = (((h >> 20) & 3) + 9) << 3 | ((h >> 24) & 7)
    anything = ((h >> 28) & 0xFFFF) % 127
    code = torch.where(((h >> 44) & 31) == 0, anything, usual) | (((h >> 50) & 1) << 7)
    return code.to(torch.uint8).view(torch.float8_e4m3fn)


def _packed(nibbles: Tensor, dim: int) -> Tensor:
    """Two nibbles a byte along `dim`, the even index in the low one."""
    even, odd = nibbles.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
    return (even | (odd << 4)).to(torch.uint8)


def _scale_shape(scheme: Scheme, num: int, rows: int, columns: int, block_n: int, block_k: int) -> tuple[int, ...]:
    if scheme.weight_scale == "tensor":
        return (num,)
    if scheme.weight_scale == "channel":
        return num, rows
    runs = -(-columns // block_k)
    return (num, rows, runs) if scheme.weight_scale == "group" else (num, -(-rows // block_n), runs)


def _scales(seed: int, name: str, shape: tuple[int, ...], exponent: int, spread: int, device: Any) -> Tensor:
    """Positive float32 scales: 2**exponent times a mantissa in [1/2, 1), over 2**s with s in 0 .. spread."""
    mantissa = on_grid(seed, f"{name}/mantissa", shape, torch.float32, device).abs() / 2 + 0.5
    powers = torch.tensor([2.0**-s for s in range(spread + 1)], device=device)
    return mantissa * powers[integers(seed, f"{name}/exponent", shape, 0, spread + 1, device)] * 2.0**exponent


def _rows_in_order(rows: Tensor, activation: Activation, dim: int = 1) -> Tensor:
    """Gate rows first, then up rows, into the order that the activation reads."""
    if not activation.interleaved:
        return rows
    return torch.stack(rows.chunk(2, dim=dim), dim=dim + 1).flatten(dim, dim + 1)


def stored_experts(
    spec: ExpertsSpec | BatchedSpec,
    num_local: int,
    activation: Activation,
    exponents: tuple[int, int],
    nominal: tuple[float, float],
    device: Any,
) -> tuple[Tensor, Tensor, StoredExperts]:
    """The stored w13 and w2 of a spec with a scheme, and what belongs to them.

    Args:
        spec: says the scheme and its blocks.
        num_local: E_local.
        activation: says the rows of w13.
        exponents: log2 of the weights' size, of w13 and w2.
        nominal: magnitudes that activations rarely pass, of both GEMMs' inputs; static scales lie around these.
        device: where to make them.
    """
    scheme = SCHEMES[spec.scheme]
    seed, parts = spec.seed, 2 if activation.is_gated else 1
    size = _SIZE[str(scheme.weight)]
    spread = 6 if spec.values == "spread" else 2
    w13 = _numbers(seed, "w13", (num_local, parts * spec.I, spec.H), scheme, device)
    w2 = _numbers(seed, "w2", (num_local, spec.H, spec.I), scheme, device)

    def scales(name: str, rows: int, columns: int, exponent: int) -> Tensor:
        shape = _scale_shape(scheme, num_local, rows, columns, spec.block_n, spec.block_k)
        return _scales(seed, name, shape, exponent - size + 1, spread, device)

    if scheme.weight_scale == "tensor":
        w13_scale = scales("w13_scale", 0, spec.H, exponents[0])
    else:
        up = 4 if spec.values == "asymmetric" else 0
        of_parts = [scales(f"{n}_scale", spec.I, spec.H, exponents[0] + e) for n, e in (("gate", 0), ("up", up))]
        w13_scale = _rows_in_order(torch.cat(of_parts[:parts], dim=1), activation)
    zeros: list[Tensor | None] = [None, None]
    if scheme.zero_points:
        for number, (rows, columns) in enumerate(((parts * spec.I, spec.H), (spec.H, spec.I))):
            shape = (num_local, rows, columns // spec.block_k)
            zeros[number] = _packed(integers(seed, f"zero_point/{number}", shape, 0, 16, device), 1)
    static: list[Tensor | None] = [None, None]
    if scheme.activation_scale == "static":
        static = [static_scale(seed, f"static/{n}", magnitude, device) for n, magnitude in enumerate(nominal)]
    w2_scale = scales("w2_scale", spec.H, spec.I, exponents[1])
    blocks = (spec.block_n, spec.block_k) if scheme.has_blocks else None
    return w13, w2, StoredExperts(scheme, w13_scale, w2_scale, zeros[0], zeros[1], static[0], static[1], blocks)


def static_scale(seed: int, name: str, nominal: float, device: Any) -> Tensor:
    """`[1]`: about right, so small that much is clamped, so large that much becomes subnormal, or a power of two."""
    about = nominal / 448
    choice = int(integers(seed, name, (1,), 0, 4))
    if choice == 3:
        return torch.tensor([2.0 ** round(torch.tensor(about).log2().item())], device=device)
    factor = (1.0, 0.25, 4096.0)[choice] * (1 + int(integers(seed, f"{name}/mantissa", (1,), 0, 4096)) / 4096)
    return torch.tensor([about * factor], dtype=torch.float32, device=device)

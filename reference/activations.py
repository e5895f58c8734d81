"""The activation between an expert's two GEMMs, with the slopes that errors travel along. Float64, pure torch.

Every one is a product, A(gate) * B(up). A gated one reads I gate rows and I up rows of w13; the others read I rows,
and B is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def silu(gate: Tensor) -> Tensor:
    """The sigmoid linear unit, g * sigmoid(g) (Elfwing et al. 2017, arXiv 1702.03118)."""
    return gate * torch.sigmoid(gate)


def silu_slope(gate: Tensor) -> Tensor:
    """d silu(g) / dg = s * (1 + g * (1 - s)), with s = sigmoid(g)."""
    s = torch.sigmoid(gate)
    return s * (1 + gate * (1 - s))


def gelu(gate: Tensor) -> Tensor:
    """The Gaussian error linear unit, g * Phi(g) (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return gate * torch.special.ndtr(gate)


def gelu_slope(gate: Tensor) -> Tensor:
    """Phi(g) + g * phi(g)."""
    return torch.special.ndtr(gate) + gate * torch.exp(-gate * gate / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(gate: Tensor) -> Tensor:
    """GELU by tanh, g/2 * (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) (same source)."""
    return gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))


def gelu_tanh_slope(gate: Tensor) -> Tensor:
    """The derivative of `gelu_tanh`."""
    t = torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    return (1 + t) / 2 + gate / 2 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate**2)


def relu2(gate: Tensor) -> Tensor:
    """max(g, 0)^2 (So et al. 2021, arXiv 2109.08668; Nemotron)."""
    return gate.clamp(min=0) ** 2


def relu2_slope(gate: Tensor) -> Tensor:
    """2 max(g, 0)."""
    return 2 * gate.clamp(min=0)


@dataclass(frozen=True)
class _Curve:
    """A, its slope, and the largest |A''|: what a first-order error leaves out where the slope is zero."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: float


# silu''(0) = 1/2; gelu''(0) = 2 phi(0) = 0.798, and its tanh form stays below 0.85; relu2'' = 2.
_CURVES = {
    "silu": _Curve(silu, silu_slope, 0.5),
    "gelu": _Curve(gelu, gelu_slope, 0.8),
    "gelu_tanh": _Curve(gelu_tanh, gelu_tanh_slope, 0.85),
    "relu2": _Curve(relu2, relu2_slope, 2.0),
}


@dataclass(frozen=True)
class Activation:
    """One activation with its parameters.

    Attributes:
        name: `silu`, `gelu`, `gelu_tanh` (gated), `swigluoai` (gated), `silu_no_mul`, `gelu_no_mul`, `relu2_no_mul`.
        alpha: of swigluoai alone.
        limit: of swigluoai alone.
        interleaved: gate and up rows of w13 alternate (row 2i is gate i, row 2i + 1 up i) instead of all gate rows
            coming first.

    swigluoai is gpt-oss's (arXiv 2508.10925 and its model code): with g = min(gate, limit) and u = up clamped to
    [-limit, limit], g * sigmoid(alpha * g) * (u + 1).
    """

    name: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0
    interleaved: bool = False

    @property
    def is_gated(self) -> bool:
        """Whether w13 holds 2I rows, and not I."""
        return not self.name.endswith("_no_mul")

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up, `[..., I]` each, of the first GEMM's rows `[..., 2I]`; up is 0 where nothing is gated."""
        if not self.is_gated:
            return rows, torch.zeros_like(rows)
        if self.interleaved:
            return rows[..., 0::2], rows[..., 1::2]
        gate, up = rows.chunk(2, dim=-1)
        return gate, up

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """The inverse of `split`: `[..., 2I]` rows in w13's order."""
        if not self.is_gated:
            return gate
        return torch.stack([gate, up], dim=-1).flatten(-2) if self.interleaved else torch.cat([gate, up], dim=-1)

    @property
    def _is_clamped(self) -> bool:
        return self.name == "swigluoai"

    @property
    def _curve(self) -> _Curve:
        return _CURVES[self.name.removesuffix("_no_mul")]

    def of_gate(self, gate: Tensor) -> Tensor:
        """A(gate)."""
        if self._is_clamped:
            g = gate.clamp(max=self.limit)
            return g * torch.sigmoid(self.alpha * g)
        return self._curve.value(gate)

    def of_gate_slope(self, gate: Tensor) -> Tensor:
        """dA / dgate; at a clamp's edge the slope inside."""
        if self._is_clamped:
            slope = silu_slope(self.alpha * gate)  # g sigmoid(a g) = silu(a g) / a
            return torch.where(gate > self.limit, 0.0, slope)
        return self._curve.slope(gate)

    @property
    def curvature(self) -> float:
        """The largest |A''|."""
        return self.alpha * 0.5 if self._is_clamped else self._curve.curvature

    def of_up(self, up: Tensor) -> Tensor:
        """B(up)."""
        if self._is_clamped:
            return up.clamp(-self.limit, self.limit) + 1
        return up if self.is_gated else torch.ones_like(up)

    def of_up_slope(self, up: Tensor) -> Tensor:
        """dB / dup."""
        if self._is_clamped:
            return (up.abs() <= self.limit).to(up.dtype)
        return torch.full_like(up, float(self.is_gated))

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """A(gate) * B(up)."""
        return self.of_gate(gate) * self.of_up(up)


SILU = Activation()

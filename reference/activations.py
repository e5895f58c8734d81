"""The activation between an expert's two GEMMs, with its derivative. Float64, pure torch."""

from __future__ import annotations

import torch
from torch import Tensor


def silu(gate: Tensor) -> Tensor:
    """The sigmoid linear unit, g * sigmoid(g) (Elfwing et al. 2017, arXiv 1702.03118)."""
    return gate * torch.sigmoid(gate)


def silu_slope(gate: Tensor) -> Tensor:
    """d silu(g) / dg = s * (1 + g * (1 - s)), with s = sigmoid(g)."""
    s = torch.sigmoid(gate)
    return s * (1 + gate * (1 - s))


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU without biases: silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return silu(gate) * up

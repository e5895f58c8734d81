"""How a layer's experts are stored in few bits, and how its activations are quantised before each GEMM.

A weight is w ~ q * scale (int4: (q - zero) * scale), with one scale for each expert `[E]`, output channel `[E, N]`,
block, or group along K. The formats, exactly:

* blocks (bn, bk): `w13_scale [E, 2 * ceil(I / bn), ceil(H / bk)]`, whose grid starts anew at the first up row, and
  `w2_scale [E, ceil(H / bn), ceil(I / bk)]`;
* groups (0, g): `[E, N, K / g]`;
* int4: `uint8 [E, N, K / 2]`, the even k in the low nibble; `zero_point uint8 [E, N / 2, K / g]`, the even n in the low
  nibble, or None, which means 8;
* dynamic scales of activations: amax / 448 (int8: amax / 127), 1 where a row or group is all zero; clamped before the
  cast, rounded to nearest even, int8 in [-127, 127].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from .config import QuantScheme


class ActivationScale(StrEnum):
    """What shares one scale of an activation."""

    NONE = "none"  # activations stay as they are
    STATIC = "static"  # the whole tensor, by a scale that is given
    TENSOR = "tensor"  # the whole tensor, by its own largest magnitude
    TOKEN = "token"  # a row
    GROUP = "group"  # a row's columns of one block of the weights


class WeightScale(StrEnum):
    """What shares one scale of a weight."""

    TENSOR = "tensor"  # an expert
    CHANNEL = "channel"  # a row of an expert's weight
    BLOCK = "block"  # a block of rows and columns
    GROUP = "group"  # a row's columns of one group


@dataclass(frozen=True, eq=False)
class ExpertsQuantization:
    """The scales of one layer's experts. Scales are contiguous, on the weights' device.

    Attributes:
        scheme: fp8_w8a8, int8_w8a8, int8_w8a16 or int4_w4a16.
        w13_scale, w2_scale: float32 (the weight-only schemes also take the activations' dtype).
        w13_zero_point, w2_zero_point: of int4.
        block_shape: (bn, bk) of blocks, (0, g) of groups along K, None otherwise.
        a13_scale, a2_scale: float32 of one element: the static scales of both GEMMs' activations.
        per_act_token_quant: dynamic scales of activations are one a token, and not one a tensor.
    """

    scheme: QuantScheme
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    w13_zero_point: torch.Tensor | None = None
    w2_zero_point: torch.Tensor | None = None
    block_shape: tuple[int, int] | None = None
    a13_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    per_act_token_quant: bool = False

    @property
    def weight_scale(self) -> WeightScale:
        """What shares one scale of a weight."""
        if self.block_shape is not None:
            return WeightScale.BLOCK if self.block_shape[0] else WeightScale.GROUP
        return WeightScale.TENSOR if self.w13_scale.ndim == 1 else WeightScale.CHANNEL

    @property
    def activation_scale(self) -> ActivationScale:
        """What shares one scale of an activation."""
        if self.scheme in (QuantScheme.INT8_W8A16, QuantScheme.INT4_W4A16):
            return ActivationScale.NONE
        if self.a13_scale is not None:
            return ActivationScale.STATIC
        if self.block_shape is not None:
            return ActivationScale.GROUP
        return ActivationScale.TOKEN if self.per_act_token_quant else ActivationScale.TENSOR
